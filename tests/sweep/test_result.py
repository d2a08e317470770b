"""The front, the pick, and the refusal that names the nearest point."""

from __future__ import annotations

import csv
import io
import json

import pytest

from gemma_edge.errors import InputError
from gemma_edge.sweep.options import Limits
from gemma_edge.sweep.result import FAILED, Row, SweepResult, candidates, mark_front, to_csv, to_json


def row(name: str, size: int, kl: float | None, decode: float | None = None, **more: object) -> Row:
    made = Row(0, name, {"bits": 4}, bytes=size, weights_bytes=size, kl=kl, decode_tokens_per_s=decode)
    for key, value in more.items():
        setattr(made, key, value)
    return made


ROWS = [row("small", 10, 0.3, 5.0), row("good", 20, 0.1, 4.0), row("beaten", 21, 0.2, 4.0), row("fast", 30, 0.4, 9.0)]


def test_the_front_holds_the_points_that_no_other_beats() -> None:
    rows = [*ROWS, row("failed", 1, 0.0, 99.0, state=FAILED), row("untimed", 5, 0.01)]
    mark_front(rows)
    assert [one.name for one in rows if one.front] == ["small", "good", "fast"]


def test_without_benchmarks_the_front_is_that_of_size_and_kl() -> None:
    rows = [row("small", 10, 0.3), row("good", 20, 0.1), row("beaten", 20, 0.3)]
    mark_front(rows)
    assert [one.name for one in rows if one.front] == ["small", "good"]


@pytest.mark.parametrize(
    ("pick", "limits", "expected"),
    [
        ("kl", Limits(), ["good", "beaten", "small", "fast"]),
        ("size", Limits(max_kl=0.25), ["good", "beaten"]),
        ("decode", Limits(max_size=25), ["small", "good", "beaten"]),
        ("size", Limits(min_decode=6), ["fast"]),
    ],
)
def test_the_pick_is_the_best_within_the_limits(pick: str, limits: Limits, expected: list[str]) -> None:
    assert [one.name for one in candidates(ROWS, limits, pick)] == expected


def test_limits_that_no_point_keeps_name_the_nearest_one() -> None:
    with pytest.raises(InputError) as caught:
        candidates(ROWS, Limits(max_kl=0.05, max_size=15), "kl")
    assert str(caught.value) == (
        "no point keeps to max_size 15 and max_kl 0.05; the nearest is good: weights_bytes 20, kl 0.1"
    )


def test_csv_and_json_hold_every_row() -> None:
    rows = [*ROWS, row("failed", 1, None, state=FAILED, reason="lower: no, it cannot")]
    lines = list(csv.DictReader(io.StringIO(to_csv(rows, ["bits"]))))
    assert [(line["option_bits"], line["name"], line["kl"]) for line in lines][1::3] == [
        *(("4", "good", "0.1"), ("4", "failed", "")),
    ]
    assert lines[-1]["reason"] == "lower: no, it cannot"
    document = json.loads(to_json(SweepResult("m", rows, {}, 0, [])))
    assert [one["name"] for one in document["rows"]] == [one.name for one in rows]
