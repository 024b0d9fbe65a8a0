"""What a model does: losses with their uncertainty, controls, facts."""
