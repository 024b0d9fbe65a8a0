"""Errors a user can mend: each says what was wrong, where, and what would have happened otherwise."""


class EngramError(Exception):
    """Base of all errors that the command line prints without a traceback."""


class ConfigError(EngramError, ValueError):
    """A configuration that cannot be meant: an unknown key, a wrong type, an impossible size."""


class DataError(EngramError, ValueError):
    """Text or tokens that cannot be trained on: empty, binary, out of range, too short."""


class MismatchError(EngramError, ValueError):
    """Two things that must belong together do not: tokenizer and checkpoint, plan and table."""


class CheckpointError(EngramError, RuntimeError):
    """A checkpoint or run directory that cannot be read, written or continued."""


class TrainingError(EngramError, RuntimeError):
    """Training had to stop: a loss that is not finite, say."""
