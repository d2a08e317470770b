"""The beginning of a text that stays visible in the global layers: against transformers with that mask, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import DEMO, ROOT, HFModel, hf_model, hf_windowed, kl_divergence, relative_error
from support.lowered import lower_bundle, some_ids

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export.backend import exporter
from gemma_edge.export.gate.limits import limits_for
from gemma_edge.quantize.recipe import make_recipe
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.state import read_state, write_state
from gemma_edge.text.tokenizer import Tokenizer

CONTEXT, CHUNK, KEPT = 24, 7, 9
LENGTH = 20 * CONTEXT
# ExecuTorch takes most of the time, so it has one shape
CASES = [("onnx", "starts_global"), ("onnx", "gemma3_odd"), ("executorch", "starts_global"), ("tflite", "gemma3_odd")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    backend, shape = request.param
    return backend, shape


@pytest.fixture(scope="module")
def reference(case: tuple[str, str], checkpoint: Callable[..., Path]) -> HFModel:
    return hf_model(checkpoint(case[1]))


@pytest.fixture(scope="module")
def bundle(case: tuple[str, str], checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend, shape = case
    out = tmp_path_factory.mktemp(backend)
    folder, recipe = checkpoint(shape), make_recipe(32)
    return lower_bundle(exporter(backend), folder, out, recipe, CONTEXT, CHUNK, pinned=KEPT)[1]


@pytest.fixture
def runtime(bundle: Path) -> Runtime:
    return gemma_edge.load(bundle, threads=1)


def expected(reference: HFModel, runtime: Runtime, ids: list[int], pinned: int) -> torch.Tensor:
    """Logits (T, V) of transformers."""
    local = runtime.manifest.config.sliding_window
    return hf_windowed(reference, torch.tensor(ids), local_window=local, global_window=CONTEXT, pinned=pinned)


@pytest.mark.parametrize("pinned", [0, 1, 5, KEPT])
def test_twenty_contexts_in_uneven_chunks(runtime: Runtime, reference: HFModel, pinned: int) -> None:
    ids = some_ids(LENGTH, runtime.vocab_size)
    right = expected(reference, runtime, ids, pinned)
    runtime.pin(pinned)
    rows, at = [], 0
    for size in cycle([4, 1, CHUNK, 2, 1, 1, CHUNK, 3]):
        if at >= LENGTH:
            break
        rows.append(runtime.decode_many(ids[at : at + size]))
        at += size
    assert relative_error(torch.from_numpy(np.concatenate(rows)), right) <= 1e-4


def test_pinning_makes_a_difference(runtime: Runtime, reference: HFModel) -> None:
    """Else the other tests could not fail."""
    ids = some_ids(3 * CONTEXT, runtime.vocab_size)
    assert relative_error(expected(reference, runtime, ids, 5), expected(reference, runtime, ids, 0)) > 1e-2


def test_prompts_and_single_tokens_in_turn(runtime: Runtime, reference: HFModel) -> None:
    ids = some_ids(6 * CONTEXT, runtime.vocab_size)
    right = expected(reference, runtime, ids, KEPT)
    runtime.pin(KEPT)
    found, at = {}, 0
    for size in cycle([30, 1, 1, 45, 1, 8]):  # the first prompt is longer than the context
        if at + size > len(ids):
            break
        logits = runtime.prefill(ids[at : at + size]) if size > 1 else runtime.decode(ids[at])
        at += size
        found[at - 1] = torch.from_numpy(logits)
    assert relative_error(torch.stack(list(found.values())), right[list(found)]) <= 1e-4


def test_every_rewind_is_exact(runtime: Runtime, reference: HFModel) -> None:
    ids = some_ids(4 * CONTEXT, runtime.vocab_size)
    right = expected(reference, runtime, ids, 5)
    runtime.pin(5)
    for end in range(3, len(ids) - 1, 11):
        for count in {1, 3, end // 2, end} - {0}:
            runtime.align([ids[0] ^ 1, 3])  # another text
            runtime.reset()
            runtime.prefill(ids[:end])
            runtime.rewind(count)
            found = torch.from_numpy(runtime.decode_many(ids[end - count : end + 1]))
            assert relative_error(found, right[end - count : end + 1]) <= 1e-4, (end, count)


def test_a_rewind_beyond_the_remembered_ids_feeds_the_pinned_ones_again(runtime: Runtime, reference: HFModel) -> None:
    ids = some_ids(15 * CONTEXT, runtime.vocab_size)
    right = expected(reference, runtime, ids, 5)
    runtime._max_remembered = runtime.reach + CONTEXT  # else thousands of tokens would be needed
    runtime.pin(5)
    runtime.prefill(ids[:1])
    for at in range(1, len(ids) - 1, 5):
        runtime.prefill(ids[at : min(at + 5, len(ids) - 1)])
    assert len(runtime.ids) < len(ids) - 1
    runtime.rewind(20)
    found = torch.from_numpy(runtime.decode_many(ids[-21:]))
    assert relative_error(found, right[-21:]) <= 1e-4


def test_a_saved_state_carries_it(bundle: Path, runtime: Runtime, tmp_path: Path) -> None:
    ids = some_ids(6 * CONTEXT, runtime.vocab_size)
    for length in (3, CONTEXT - 1, CONTEXT + 9, 5 * CONTEXT):
        runtime.reset()
        runtime.pin(5)
        runtime.prefill(ids[:length])
        write_state(tmp_path / "state", runtime.snapshot(), {})
        other = gemma_edge.load(bundle, threads=1)
        other.restore(read_state(tmp_path / "state")[0])
        assert other.pinned == 5
        for token in ids[length : length + CONTEXT]:
            assert np.array_equal(other.decode(token), runtime.decode(token))


def test_a_text_that_was_restored_without_a_pin_may_be_pinned_later(
    bundle: Path, runtime: Runtime, tmp_path: Path
) -> None:
    ids = some_ids(15 * CONTEXT, runtime.vocab_size)
    runtime.prefill(ids[:11])
    write_state(tmp_path / "state", runtime.snapshot(), {})
    other = gemma_edge.load(bundle, threads=1)
    other.restore(read_state(tmp_path / "state")[0])
    other._max_remembered = other.reach + CONTEXT
    other.pin(5)
    for at in range(11, len(ids), 5):
        other.prefill(ids[at : at + 5])
    assert other.align([ids[0] ^ 1, *ids[1:], 7]) == 0


def test_a_text_that_begins_otherwise_is_not_taken_for_the_same(runtime: Runtime) -> None:
    ids = some_ids(15 * CONTEXT, runtime.vocab_size)
    runtime._max_remembered = runtime.reach + CONTEXT
    runtime.pin(5)
    for at in range(0, len(ids), 5):
        runtime.prefill(ids[at : at + 5])
    assert runtime.align([ids[0] ^ 1, *ids[1:], 7]) == 0
    assert runtime.position == 0


def test_another_number_past_the_context_begins_anew(runtime: Runtime) -> None:
    ids = some_ids(2 * CONTEXT, runtime.vocab_size)
    runtime.prefill(ids[:CONTEXT])
    runtime.pin(4)
    assert runtime.position == CONTEXT
    runtime.prefill(ids[CONTEXT:])
    runtime.pin(4)
    assert runtime.position == 2 * CONTEXT
    runtime.pin(3)
    assert runtime.position == 0


@pytest.mark.parametrize("count", [-1, KEPT + 1])
def test_more_than_the_bundle_keeps_is_refused(runtime: Runtime, count: int) -> None:
    with pytest.raises(InputError, match=f"cannot pin {count} tokens: this bundle keeps at most {KEPT}"):
        runtime.pin(count)


def test_quantized_it_is_within_the_gates_limits(talker: Runtime) -> None:
    """The demo in 4 bits against the original with that mask, over five contexts of text."""
    if not talker.cache.pinned:
        pytest.skip("this backend pins nothing")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = Tokenizer(talker.bundle, talker.manifest).encode(text)[: 5 * talker.cache.context]
    talker.pin(talker.cache.pinned)
    found = torch.from_numpy(talker.decode_many(ids))
    window = talker.manifest.config.sliding_window
    sizes = {"local_window": window, "global_window": talker.cache.context}
    right = hf_windowed(hf_model(DEMO), torch.tensor(ids), pinned=talker.pinned, **sizes)
    assert kl_divergence(found, right) <= 0.1 < limits_for([4, 8], "float32").kl
