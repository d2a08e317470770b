"""The page of a sweep in a real browser: tables, three plots, nothing from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gemma-edge[sweep]'")

from support.browsing.browser import look_at, needs_browser

from gemma_edge.sweep.html import page
from gemma_edge.sweep.result import FAILED, Row, SweepResult, mark_front


def many() -> SweepResult:
    """24 points, one of them picked, one failed, one on phones; names may be anything."""
    rows = [
        Row(
            number,
            f"bits 4, group_size {number} <&>",
            {"bits": 4},
            bytes=5_000_000 + 10_000 * number,
            kl=0.3 / (1 + number % 7),
            top1=0.9,
            ppl=20.0,
            decode_tokens_per_s=50.0 - number,
        )
        for number in range(24)
    ]
    mark_front(rows)
    rows[6].picked = True
    rows[5].others_cores = 1.5
    rows[3].phones = {"S1": {"decode_tokens_per_s": 5.0, "throttled": True}, "S2": {"failure": "S2: it is gone"}}
    failed = Row(24, "bits 8", {"bits": 8}, FAILED, "lower: killed (3 attempts)")
    return SweepResult("m", [*rows, failed], {"lower": {"computed": 24, "reused": 1}}, 2, ["a"], "out/bundle")


@needs_browser
def test_the_page_is_seen_in_a_browser(tmp_path: Path) -> None:
    file = tmp_path / "sweep.html"
    file.write_text(page(many()))
    found = look_at(file, tmp_path)
    assert (found["console"], found["fetched"]) == ([], [])
    assert len(found["plots"]) == 3
    for plot in found["plots"]:
        assert plot["within"] and plot["width"] > 400 and plot["height"] > 60 and plot["drawn"] > 24, plot
        assert any("front" in text for text in plot["text"]) and any("picked" in text for text in plot["text"])


def test_the_page_holds_every_point_the_front_the_pick_phones_and_failures() -> None:
    text = page(many())
    assert text.count("bits 4, group_size ") == 24 + 2  # and twice more in the table of phones
    for part in ("PICK", "front", "throttled", "S2: it is gone", "lower: killed (3 attempts)", "&lt;&amp;&gt;"):
        assert part in text, part
    assert "Other programs kept up to 1.5 cores busy" in text
    assert "24 done and 1 taken over" in text and "2 attempts were repeated" in text and "out/bundle" in text


def test_a_sweep_in_which_nothing_was_measured_has_a_page_too() -> None:
    result = SweepResult("m", [Row(0, "bits 8", {}, FAILED, "no")], {}, 0, [])
    assert "<svg" not in page(result) and "bits 8" in page(result)
