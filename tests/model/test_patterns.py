"""Patterns mean what they mean to Python's `re`, and no pattern takes long."""

from __future__ import annotations

import random
import re

import pytest

from gemma_edge.model.patterns import MAX_LENGTH, MAX_STEPS, PatternError, check, matches

NAMES = ("", "a", "b", "ab", "ba", "aab", "abab", "a.b", "a1b", "bbbb", "model.layers.11.mlp.up_proj", "a\tb", "é_B")
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
QUANTIFIERS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?", "??", "{0}"]


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
        ("(", "a bracket is not closed at character 1"),
        ("a)", "a bracket is closed that was not opened at character 1"),
        ("*", "this is not supported at character 0"),
        ("a**", "not supported at character 2"),
        ("a*+", "not supported"),
        ("a{", "not supported"),
        ("a{3,2}", "repeats from more to fewer"),
        ("[b-a]", "bad character range"),
        ("[a", "not supported"),
        ("\\", "not supported"),
        (r"(a)\1", "not supported"),
        (r"\ba", "not supported"),
        ("(?=a)a", "look-around, names and flags"),
        ("(?i)a", "look-around, names and flags"),
        ("(?P<n>a)", "look-around, names and flags"),
        ("(" * 200 + ")" * 200, "nested more than 50 deep"),
        ("a" * (MAX_LENGTH + 1), "at most 2000"),
        ("((a{100}){100}){100}", f"more than {MAX_STEPS} steps"),
        ("(){9999999999}", f"more than {MAX_STEPS} steps"),
    ],
)
def test_what_is_not_read_is_named(pattern: str, problem: str) -> None:
    with pytest.raises(PatternError) as caught:
        check([pattern])
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_the_patterns_of_a_file_are_limited_together() -> None:
    check(["a" * 1000] * 19)
    with pytest.raises(PatternError, match="its patterns have more than 20000 steps"):
        check(["a" * 1000] * 20)
    with pytest.raises(PatternError, match="its patterns have more than 20000 steps"):
        check([""] * (MAX_STEPS + 1))
