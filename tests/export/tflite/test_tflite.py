"""The TFLite model against transformers, and against the integers that it was made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.checkpoints import DEMO, SHAPES, hf_logits, hf_model, hf_windowed, relative_error
from support.lowered import lower_bundle, prefilled, some_ids
from support.rewinding import worst_error
from support.tflite_bundles import CHUNK, UNEVEN, assert_holds_integers, make_bundle, reference

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'gemma-edge[tflite]'")

import gemma_edge
from gemma_edge.bundle.accelerators import Accelerator
from gemma_edge.bundle.signature import Signature
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.backend import exporter
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import geometry
from gemma_edge.export.tflite.backend import LITERT as BACKEND
from gemma_edge.export.tflite.check import TFLite, check_tflite
from gemma_edge.export.tflite.packing import LITERT
from gemma_edge.export.tflite.seams import signatures
from gemma_edge.model.checkpoint import HEAD, TABLE, weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, open_weights
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import QuantConfig, Recipe, make_recipe
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.litert import TFLiteRuntime
from gemma_edge.runtimes.engines.state import State, read_state, write_state
from gemma_edge.user_cache import VARIABLE

FILE = BACKEND.file


def loaded(folder: Path, out: Path, recipe: Recipe, context: int, chunk: int = CHUNK) -> Runtime:
    return gemma_edge.load(make_bundle(folder, out, recipe, context, chunk)[1])


@pytest.mark.parametrize(("shape", "context"), [*((shape, 96) for shape in SHAPES), ("tiny", 24), ("gemma3_odd", 24)])
def test_float_model_equals_transformers_in_uneven_chunks_past_window_and_context(
    shape: str, context: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Every weight is random and different, so a weight in another's place shows. A context of 96 holds the text."""
    folder = checkpoint(shape)
    runtime, config = loaded(folder, tmp_path, make_recipe(32), context=context), open_weights(folder).config
    ids = some_ids(sum(UNEVEN), config.vocab_size)
    expected = hf_windowed(
        hf_model(folder), torch.tensor(ids), local_window=config.sliding_window, global_window=context
    )
    # other orders of additions, and exp and tanh by XNNPACK's approximations; the issue allows 1e-4 of the range
    assert relative_error(prefilled(runtime, ids, UNEVEN), expected[np.cumsum(UNEVEN) - 1]) < 1e-5
    assert (
        relative_error(torch.from_numpy(runtime.score(ids)), expected) < 1e-5
    )  # also: what was there before counts no more
    runtime.reset()
    assert relative_error(prefilled(runtime, ids, [82]), expected[-1:]) < 1e-5


