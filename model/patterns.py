r"""Regular expressions for the names of weights, out of other people's recipes and adapters.

Python's `re` goes back and tries again: `(a+)+b` takes for ever on forty times `a`. RE2 does not, so its time grows with the
lengths of pattern and name only. Its syntax is that of `re` without look-around and back references, which are refused; its `\w`
and `\d` are ASCII, as the names of weights are.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import re2

from gemma_edge.errors import one_line

MAX_LENGTH = 2000  # characters of one pattern
# MAX_TOTAL: characters of all patterns of a file; a recipe with a rule for each weight of the 27B model has 13,000.
MAX_TOTAL = 200_000


class PatternError(ValueError):
    """A pattern that cannot be read, or is too long."""


def check(patterns: Iterable[str]) -> None:
    """Read the patterns of a file.

    Raises:
        PatternError: one of them cannot be read, or they are too long.
    """
    total = 0
    for pattern in patterns:
        _compiled(pattern)
        total += len(pattern) + 1
        if total > MAX_TOTAL:
            raise PatternError(f"its patterns have more than {MAX_TOTAL} characters together")


@lru_cache(maxsize=1 << 16)
def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the whole of a name.

    Raises:
        PatternError: it cannot be read.
    """
    return _compiled(pattern).fullmatch(name) is not None


@lru_cache(maxsize=1 << 12)
def _compiled(pattern: str) -> Any:
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"a pattern has {len(pattern)} characters; at most {MAX_LENGTH} are read")
    shown = repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
    if "{," in pattern:
        raise PatternError(f"{shown}: write {{0,n}} for {{,n}}, which RE2 takes for a text")
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise PatternError(f"{shown}: {error.args[0].decode(errors='replace')}") from None
    except ValueError as error:  # half a surrogate pair
        raise PatternError(f"{shown}: {one_line(error)}") from None
