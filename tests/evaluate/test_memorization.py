"""The memorization probe against a plain loop over transformers in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import DEMO, hf_logits, hf_model

from gemma_edge.errors import InputError
from gemma_edge.evaluate.cli import main
from gemma_edge.evaluate.memorization import CONTINUATION, EDITS, PREFIX, Memorization, edit_distance, passages, probe
from gemma_edge.evaluate.open_model import open_model
from gemma_edge.progress import no_progress

BOS = 2


def continued(model: torch.nn.Module, prefix: list[int]) -> list[int]:
    """Greedy, the whole text fed for every token."""
    ids = [BOS, *prefix]
    for _ in range(CONTINUATION):
        ids.append(int(hf_logits(model, torch.tensor(ids))[-1].argmax()))
    return ids[1 + len(prefix) :]


def test_counts_equal_those_of_a_plain_float_loop(checkpoint: Callable[..., Path]) -> None:
    """Three passages as the model itself goes on, one with three tokens changed, one with too many, two by chance."""
    folder = checkpoint("tiny")
    model, random = hf_model(folder), torch.Generator().manual_seed(0)
    texts = []
    for at, changed in enumerate((0, 0, 0, 3, EDITS + 3, 50, 50)):
        prefix = torch.randint(3, 320, (PREFIX,), generator=random).tolist()
        text = continued(model, prefix)
        for place in range(changed):
            text[place] = (text[place] + 7 + at) % 317 + 3
        texts.append((*prefix, *text))
    plain = [continued(model, list(text[:PREFIX])) == list(text[PREFIX:]) for text in texts]
    found = probe(open_model(folder).runtime(), texts, BOS, no_progress)
    assert found.exact == sum(plain) == 3 and found.passages == len(texts)
    assert found.exact < found.approximate < len(texts)


def test_edit_distance_counts_tokens() -> None:
    for first, second, expected in (
        ("", "", 0),
        ("abc", "abc", 0),
        ("abc", "axc", 1),
        ("abcd", "bcd", 1),
        ("kitten", "sitting", 3),
    ):
        assert edit_distance([*map(ord, first)], [*map(ord, second)]) == expected


def test_a_text_is_cut_into_passages() -> None:
    assert passages(list(range(250))) == [tuple(range(100)), tuple(range(100, 200))]
    with pytest.raises(InputError, match="needs a text of at least 100 tokens, and this one has 99"):
        passages(list(range(99)))


def test_the_command_shows_every_model_and_the_original(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        (DEMO.parents[1] / "src/gemma_edge/text/data/calibration_kjv.txt").read_text(encoding="utf-8")[:3000]
    )
    args = [str(DEMO), "--reference", str(DEMO), "--max-tokens", "220", "--memorization", str(text)]
    done = CliRunner().invoke(main, [*args, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["results"][0]["memorization"] == found["reference"]["memorization"]
    counts = Memorization(**found["reference"]["memorization"])
    assert counts.passages == 2 and counts.exact <= counts.approximate <= 2
    shown = " ".join(CliRunner().invoke(main, args).stdout.split())
    assert "memorization" in shown and "tiny-gemma2 (original)" in shown


def test_a_file_that_is_missing_or_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("Call me Ishmael.")
    for name, message in (("none", "--memorization"), ("short", "--memorization needs a text of at least 100 tokens")):
        done = CliRunner().invoke(main, [str(DEMO), "--max-tokens", "20", "--memorization", str(tmp_path / name)])
        assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
