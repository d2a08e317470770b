"""The one error that a command shows as a single line. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# A parameter's name in a message, between backticks. Other text between backticks is left as it stands.
_PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)`")
MAX_QUOTED = 300  # characters of a library's message that one of our messages quotes


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The text names parameters between backticks: `` `bits` ``. `str(error)` shows them as Python knows them (bits); the command
    line shows its own spelling (--bits), see `spelled`.

    Attributes:
        field: the parameter or the key at fault, if one can be named.
        value: what it was.
        allowed: the values that would have been accepted.
        hint: the way out.
    """

    def __init__(
        self,
        problem: str = "",
        *,
        field: str | None = None,
        value: object = None,
        allowed: Iterable[object] | None = None,
        hint: str | None = None,
    ) -> None:
        """Make the error.

        Args:
            problem: what is wrong; empty for "`field` value".
            field, value: see the class.
            allowed: appended to the text as "; supported: ...".
            hint: appended to the text after a semicolon.
        """
        self.field, self.value, self.hint = field, value, hint
        self.allowed = None if allowed is None else tuple(allowed)
        parts = [problem or f"`{field}` {value}"]
        if self.allowed is not None:
            parts.append(f"supported: {', '.join(map(str, self.allowed))}")
        if hint:
            parts.append(hint)
        self._text = "; ".join(parts)
        super().__init__(self.spelled(lambda name: name))

    def spelled(self, spelling: Callable[[str], str]) -> str:
        """The message with every parameter's name replaced by its spelling."""
        return _PARAMETER.sub(lambda match: spelling(match[1]), self._text)


def one_line(error: Exception) -> str:
    """The first line of a library's error, shortened and without control characters; the error's kind if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(lines[0]) if lines else type(error).__name__
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."


def printable(text: str) -> str:
    """A text for a terminal. Control characters become escapes, because a name could control the terminal with them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# CONTROLS: every control character but newline and tab -> its escape
CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def without_controls(text: str) -> str:
    """A text of many lines for a terminal. Control characters but newline and tab become escapes."""
    return text.translate(CONTROLS)
