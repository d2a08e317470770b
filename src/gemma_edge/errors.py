"""The one error that a command shows as a single line. Everything else is a bug and keeps its traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used: what it is, what was found, what is allowed, the way out."""


def one_line(error: Exception) -> str:
    """What a library's error says first, or its kind where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
