"""Patterns mean what they mean to Python's `re`, and no pattern takes long."""

from __future__ import annotations

import random
import re

import pytest

from gemma_edge.model.patterns import MAX_LENGTH, MAX_TOTAL, PatternError, check, matches

NAMES = ("", "a", "b", "ab", "ba", "aab", "abab", "a.b", "a1b", "bbbb", "model.layers.11.mlp.up_proj", "a\tb")
ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    r"\d",
    r"\w",
    r"\S",
    "[ab]",
    "[^a]",
    "[]a]",
    r"[\]\d-]",
    "[a-z.]",
    "1",
    "_",
    "]",
    "}",
    "^",
    "$",
]
QUANTIFIERS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?", "??", "{0}"]


def drawn(draw: random.Random, depth: int = 0) -> str:
    """A random pattern."""
    kind = draw.randrange(6 if depth < 3 else 3)
    if kind == 3:
        return "|".join(drawn(draw, depth + 1) for _ in range(draw.randrange(1, 4)))
    if kind == 4:
        return f"({drawn(draw, depth + 1)}){draw.choice(QUANTIFIERS)}"
    if kind == 5:
        return drawn(draw, depth + 1) + f"(?:{drawn(draw, depth + 1)}|)"
    atoms = (draw.choice(ATOMS) for _ in range(draw.randrange(4)))
    return "".join(atom if atom in "^$" else atom + draw.choice(QUANTIFIERS) for atom in atoms)


def test_random_patterns_match_what_re_matches() -> None:
    draw, matched = random.Random(0), 0
    for _ in range(600):
        pattern = drawn(draw)
        for name in NAMES:
            expected = re.fullmatch(pattern, name) is not None
            assert matches(pattern, name) == expected, (pattern, name)
            matched += expected
    assert matched > 600


ENDLESS = [
    "(a+)+b",
    "(a|a)*b",
    "(a|aa)+b",
    "(.*)*x",
    "(((a*)*)*)*b",
    ".*" * 300 + "x",
    "a?" * 300 + "a" * 300,
    "(a|a)" * 150 + "b",
    "((a{1,9}){1,9}){1,9}b",
    "(|a)*b",
    "(){1000,}b",
]


@pytest.mark.parametrize("pattern", ENDLESS, ids=lambda pattern: pattern[:20])
def test_no_pattern_goes_back(pattern: str) -> None:
    """Python's `re` takes for ever on most of them, and so would this test."""
    assert not matches(pattern, "a" * 60)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "missing ): ("),
        ("a)", "unexpected ): a)"),
        ("*", "no argument for repetition operator: *"),
        ("a**", "bad repetition operator: **"),
        ("[b-a]", "invalid character class range: b-a"),
        ("[a", "missing ]: [a"),
        ("\\", "trailing"),
        (r"(a)\1", "invalid escape sequence: \\1"),
        ("(?=a)a", "invalid perl operator: (?="),
        ("(?<!a)a", "invalid"),
        ("\ud800", "surrogates not allowed"),
        ("a" * (MAX_LENGTH + 1), "at most 2000"),
        ("((a{100}){100}){100}", "invalid repetition size: {100}"),
        ("a{,2}", "write {0,n} for {,n}"),
    ],
)
def test_what_is_not_read_is_named(pattern: str, problem: str) -> None:
    with pytest.raises(PatternError) as caught:
        check([pattern])
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_the_patterns_of_a_file_are_limited_together() -> None:
    check(["a" * 999] * 200)
    for too_many in (["a" * 999] * 201, [""] * (MAX_TOTAL + 1)):
        with pytest.raises(PatternError, match="its patterns have more than 200000 characters together"):
            check(too_many)


def test_a_refusal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """RE2 writes its errors to stderr unless it is told not to."""
    with pytest.raises(PatternError):
        check(["("])
    assert capfd.readouterr() == ("", "")
