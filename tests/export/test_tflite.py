"""The TFLite model against transformers, and against the integers that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, SHAPES, hf_logits, hf_model, relative_error, write_manifest
from rewinding import worst_error

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'gemma-edge[tflite]'")

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export import pipeline
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import geometry
from gemma_edge.export.tflite.backend import FILE, lower, signatures
from gemma_edge.export.tflite.check import TFLite, check_tflite
from gemma_edge.export.tflite.packing import refuse_weight, weights_bytes
from gemma_edge.model.checkpoint import TABLE, weight_shapes
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.quantize.recipe import QuantConfig, Recipe, make_recipe
from gemma_edge.quantize.store import QuantizedCheckpoint, open_weights, write_quantized
from gemma_edge.runtimes.base import Runtime
from gemma_edge.user_cache import VARIABLE

CHUNK = 16  # prefill signatures of 16 and 2 tokens; a ring of 8 + 15 slots in local layers
UNEVEN = [7, 3, 1, 7, 2, *[1] * 12, 5, 6, 30, 9]  # 82 tokens, the 30 in several calls; chunks begin at any slot


def make_bundle(
    folder: Path, out: Path, recipe: Recipe, context: int, chunk: int = CHUNK
) -> tuple[QuantizedCheckpoint, Runtime]:
    source = open_weights(folder)
    quantized = write_quantized(source, recipe, out / "checkpoint")
    bundle = out / "bundle"
    bundle.mkdir()
    cache = geometry(source.config, context, chunk)
    entry = lower(quantized, cache, bundle, float_bits=recipe.float_bits)
    write_manifest(bundle, source.config, recipe, cache, {"tflite": entry})
    return quantized, gemma_edge.load(bundle)


def some_ids(count: int, vocab_size: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(3, vocab_size, count)]


def prefilled(runtime: Runtime, ids: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits after each chunk."""
    ends = np.cumsum(chunks)
    rows = [runtime.prefill(ids[end - size : end]) for end, size in zip(ends, chunks, strict=True)]
    return torch.from_numpy(np.stack(rows))


