"""Gemma 1 and 3 through the ordinary pipeline: plan, bundle, gate, what the manifest says, and generation past windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import hf_logits, hf_model, make_checkpoint, relative_error
from support.lowered import some_ids
from support.rewinding import worst_error

import gemma_edge
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Export
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import geometry
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.state import read_state, write_state
from gemma_edge.runtimes.generation.generate import GenerationOptions, GenerationState, generate
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.speculate import CLOSE, Speculation

CONTEXT, CHUNK = 24, 7
BACKENDS = ("onnx", "tflite")  # ExecuTorch takes a minute: export/executorch/ has its tests of them


WINDOWS = {"gemma1_one_head": [CONTEXT] * 3, "gemma3": [8, 8, 8, 8, 8, CONTEXT, 8]}  # of the layers' caches


@pytest.fixture(scope="module", params=WINDOWS)
def shape(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def made(shape: str, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    options = ExportOptions(
        model=str(checkpoint(shape)),
        out=tmp_path_factory.mktemp(shape) / "bundle",
        quantization=QuantizeOptions(bits=32),
        context=CONTEXT,
        prefill_chunk=CHUNK,
        backend=",".join(BACKENDS),
    )
    return pipeline.export(options)


@pytest.fixture(params=BACKENDS)
def runtime(request: pytest.FixtureRequest, made: Export) -> Runtime:
    return gemma_edge.load(made.bundle, backend=request.param, threads=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gate_passes_with_a_kl_of_nothing(backend: str, made: Export) -> None:
    result = made.manifest.verification[backend]
    assert result.passed and result.past_wrap
    assert result.quality.kl <= 1e-6 and result.quality.top1 == 1.0


NAMED = {"gemma1_one_head": ("gemma", False, 1e4, None), "gemma3": ("gemma3_text", True, 1e6, 1e4)}


def test_the_manifest_and_genai_name_the_family(shape: str, made: Export) -> None:
    architecture, qk_norm, theta, local_theta = NAMED[shape]
    config = made.manifest.config
    assert made.manifest.model.architecture == config.architecture == architecture and config.qk_norm == qk_norm
    assert (config.rope_theta, config.rope_local_base_freq) == (theta, local_theta)
    assert json.loads((made.bundle / "genai_config.json").read_text())["model"]["type"] == architecture


def test_only_global_layers_have_a_cache_of_the_context(shape: str, made: Export) -> None:
    assert [layer.window for layer in made.manifest.backends["onnx"].cache.layers] == WINDOWS[shape]


def test_the_bundle_computes_what_transformers_computes(
    runtime: Runtime, shape: str, checkpoint: Callable[..., Path]
) -> None:
    ids = torch.arange(3, 3 + CONTEXT)
    found = torch.from_numpy(runtime.score(ids.tolist()))
    assert relative_error(found, hf_logits(hf_model(checkpoint(shape)), ids)) <= 1e-4


def test_every_rewind_past_windows_and_context_is_exact(runtime: Runtime) -> None:
    """In Gemma 3 six rings of a window of 8 and one of the context hold tokens for different times."""
    ids = some_ids(60, runtime.vocab_size)
    span = float(np.ptp(runtime.score(ids)))
    worst, free, again = worst_error(runtime, ids, range(0, 50, 7), range(1, 20, 3))
    assert worst <= 1e-5 * span and free > 10 and again > 10


def test_a_state_saved_past_the_context_gives_the_same_bits(made: Export, runtime: Runtime, tmp_path: Path) -> None:
    ids = some_ids(60, runtime.vocab_size)
    runtime.reset()
    runtime.prefill(ids[:40])
    write_state(tmp_path / "state", runtime.snapshot(), {})
    backend = next(name for name, entry in made.manifest.backends.items() if entry.identity == runtime.identity)
    other = gemma_edge.load(made.bundle, backend=backend, threads=1)
    other.restore(read_state(tmp_path / "state")[0])
    for token in ids[40:]:
        assert np.array_equal(other.decode(token), runtime.decode(token))


def test_prompt_lookup_past_the_context_gives_the_text_of_plain_decoding(runtime: Runtime) -> None:
    """With random weights the text soon goes round in circles, so many guesses are right."""

    def said(prompt: list[int], speculation: Speculation | None) -> list[int]:
        runtime.reset()
        state = GenerationState(Sampler(SamplingParams()), speculation=speculation)
        return list(generate(runtime, prompt, GenerationOptions(max_tokens=3 * CONTEXT), state=state))

    prompts = [[2, word, *[word + 7, word + 8] * 4] for word in range(20, 300, 40)]
    plain = [said(prompt, None) for prompt in prompts]
    assert plain == [said(prompt, Speculation(runtime, CLOSE)) for prompt in prompts]
    assert runtime.stats.accepted_tokens > CONTEXT


def test_a_window_longer_than_the_context_is_the_context(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type="gemma3_text", num_hidden_layers=6, sliding_window=40)
    config = Checkpoint.open(folder).config
    cache = geometry(config, 20, CHUNK)
    assert [layer.window for layer in cache.layers] == [20] * 6
