"""The one error that a command shows as a single line. Everything else is a bug and keeps its traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used: what it is, what was found, what is allowed, the way out."""
