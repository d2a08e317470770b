"""Regular expressions for the names of weights, out of other people's recipes and adapters.

Python's `re` goes back and tries again: `(a+)+b` takes for ever on forty times `a`. Here all alternatives are followed at once,
so the time is at most the pattern's steps times the name's length. Syntax and meaning are those of `re`, without look-around,
back references and flags: these are refused. Source: Thompson, "Regular Expression Search Algorithm" (1968).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from gemma_edge.errors import one_line

MAX_STEPS = 20_000  # of all patterns of a file; a recipe with a rule for each weight of the 27B model has 13,000
MAX_LENGTH = 2000  # characters of one pattern
MAX_DEPTH = 50  # groups in groups
_ATOM = re.compile(r"\\[dDsSwW]|\\[^0-9A-Za-z]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\()|*+?{\[^$]", re.DOTALL)
_COUNT = re.compile(r"\{(?:(?P<exact>\d+)|(?P<low>\d*),(?P<high>\d*))\}")

# A step is one of: an expression for one character; offsets of the steps that may follow; "^" or "$".
Step = re.Pattern[str] | tuple[int, ...] | str
Code = list[Step]


class PatternError(ValueError):
    """A pattern that cannot be read, or is too long."""


def check(patterns: Iterable[str]) -> None:
    """Read the patterns of a file.

    Raises:
        PatternError: one of them cannot be read, or they have more than MAX_STEPS steps together.
    """
    total = 0
    for pattern in patterns:
        total += len(_compiled(pattern)) + 1
        if total > MAX_STEPS:
            raise PatternError(f"its patterns have more than {MAX_STEPS} steps")


@lru_cache(maxsize=1 << 16)
def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the whole of a name.

    Raises:
        PatternError: it cannot be read.
    """
    code = _compiled(pattern)
    reached = _closure(code, {0}, 0, len(name))
    for position, character in enumerate(name):
        following = {
            at + 1
            for at in reached
            if at < len(code) and isinstance(step := code[at], re.Pattern) and step.match(character)
        }
        if not following:
            return False
        reached = _closure(code, following, position + 1, len(name))
    return len(code) in reached


def _closure(code: Code, starts: set[int], position: int, end: int) -> set[int]:
    """All steps that can be reached from some steps without reading a character."""
    reached, waiting = set(starts), list(starts)
    while waiting:
        at = waiting.pop()
        step = code[at] if at < len(code) else ()
        offsets = step if isinstance(step, tuple) else ()
        if (step == "^" and position == 0) or (step == "$" and position == end):
            offsets = (1,)
        for offset in offsets:
            if at + offset not in reached:
                reached.add(at + offset)
                waiting.append(at + offset)
    return reached


@lru_cache(maxsize=1 << 12)
def _compiled(pattern: str) -> Code:
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"a pattern has {len(pattern)} characters; at most {MAX_LENGTH} are read")
    reader = _Reader(pattern)
    code = reader.alternatives(0)
    if reader.at < len(pattern):
        raise reader.error("a bracket is closed that was not opened")
    return code


class _Reader:
    """Turns a pattern into steps, from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def error(self, problem: str) -> PatternError:
        shown = self.pattern if len(self.pattern) <= 60 else f"{self.pattern[:57]}..."
        return PatternError(f"{shown!r}: {problem} at character {self.at}")

    def take(self, text: str) -> bool:
        """Go past a text if it comes next."""
        taken = self.pattern.startswith(text, self.at)
        self.at += len(text) if taken else 0
        return taken

    def alternatives(self, depth: int) -> Code:
        if depth > MAX_DEPTH:
            raise self.error(f"groups are nested more than {MAX_DEPTH} deep")
        branches = [self.sequence(depth)]
        while self.take("|"):
            branches.append(self.sequence(depth))
        code = branches.pop()
        for branch in reversed(branches):
            code = [(1, len(branch) + 2), *branch, (len(code) + 1,), *code]
        return code

    def sequence(self, depth: int) -> Code:
        code: Code = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            code += self.repeated(self.atom(depth))
            if len(code) > MAX_STEPS:
                raise PatternError(f"a pattern has more than {MAX_STEPS} steps")
        return code

    def atom(self, depth: int) -> Code:
        if self.take("(?:") or self.take("("):
            if self.pattern.startswith("?", self.at):
                raise self.error("look-around, names and flags are not supported")
            code = self.alternatives(depth + 1)
            if not self.take(")"):
                raise self.error("a bracket is not closed")
            return code
        for anchor in "^$":
            if self.take(anchor):
                return [anchor]
        match = _ATOM.match(self.pattern, self.at)
        if match is None:
            raise self.error("this is not supported")
        self.at = match.end()
        try:
            return [re.compile(match[0])]
        except re.error as error:
            raise self.error(one_line(error)) from None

    def repeated(self, code: Code) -> Code:
        """Some steps, repeated as the quantifier behind them says."""
        low, high = self.quantifier()
        self.take("?")  # fewest first: the same names match
        if (low, high) == (1, 1):
            return code
        if (len(code) + 1) * max(low, high or 0) > MAX_STEPS:
            raise PatternError(f"a pattern has more than {MAX_STEPS} steps")
        if high is None:
            return [*code * low, (1, len(code) + 2), *code, (-len(code) - 1,)]
        return [*code * low, *[(1, len(code) + 1), *code] * (high - low)]

    def quantifier(self) -> tuple[int, int | None]:
        """(fewest, most); most None: without end."""
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return counts
        match = _COUNT.match(self.pattern, self.at)
        if match is None:
            return 1, 1
        self.at = match.end()
        numbers = {name: text[:9] for name, text in match.groupdict().items() if text}
        low = int(numbers.get("exact", numbers.get("low", 0)))
        high = int(numbers["exact"]) if "exact" in numbers else int(numbers["high"]) if "high" in numbers else None
        if high is not None and high < low:
            raise self.error("a pattern repeats from more to fewer")
        return low, high
