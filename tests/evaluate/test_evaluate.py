"""gemma-eval's numbers against transformers and plain numpy on the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.checkpoints import DEMO, TEXTS, hf_holding, hf_logits, hf_model
from support.toys import TOY_RECIPE, write_toy_bundle
from transformers import AutoTokenizer

import gemma_edge
from gemma_edge.bundle.entries import CalibrationEntry, LayerError
from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.errors import InputError
from gemma_edge.evaluate import folder_model as scorer
from gemma_edge.evaluate.evaluate import evaluate
from gemma_edge.evaluate.open_model import open_model
from gemma_edge.evaluate.options import EvaluationOptions
from gemma_edge.evaluate.prepare import prepare
from gemma_edge.evaluate.result import Evaluation
from gemma_edge.export.api import Export
from gemma_edge.model.checkpoint import norm_names, weight_shapes
from gemma_edge.progress import no_progress
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.text import corpus
from gemma_edge.text.windows import PROTOCOLS, Window, cut

BOS = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = TEXTS / "heldout_austen.txt"
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(source.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def hf_ids(text: Path, count: int) -> list[int]:
    """The text's first tokens by transformers' own tokenizer, without BOS."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    ids: list[int] = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return ids[:count]


def run(*models: Path, **options: Any) -> Evaluation:
    return evaluate(EvaluationOptions(models=models, **options))


