"""The ExecuTorch program against transformers, and against the integers that it was made from."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import DEMO, ROOT, hf_model, hf_windowed, make_checkpoint, relative_error
from support.lowered import lower_bundle, prefilled, some_ids
from support.rewinding import worst_error

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'gemma-edge[executorch]'")

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export.api import Export
from gemma_edge.export.backend import StoredWeights
from gemma_edge.export.executorch import check
from gemma_edge.export.executorch.backend import BACKEND, FILE, KERNELS, METHODS
from gemma_edge.export.executorch.packing import CODES, SCALE, Constant
from gemma_edge.export.executorch.pte import Pte
from gemma_edge.model.checkpoint import TABLE, weight_shapes
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.quantize.checkpoint.packing import pack_bytes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.recipe import QuantConfig, Recipe, make_recipe
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import GenerationOptions, generate
from gemma_edge.text.tokenizer import Tokenizer

CHUNK = 7
UNEVEN = [7, 3, 1, 7, 2, *[1] * 12, 5, 6]  # 43 tokens: the window of local layers is 8, their ring 14 slots


def make_bundle(folder: Path, out: Path, recipe: Recipe, context: int) -> tuple[QuantizedCheckpoint, Runtime]:
    quantized, bundle = lower_bundle(BACKEND, folder, out, recipe, context, CHUNK)
    return quantized, gemma_edge.load(bundle)


@pytest.mark.parametrize("shape", ["tiny", "untied", "gemma3_odd", "gemma1_one_head"])
def test_float_program_equals_transformers_in_uneven_chunks_past_window_and_context(
    shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(shape)
    quantized, runtime = make_bundle(folder, tmp_path, make_recipe(32), context=24)
    ids = some_ids(sum(UNEVEN), quantized.config.vocab_size)
    expected = hf_windowed(
        hf_model(folder), torch.tensor(ids), local_window=quantized.config.sliding_window, global_window=24
    )
    # other orders of additions, and exp and tanh by XNNPACK's approximations; the issue allows 1e-4 of the range
    assert relative_error(prefilled(runtime, ids, UNEVEN), expected[np.cumsum(UNEVEN) - 1]) < 1e-4
    assert relative_error(torch.from_numpy(runtime.score(ids)), expected) < 1e-4
    following = runtime.decode(5)  # the other method is loaded, and what was scored is in its cache again
    runtime.reset()
    assert np.abs(runtime.prefill([*ids, 5]) - following).max() < 1e-4 * float(expected.max() - expected.min())
    worst, free, again = worst_error(runtime, ids, range(0, 35, 7), range(1, 20, 6))
    assert worst == 0 and free > 3 and again > 3


@pytest.fixture(scope="module")
def int4(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantizedCheckpoint, Runtime]:
    recipe = make_recipe(4, group_size=32, method="rtn")
    return make_bundle(checkpoint(), tmp_path_factory.mktemp("int4"), recipe, context=16)


def test_program_holds_the_checkpoints_integers_bit_for_bit(int4: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = int4
    assert_holds_integers(runtime, quantized, list(weight_shapes(quantized.config)))


@pytest.mark.parametrize(
    ("tied", "table_bits", "head_bits"),
    [(False, 4, None), (False, 8, None), (True, 8, 4)],
    ids=["int4", "int8", "split"],
)
def test_a_head_of_its_own_is_multiplied_and_the_table_only_looked_up(
    tied: bool, table_bits: int, head_bits: int | None, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "float", num_hidden_layers=2, tie_word_embeddings=tied)
    recipe = make_recipe(4, group_size=32, method="rtn", table_bits=table_bits, head_bits=head_bits)
    quantized, runtime = make_bundle(folder, tmp_path / "int4", recipe, context=48)
    assert_holds_integers(runtime, quantized, [weight for weight in weight_shapes(quantized.config) if weight != TABLE])
    ids = some_ids(24, quantized.config.vocab_size)
    expected = in_torch(quantized, ids, context=48)
    # activations are int8 here and float there
    assert relative_error(torch.from_numpy(runtime.score(ids)), expected) < 0.15
    planned = BACKEND.weights_bytes(StoredWeights(quantized, quantized.configs, 32))
    assert 0 < (runtime.bundle / FILE).stat().st_size - planned < 400_000
    other = replace(quantized.config, tie_word_embeddings=True)
    with pytest.raises(RuntimeError, match="are not multiplied|of no weight|computed by"):
        check.check_pte(runtime.bundle / FILE, other, quantized.configs, runtime.cache, list(METHODS.values()))


def assert_holds_integers(runtime: Runtime, quantized: QuantizedCheckpoint, weights: list[str]) -> None:
    pte, size = Pte.open(runtime.bundle / FILE), quantized.config.head_dim
    for weight in weights:
        rows, _ = weight_shapes(quantized.config)[weight]
        stored = quantized.quantized(weight, 0, rows)
        halved = weight.endswith(("q_proj", "k_proj"))
        for piece in (0, 1) if halved else (0,):
            # by index arithmetic of its own: row r of a head is in the first half iff r % D < D / 2
            mine = [r for r in range(rows) if not halved or (r % size >= size // 2) == bool(piece)]
            four = stored.config.bits == 4
            codes = pack_bytes(stored.codes[mine], 4) if four else stored.codes[mine]
            scale = stored.scale[mine] if four else stored.scale[mine].float()
            assert pte.constant(Constant(weight, CODES, piece).key) == codes.numpy().tobytes()
            assert pte.constant(Constant(weight, SCALE, piece).key) == scale.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model.layers.1.mlp.up_proj": QuantConfig(4, 64)}, "computed by"),
        ({"model.layers.1.mlp.up_proj": None}, "computed by|not multiplied|of no weight"),
        ({TABLE: QuantConfig(4, 32)}, "computed by|not multiplied|of no weight"),
    ],
)
def test_a_linear_of_another_kind_than_its_weight_is_found(
    int4: tuple[QuantizedCheckpoint, Runtime], changed: dict[str, QuantConfig | None], said: str
) -> None:
    quantized, runtime = int4
    pte = Pte.open(runtime.bundle / FILE)
    configs = dict(quantized.configs)
    plans = {plan.name: plan for plan in pte.program.execution_plan}
    for plan in (plans[name] for name in METHODS.values()):
        check._check_kernels(pte.path, pte, plan, quantized.config, configs)
        with pytest.raises(RuntimeError, match=said):
            check._check_kernels(pte.path, pte, plan, quantized.config, {**configs, **changed})


def test_int4_program_runs_five_contexts_and_stays_with_its_integers(int4: tuple[QuantizedCheckpoint, Runtime]) -> None:
    quantized, runtime = int4
    ids = some_ids(5 * 16, quantized.config.vocab_size)
    expected = in_torch(quantized, ids, context=16)
    # activations are int8 here and float there, on random weights of standard deviation 1
    assert relative_error(torch.from_numpy(runtime.score(ids)), expected) < 0.15
    wrong = torch.roll(expected, 1, dims=0)
    assert relative_error(wrong, expected) > 0.5, "the bound above would let wrong positions pass"


def in_torch(quantized: QuantizedCheckpoint, ids: list[int], context: int) -> torch.Tensor:
    """Logits (T, V) of the same integers in torch, with float activations."""
    model, cache = quantized.load(), RingCache(quantized.config, context=context, chunk=CHUNK)
    with torch.no_grad():
        chunks = [torch.tensor(ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK)]
        starts = [torch.tensor([start]) for start in range(0, len(ids), CHUNK)]
        return torch.cat([model(ids[None], at, cache)[0] for ids, at in zip(chunks, starts, strict=True)])


def test_every_rewind_of_the_ring_is_exact_and_a_restored_state_gives_the_same_bits(
    int4: tuple[QuantizedCheckpoint, Runtime],
) -> None:
    _, runtime = int4
    ids = some_ids(60, 320)
    worst, free, again = worst_error(runtime, ids, range(0, 50, 3), range(1, 20))
    # here every shape of a chunk gives the same bits, also where tokens were fed again
    assert worst == 0 and free > 50 and again > 50
    runtime.reset()
    runtime.prefill(ids[:30])
    state = runtime.snapshot()
    expected = runtime.score(ids[:40])  # the other method
    runtime.restore(state)
    assert np.array_equal(runtime.decode_many(ids[30:40]), expected[30:])
    # Kotlin's states have no cache; they were refused as damaged
    refed = runtime.stats.refed_tokens
    runtime.restore(replace(state, rows={}))
    assert runtime.position == 30 and runtime.stats.refed_tokens == refed + 30
    assert np.array_equal(runtime.decode_many(ids[30:40]), expected[30:])


@pytest.mark.parametrize(
    ("config", "columns", "float_bits", "said"),
    [
        (QuantConfig(8, 32), 64, 32, "8 bits in groups of 32"),
        (QuantConfig(4, 0), 48, 32, "rows of 48"),
        (None, 64, 16, "use bits 32"),
    ],
)
def test_what_xnnpack_computes_wrongly_is_refused(
    config: QuantConfig | None, columns: int, float_bits: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        KERNELS.refuse_weight("model.layers.0.mlp.up_proj", config, columns, float_bits)


def test_a_damaged_program_is_one_line(
    int4: tuple[QuantizedCheckpoint, Runtime], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, runtime = int4
    for path in runtime.bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    program = tmp_path / FILE
    program.write_bytes(b"\0" * program.stat().st_size)
    capfd.readouterr()
    with pytest.raises(InputError, match="damaged"):
        gemma_edge.load(tmp_path)
    assert capfd.readouterr().err == "", "the library's own line stood before ours"


def test_official_runner_gives_the_same_text(talking: Export) -> None:
    """The program meets the contract of ExecuTorch's own LLM runners, a prompt longer than a chunk among it."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runtime = gemma_edge.load(talking.bundle, backend="executorch")
    tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
    prompt = "And the LORD said unto Moses, Speak unto the children of Israel"
    ids = tokenizer.encode(prompt)
    assert len(ids) > CHUNK
    greedy = generate(runtime, ids, GenerationOptions(max_tokens=30), stop_ids=tokenizer.stop_ids)
    ours = "".join(tokenizer.stream(greedy))
    pieces: list[str] = []
    runner = TextLLMRunner(str(runtime.bundle / FILE), str(DEMO / "tokenizer.json"))
    runner.generate(
        prompt, GenerationConfig(max_new_tokens=30, temperature=0.0, echo=False, num_bos=1), pieces.append, print
    )
    assert "".join(pieces) == ours and len(ours) > 30


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_process_without_torch_gives_the_same_text(talking: Export, tmp_path: Path) -> None:
    """tools/benchmarks/executorch_native.cpp, packing the weights at its start, and mapping those of an earlier start."""
    runtime = gemma_edge.load(talking.bundle, backend="executorch")
    tokenizer = Tokenizer(talking.bundle, runtime.manifest)
    ids = tokenizer.encode("And the LORD said unto Moses, Speak unto the children of Israel")
    greedy = list(generate(runtime, ids, GenerationOptions(max_tokens=70)))  # far past the context of 48
    native = runpy.run_path(str(ROOT / "tools" / "benchmarks" / "executorch_native.py"))
    program, packed = native["build"](tmp_path), tmp_path / "packed"
    for file in (None, packed, packed):
        assert native["run"](program, runtime.bundle, ids, 70, file)["greedy"] == greedy
    assert packed.stat().st_size > 100_000