def reference(quantized: QuantizedCheckpoint, ids: list[int], context: int) -> torch.Tensor:
    """Logits (T, V) of the same integers in torch, with float activations."""
    model, cache = quantized.load(), RingCache(quantized.config, context=context, chunk=CHUNK)
    with torch.no_grad():
        rows = [
            model(torch.tensor([ids[start : start + CHUNK]]), torch.tensor([start]), cache)[0]
            for start in range(0, len(ids), CHUNK)
        ]
    return torch.cat(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_float_model_equals_transformers_in_uneven_chunks_past_the_window(
    shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Every weight is random and different, so a weight in another's place shows."""
    folder = checkpoint(shape)
    _, runtime = make_bundle(folder, tmp_path, make_recipe(32), context=96)
    ids = some_ids(sum(UNEVEN), open_weights(folder).config.vocab_size)
    expected = hf_logits(hf_model(folder), torch.tensor(ids))
    # other orders of additions, and exp and tanh by XNNPACK's approximations; the issue allows 1e-4 of the range
    assert relative_error(prefilled(runtime, ids, UNEVEN), expected[np.cumsum(UNEVEN) - 1]) < 1e-5
    assert (
        relative_error(torch.from_numpy(runtime.score(ids)), expected) < 1e-5
    )  # also: what was there before counts no more
    runtime.reset()
    assert relative_error(prefilled(runtime, ids, [82]), expected[-1:]) < 1e-5


@pytest.mark.parametrize("chunk", [1, 5])
def test_small_chunks_give_the_same(chunk: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    _, runtime = make_bundle(folder, tmp_path, make_recipe(32), context=48, chunk=chunk)
    ids = some_ids(40, open_weights(folder).config.vocab_size)
    expected = hf_logits(hf_model(folder), torch.tensor(ids))
    assert relative_error(prefilled(runtime, ids, [7, 1, 32]), expected[[6, 7, 39]]) < 1e-5
    assert relative_error(torch.from_numpy(runtime.score(ids)), expected) < 1e-5


INTEGERS = {
    "int4-g32": make_recipe(4, group_size=32, method="rtn"),
    "int4-g64": make_recipe(4, group_size=64, method="rtn"),
    "int4-channel": make_recipe(4, group_size=0, method="rtn"),
    "int8": make_recipe(8, method="rtn"),
}


@pytest.fixture(scope="module", params=INTEGERS)
def integers(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantizedCheckpoint, Runtime]:
    return make_bundle(checkpoint(), tmp_path_factory.mktemp("integers"), INTEGERS[request.param], context=16)


def test_model_holds_the_checkpoints_integers_bit_for_bit(integers: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = integers
    found = TFLite(runtime.bundle / FILE)
    uses = list(found.uses(found.subgraph("decode")))
    assert [use.operator for use in uses if use.weight.name.decode() == TABLE] == [
        "EMBEDDING_LOOKUP",
        "FULLY_CONNECTED",
    ]
    for use in uses:
        name = use.weight.name.decode()
        stored = quantized.quantized(name, 0, weight_shapes(quantized.config)[name][0])
        raw = np.frombuffer(found.content(use.weight), np.int8)
        if stored.config.bits == 4:  # two's complement, the even column in the low nibble
            raw = np.stack([raw << 4 >> 4, raw >> 4], axis=1)
        assert np.array_equal(raw.reshape(stored.codes.shape), stored.codes.numpy()), name
        if use.scales is None:
            scale = use.weight.quantization.scale
        else:
            scale = np.frombuffer(found.content(use.scales), np.float16)
        assert np.array_equal(scale.reshape(stored.scale.shape), stored.scale.float().numpy()), name


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
    assert 0 < size - weights_bytes(quantized.config, quantized.configs) < 300_000  # four small graphs


def test_a_file_that_holds_something_else_is_found_out(integers: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = integers
    path, config, cache = runtime.bundle / FILE, quantized.config, runtime.cache
    found = signatures(CHUNK)
    check_tflite(path, config, quantized.configs, cache, found)
    other = QuantConfig(bits=8, group_size=0) if quantized.configs[TABLE] != QuantConfig(8, 0) else None
    wrong = {**quantized.configs, TABLE: other}
    with pytest.raises(RuntimeError, match=TABLE):
        check_tflite(path, config, wrong, cache, found)
    with pytest.raises(RuntimeError, match="prefill_16 takes"):
        check_tflite(path, config, quantized.configs, geometry(config, 17, CHUNK), found)
    with pytest.raises(RuntimeError, match="0 signatures prefill_3"):
        check_tflite(path, config, quantized.configs, cache, {"prefill_3": ("prefill", 3)})
    with pytest.raises(RuntimeError, match="decode has .*q_proj.* where .*FULLY_CONNECTED"):
        check_tflite(path, config, quantized.configs, cache, {"decode": ("prefill", 1)})


@pytest.mark.parametrize(
    ("config", "columns", "float_bits", "said"),
    [
        (QuantConfig(8, 32), 64, 32, "8 bits in groups of 32"),
        (QuantConfig(4, 0), 49, 32, "rows of 49"),
        (None, 64, 16, "use --bits 32"),
    ],
)
def test_what_litert_computes_wrongly_is_refused(
    config: QuantConfig | None, columns: int, float_bits: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        refuse_weight("model.layers.0.mlp.up_proj", config, columns, float_bits)


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
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    before, expected = (kept.stat().st_ino, kept.stat().st_mtime_ns), first.prefill([5, 6, 7])
    second = gemma_edge.load(runtime.bundle)
    assert np.array_equal(second.prefill([5, 6, 7]), expected)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == before and kept.stat().st_size > 10_000
    kept.write_bytes(b"x" * 100)  # damaged: it is packed again
    assert np.array_equal(gemma_edge.load(runtime.bundle).prefill([5, 6, 7]), expected)
    monkeypatch.setenv(VARIABLE, str(kept))  # a file: no cache
    assert np.array_equal(gemma_edge.load(runtime.bundle).prefill([5, 6, 7]), expected)


def test_the_pipeline_makes_a_bundle_that_passes_the_gate(tmp_path: Path) -> None:
    options = ExportOptions(
        model=str(DEMO), out=tmp_path / "bundle", backend="tflite", bits=8, method="rtn", context=64
    )
    done = pipeline.export(options)
    result = done.manifest.verification["tflite"]
    assert result["passed"] and result["past_wrap"]


def test_every_rewind_of_the_ring_is_exact(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _, runtime = make_bundle(checkpoint(), tmp_path, make_recipe(32), context=16, chunk=6)
    worst, free, again = worst_error(runtime, some_ids(60, 320), range(0, 50, 3), range(1, 20))
    assert worst < 1e-3 and free > 50 and again > 50  # logits of a range of 60