def test_a_short_text_is_looked_at_alone(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same numbers as by the signatures for any text, and those take over at a quarter of the context."""
    folder = checkpoint()
    runtime = loaded(folder, tmp_path, make_recipe(32), context=96)
    assert isinstance(runtime, TFLiteRuntime)
    calls: list[tuple[str, int]] = []
    call = runtime._call

    def noted(
        signature: Signature, tokens: NDArray[np.int32], input_pos: NDArray[np.int32]
    ) -> NDArray[np.float32] | None:
        calls.append((signature.name, int(input_pos[0])))
        return call(signature, tokens, input_pos)

    monkeypatch.setattr(runtime, "_call", noted)
    config = open_weights(folder).config
    ids = some_ids(45, config.vocab_size)
    sizes = [17, *[1] * 11, 17]
    alone = prefilled(runtime, ids, sizes)
    assert calls[:2] == [("short_16", 0), ("short_1", 16)], "a prompt"
    assert calls[7:10] == [("short_1", 22), ("short_1", 23), ("decode", 24)], "the 24th token is the last one"
    assert calls[-2:] == [("prefill_16", 28), ("decode", 44)]
    monkeypatch.setattr(runtime, "_signatures", [each for each in runtime._signatures if each.longest is None])
    runtime.reset()
    assert relative_error(alone, prefilled(runtime, ids, sizes)) < 1e-6
    floats = LITERT.weights_bytes(config, dict.fromkeys(weight_shapes(config)))
    assert 0 < (runtime.bundle / FILE).stat().st_size - floats < 500_000  # seven small graphs


@pytest.mark.parametrize("chunk", [1, 5])
def test_small_chunks_give_the_same(chunk: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    runtime = loaded(folder, tmp_path, make_recipe(32), context=48, chunk=chunk)
    ids = some_ids(40, open_weights(folder).config.vocab_size)
    expected = hf_logits(hf_model(folder), torch.tensor(ids))
    assert relative_error(prefilled(runtime, ids, [7, 1, 32]), expected[[6, 7, 39]]) < 1e-5
    assert relative_error(torch.from_numpy(runtime.score(ids)), expected) < 1e-5


INTEGERS = {
    "int4-g32": ("tiny", make_recipe(4, group_size=32, method="rtn")),
    "int4-g64": ("tiny", make_recipe(4, group_size=64, method="rtn")),
    "int4-channel": ("tiny", make_recipe(4, group_size=0, method="rtn")),
    "int8": ("tiny", make_recipe(8, method="rtn")),
    "untied-int4": ("untied", make_recipe(4, group_size=32, method="rtn", table_bits=4)),
    "split": ("tiny", make_recipe(4, group_size=32, method="rtn", head_bits=4)),
    "untied-int8": ("untied", make_recipe(8, method="rtn")),
}


@pytest.fixture(scope="module", params=INTEGERS)
def integers(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantizedCheckpoint, Runtime]:
    out = tmp_path_factory.mktemp("integers")
    shape, recipe = INTEGERS[request.param]
    quantized, bundle = make_bundle(checkpoint(shape), out, recipe, context=16)
    return quantized, gemma_edge.load(bundle)


def test_model_holds_the_checkpoints_integers_bit_for_bit(integers: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = integers
    seen = assert_holds_integers(runtime.bundle / FILE, quantized, float_scales=False)
    assert (seen[0], seen[-1]) == (("EMBEDDING_LOOKUP", TABLE), ("FULLY_CONNECTED", quantized.config.head))
    assert len(seen) == len(weight_shapes(quantized.config)) + quantized.config.tie_word_embeddings


def test_integers_run_five_contexts_and_stay_with_torch(integers: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = integers
    ids = some_ids(5 * 16, quantized.config.vocab_size)
    expected = reference(quantized, ids, context=16)
    # activations are int8 here and float there, on random weights of standard deviation 1
    assert relative_error(torch.from_numpy(runtime.score(ids)), expected) < 0.15
    assert relative_error(torch.roll(expected, 1, dims=0), expected) > 0.5, "the bound would let wrong positions pass"
    runtime.reset()
    assert relative_error(prefilled(runtime, ids, [11, 1, 1, 20, 47]), expected[[10, 11, 12, 32, 79]]) < 0.15


def test_plan_knows_the_size(integers: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = integers
    size = (runtime.bundle / FILE).stat().st_size
    assert 0 < size - LITERT.weights_bytes(quantized.config, quantized.configs) < 300_000  # four small graphs


def test_a_file_that_holds_something_else_is_found_out(integers: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = integers
    path, config, cache = runtime.bundle / FILE, quantized.config, runtime.cache
    found = signatures(cache)
    check_tflite(path, LITERT, config, quantized.configs, cache, found)
    other = QuantConfig(bits=8, group_size=0) if quantized.configs[TABLE] != QuantConfig(8, 0) else None
    wrong = {**quantized.configs, TABLE: other}
    with pytest.raises(RuntimeError, match=TABLE):
        check_tflite(path, LITERT, config, wrong, cache, found)
    with pytest.raises(RuntimeError, match="prefill_16 takes"):
        check_tflite(path, LITERT, config, quantized.configs, geometry(config, 17, CHUNK, backend="tflite"), found)
    with pytest.raises(RuntimeError, match="0 signatures prefill_3"):
        check_tflite(path, LITERT, config, quantized.configs, cache, [Signature("prefill_3", "prefill", 3)])
    with pytest.raises(RuntimeError, match="decode has .*q_proj.* where .*FULLY_CONNECTED"):
        check_tflite(path, LITERT, config, quantized.configs, cache, [Signature("decode", "prefill", 1)])
    if not config.tie_word_embeddings:
        with pytest.raises(RuntimeError, match=f"{HEAD}.* where .*{TABLE}"):
            check_tflite(path, LITERT, replace(config, tie_word_embeddings=True), quantized.configs, cache, found)
    with pytest.raises(RuntimeError, match="decode looks at"):
        check_tflite(path, LITERT, config, quantized.configs, cache, [Signature("decode", "decode", 1, longest=8)])


@pytest.mark.parametrize(
    ("config", "columns", "float_bits", "said"),
    [
        (QuantConfig(8, 32), 64, 32, "8 bits in groups of 32"),
        (QuantConfig(4, 0), 49, 32, "rows of 49"),
        (None, 64, 16, "use bits 32"),
    ],
)
def test_what_litert_computes_wrongly_is_refused(
    config: QuantConfig | None, columns: int, float_bits: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        BACKEND.refuse_weight("model.layers.0.mlp.up_proj", config, columns, float_bits)


def test_a_damaged_model_is_one_line(
    integers: tuple[QuantizedCheckpoint, Runtime], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, runtime = integers
    for path in runtime.bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    gemma_edge.load(tmp_path).prefill([5, 6])
    assert capfd.readouterr().err == "", "LiteRT's own lines were there"
    (tmp_path / FILE).write_bytes(b"\0" * (tmp_path / FILE).stat().st_size)
    with pytest.raises(InputError, match="damaged"):
        gemma_edge.load(tmp_path)
    assert capfd.readouterr().err == "", "the library's own line stood before ours"


def test_the_second_start_reads_packed_weights(
    integers: tuple[QuantizedCheckpoint, Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runtime = integers
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    first = gemma_edge.load(runtime.bundle)
    (kept,) = tmp_path.glob("xnnpack/*/weights-*")
    before, expected = (kept.stat().st_ino, kept.stat().st_mtime_ns), first.prefill([5, 6, 7])
    second = gemma_edge.load(runtime.bundle)
    assert np.array_equal(second.prefill([5, 6, 7]), expected)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == before and kept.stat().st_size > 10_000
    kept.write_bytes(b"x" * 100)  # damaged: it is packed again
    assert np.array_equal(gemma_edge.load(runtime.bundle).prefill([5, 6, 7]), expected)
    monkeypatch.setenv(VARIABLE, str(kept))  # a file: no cache
    assert np.array_equal(gemma_edge.load(runtime.bundle).prefill([5, 6, 7]), expected)


def test_a_damaged_copy_of_a_bundle_does_not_change_what_the_good_one_computes(
    integers: tuple[QuantizedCheckpoint, Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights were kept under the hash that the manifest states: every later good copy used those of the damaged one."""
    _, runtime = integers
    monkeypatch.setenv(VARIABLE, str(tmp_path / "empty"))
    expected = gemma_edge.load(runtime.bundle).prefill([5, 6, 7])
    shutil.copytree(runtime.bundle, tmp_path / "damaged")
    path = tmp_path / "damaged" / FILE
    model, found = bytearray(path.read_bytes()), TFLite(path)
    use = next(use for use in found.uses(found.subgraph("decode")) if b"down_proj" in use.weight.name)
    model[model.find(bytes(found.content(use.weight)))] ^= 0x77
    path.write_bytes(model)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shared"))
    with pytest.raises(InputError, match=f"{FILE} was changed"):
        gemma_edge.load(tmp_path / "damaged")
    for _ in range(2):
        assert np.array_equal(gemma_edge.load(runtime.bundle).prefill([5, 6, 7]), expected)


def test_the_pipeline_makes_a_bundle_that_passes_the_gate(tmp_path: Path) -> None:
    options = ExportOptions(
        model=str(DEMO),
        out=tmp_path / "bundle",
        backend="tflite",
        quantization=QuantizeOptions(bits=8, method="rtn"),
        context=64,
    )
    done = pipeline.export(options)
    result = done.manifest.verification["tflite"]
    assert result.passed and result.past_wrap


@pytest.mark.parametrize(("context", "short"), [(16, set()), (48, {"short_1", "short_6"})])
def test_every_rewind_of_the_ring_is_exact(
    context: int, short: set[str], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Also back over the end of what counts as a short text."""
    runtime = loaded(checkpoint(), tmp_path, make_recipe(32), context=context, chunk=6)
    found = runtime.manifest.backends["tflite"].settings.signatures
    assert {each.name for each in found if each.name.startswith("short_")} == short
    worst, free, again = worst_error(runtime, some_ids(60, 320), range(0, 50, 3), range(1, 20))
    assert worst < 1e-3 and free > 50 and again > 50  # logits of a range of 60


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_a_saved_state_carries_the_cache_bit_for_bit(
    accelerator: Accelerator, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Past window and context, also after a rewind; LiteRT's states held the ids alone, and their text was fed again."""
    recipe = make_recipe(8, group_size=0, method="rtn")
    half = exporter("tflite", accelerator)
    bundle = lower_bundle(half, checkpoint(), tmp_path, recipe, 24, 7, accelerator=accelerator)[1]
    runtime, other = (gemma_edge.load(bundle, accelerator="cpu", threads=1) for _ in range(2))
    ids = some_ids(80, runtime.vocab_size)

    def fed(which: Runtime, end: int) -> State:
        which.reset()
        for part in (ids[:end], ids[end : end + 3]):
            if part:
                which.prefill(part)
        which.rewind(1)
        return which.snapshot()

    for end in (0, 5, 23, 61):
        runtime.score(ids[::-1])  # an earlier text, of which nothing may be left
        state = fed(runtime, end)
        write_state(tmp_path / "state", state, {})
        expected = [runtime.decode(token) for token in ids[:9]]
        other.prefill(ids[7:70])
        other.restore(read_state(tmp_path / "state")[0])
        assert np.array_equal([other.decode(token) for token in ids[:9]], expected)
        assert not other.stats.refed_tokens
        fresh = fed(gemma_edge.load(bundle, accelerator="cpu", threads=1), end)
        assert fresh.rows.keys() == state.rows.keys() and len(state.rows) == 10
        assert all(np.array_equal(fresh.rows[name], rows) for name, rows in state.rows.items())
