"""Studies: many runs that answer one question, killed and resumed at will, measured together."""