def log_p(logits: Any) -> NDArray[np.float64]:
    """(T, V) log probabilities in double precision."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    found: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return found


def kl_rows(reference: Any, found: Any) -> NDArray[np.float64]:
    """(T,) KL(reference || found)."""
    p, q = log_p(reference), log_p(found)
    rows: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return rows


def test_hf_perplexity_is_transformers_own_loss_on_the_same_windows(text: Path) -> None:
    model, ids = hf_model(DEMO), hf_ids(text, 150)
    loss, scored = 0.0, 0
    for start in range(0, len(ids), 63):  # 64 with BOS; the last one is shorter
        window = torch.tensor([[BOS, *ids[start : start + 63]]])
        with torch.no_grad():
            mean = model(window, labels=window).loss
        loss += float(mean) * (window.shape[1] - 1)
        scored += window.shape[1] - 1
    (result,) = run(DEMO, texts=(text,), window=64, max_tokens=150).results
    assert scored == 150 == result.tokens
    assert result.ppl == pytest.approx(np.exp(loss / scored), rel=1e-5)
    assert result.kl is None and result.top1 is None and result.ppl_change is None and result.kl_by_position == []


def test_llama_cpp_perplexity_scores_the_second_half_of_whole_windows(text: Path) -> None:
    """By hand from perplexity.cpp: positions n_ctx/2 .. n_ctx-2 of windows whose first token is overwritten by BOS."""
    model, stream = hf_model(DEMO), [BOS, *hf_ids(text, 150)]
    nll, scored = 0.0, 0
    for start in (0, 64):  # what is left after 128 of 151 tokens fills no window
        window = [BOS, *stream[start + 1 : start + 64]]
        rows = log_p(hf_logits(model, torch.tensor(window)))
        for position in range(32, 63):
            nll -= rows[position, window[position + 1]]
            scored += 1
    (result,) = run(DEMO, texts=(text,), protocol="llama.cpp", window=64, max_tokens=150).results
    assert result.tokens == scored == 2 * 31
    assert result.ppl == pytest.approx(np.exp(nll / scored), rel=1e-5)


@pytest.mark.parametrize(
    ("protocol", "count", "expected"),
    [
        ("hf", 8, [([BOS, 10, 11, 12, 13, 14], 0), ([BOS, 15, 16, 17], 0)]),
        ("hf", 1, [([BOS, 10], 0)]),
        ("llama.cpp", 12, [([BOS, 10, 11, 12, 13, 14], 3), ([BOS, 16, 17, 18, 19, 20], 3)]),
        ("llama.cpp", 5, [([BOS, 10, 11, 12, 13, 14], 3)]),
    ],
)
def test_windows_by_hand(protocol: str, count: int, expected: list[tuple[list[int], int]]) -> None:
    found = cut(range(10, 10 + count), PROTOCOLS[protocol], bos=BOS, window=6)
    assert found == [Window(tuple(ids), first) for ids, first in expected]


@pytest.mark.parametrize(("protocol", "count"), [("hf", 0), ("llama.cpp", 4)])
def test_a_text_below_one_window_is_refused(protocol: str, count: int) -> None:
    with pytest.raises(InputError, match=f"{count} tokens is too short"):
        cut(range(count), PROTOCOLS[protocol], bos=BOS, window=6)


def test_a_folder_has_no_distance_from_itself(text: Path) -> None:
    done = run(DEMO, reference=DEMO, texts=(text,), window=40, max_tokens=100)
    (result,) = done.results
    assert (result.kl, result.top1, result.ppl_change) == (0.0, 1.0, 0.0)
    assert set(result.layers) == {0.0} and len(result.layers) == 6
    assert done.reference is not None and done.reference.ppl == result.ppl


def test_kl_and_top1_of_a_bundle_are_numpys_from_transformers_logits(demo: Export, text: Path) -> None:
    """One window of 33 tokens: every stretch of the plot by position is one position."""
    ids = [BOS, *hf_ids(text, 32)]
    reference = hf_logits(hf_model(DEMO), torch.tensor(ids[:-1])).numpy()
    found = gemma_edge.load(demo.bundle).score(ids[:-1])
    expected = kl_rows(reference, found)
    done = run(demo.bundle, reference=DEMO, texts=(text,), window=33, max_tokens=32)
    (result,) = done.results
    assert result.tokens == 32
    assert result.kl == pytest.approx(expected.mean(), rel=1e-3) and expected.mean() > 1e-4
    assert result.top1 == (reference.argmax(-1) == found.argmax(-1)).mean()
    targets = np.array(ids[1:])
    ppl, original = (np.exp(-log_p(rows)[np.arange(32), targets].mean()) for rows in (found, reference))
    assert result.ppl == pytest.approx(ppl, rel=1e-5)
    assert result.ppl_change == pytest.approx(ppl / original - 1, abs=1e-5)
    assert [(part["first"], part["last"]) for part in result.kl_by_position] == [(i, i) for i in range(32)]
    np.testing.assert_allclose([part["kl"] for part in result.kl_by_position], expected, rtol=1e-2, atol=1e-6)


def test_stretches_by_position_hold_every_scored_position_of_all_windows_once(demo: Export, text: Path) -> None:
    (result,) = run(
        demo.bundle, reference=DEMO, texts=(text,), protocol="llama.cpp", window=200, max_tokens=420
    ).results
    parts = result.kl_by_position
    assert len(parts) == 32 and parts[0]["first"] == 100 and parts[-1]["last"] == 198
    assert all(after["first"] == before["last"] + 1 for before, after in zip(parts, parts[1:], strict=False))
    # each position was scored in both windows, so that the stretches' means weigh as much as they are long
    total = sum(part["kl"] * (part["last"] - part["first"] + 1) for part in parts)
    assert result.tokens == 2 * 99 and total / 99 == pytest.approx(result.kl, rel=1e-6)


def test_bundle_and_folder_of_the_same_integers_differ_by_the_int8_activations_only(demo: Export, text: Path) -> None:
    checkpoint = demo.bundle.parent / "checkpoint"
    (between,) = run(demo.bundle, reference=checkpoint, texts=(text,), max_tokens=300).results
    (folder,) = run(checkpoint, reference=DEMO, texts=(text,), max_tokens=300).results
    assert between.kl is not None and folder.kl is not None
    assert 0 < between.kl < 1e-3 < 2e-3 < folder.kl
    assert between.bits_per_weight == pytest.approx(folder.bits_per_weight)


def test_a_quantized_folder_counts_with_the_integers_of_its_table(demo: Export, text: Path) -> None:
    """transformers reads the plain table from it; ours must not."""
    folder = demo.bundle.parent / "checkpoint"
    quantized = QuantizedCheckpoint.open(folder)
    weights = {f"{name}.weight": quantized.matrix(name) for name in weight_shapes(quantized.config)}
    weights |= {name: quantized.vector(name) for name in norm_names(quantized.config)}
    ids = torch.tensor([BOS, *hf_ids(text, 60)])
    rows = log_p(hf_logits(hf_holding(DEMO, weights), ids))[:-1]
    expected = float(np.exp(-rows[np.arange(60), ids[1:].numpy()].mean()))
    (result,) = run(folder, texts=(text,), max_tokens=60).results
    assert result.ppl == pytest.approx(expected, rel=1e-5)


def test_layer_errors_are_those_of_transformers_hidden_states(demo: Export, text: Path) -> None:
    folder = demo.bundle.parent / "checkpoint"
    quantized = QuantizedCheckpoint.open(folder)
    weights = {f"{name}.weight": quantized.matrix(name) for name in weight_shapes(quantized.config)}
    weights |= {name: quantized.vector(name) for name in norm_names(quantized.config)}
    ids = torch.tensor([[BOS, *hf_ids(text, 100)]])
    with torch.no_grad():
        ours, theirs = (
            model(ids, output_hidden_states=True).hidden_states for model in (hf_holding(DEMO, weights), hf_model(DEMO))
        )
    (result,) = run(folder, reference=DEMO, texts=(text,), window=101, max_tokens=100).results
    # transformers' first entry is the embedding, and its last one is normed
    expected = [
        float(((x - y).norm(dim=-1) / y.norm(dim=-1)).mean()) for x, y in zip(ours[1:-1], theirs[1:-1], strict=True)
    ]
    assert len(result.layers) == 6
    assert result.layers[:-1] == pytest.approx(expected, rel=1e-3)


def test_layer_errors_of_a_bundle_are_what_calibration_recorded(tmp_path: Path) -> None:
    layers = (LayerError(layer=1, relative_error=0.5), LayerError(layer=0, relative_error=0.25))
    recipe = replace(TOY_RECIPE, calibration=CalibrationEntry(layers=layers))
    bundle = write_toy_bundle(tmp_path / "toy", recipe=recipe)
    assert open_model(bundle).layer_errors(None, [2], no_progress) == [0.25, 0.5]


def test_windows_that_do_not_fit_together_in_memory_give_the_same_numbers(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = run(DEMO, texts=(text,), window=30, max_tokens=100).results
    monkeypatch.setattr(scorer, "GROUP_TOKENS", 60)
    (result,) = run(DEMO, texts=(text,), window=30, max_tokens=100).results
    assert result.ppl == pytest.approx(expected.ppl, rel=1e-6)


def test_progress_ends_at_its_total(demo: Export, text: Path) -> None:
    bars: list[list[int]] = []

    @contextmanager
    def record(what: str, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        bars.append([total, sum(done)])

    for protocol in PROTOCOLS:
        options = EvaluationOptions(
            models=(demo.bundle, DEMO), reference=DEMO, texts=(text,), protocol=protocol, window=300, max_tokens=700
        )
        evaluate(options, record)
    assert len(bars) == 8 and all(total == done > 0 for total, done in bars)


def test_limit_is_shared_by_the_texts_and_windows_never_span_two(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Call me Ishmael. " * 200)
    job = prepare(EvaluationOptions(models=(DEMO,), texts=(text, other), window=50, max_tokens=81))
    assert [len(window.ids) - 1 for window in job.windows] == [40, 40]
    assert list(job.windows[0].ids) == [BOS, *hf_ids(text, 40)]
    assert list(job.windows[1].ids) == [BOS, *hf_ids(other, 40)]


def test_zero_takes_the_whole_text(text: Path) -> None:
    job = prepare(EvaluationOptions(models=(DEMO,), texts=(text,), max_tokens=0))
    assert sum(window.scored for window in job.windows) == len(hf_ids(text, 10**9))


def test_a_text_of_long_tokens_still_fills_the_limit(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of a text that is tokenized first may not hold enough of them."""
    monkeypatch.setattr(corpus, "CHARACTERS_PER_TOKEN", 1)
    job = prepare(EvaluationOptions(models=(DEMO,), texts=(text,), max_tokens=300))
    assert [token for window in job.windows for token in window.ids[1:]] == hf_ids(text, 300)


def test_a_bundle_without_tokenizer_is_fed_by_the_references(demo: Export, tmp_path: Path, text: Path) -> None:
    bare = Path(shutil.copytree(demo.bundle, tmp_path / "bare"))
    manifest = json.loads((bare / MANIFEST).read_text())
    (bare / MANIFEST).write_text(json.dumps({**manifest, "tokenizer": False}))
    expected, result = run(demo.bundle, bare, reference=DEMO, texts=(text,), max_tokens=100).results
    assert result.kl == expected.kl and result.ppl == expected.ppl


def test_reference_logits_that_do_not_fit_the_disk_are_refused(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"need 0\.00 GB in .*lower max_tokens, or name another disk in TMPDIR"):
        run(DEMO, reference=DEMO, texts=(text,), max_tokens=100)


@pytest.mark.parametrize(
    ("name", "tuned"), [("gemma-2-2b-it", True), ("gemma-2-2b-it-int4-g32-android", True), ("my-italian", False)]
)
def test_instruction_tuned_models_are_told_apart_by_name(name: str, tuned: bool, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / name)
    done = run(bundle, max_tokens=20)
    assert bool(done.notes) == tuned
    assert all("judge by KL" in note and name in note for note in done.notes)
