"""Gemma 3 through the ordinary pipeline: plan, bundle, gate, and what the manifest says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import hf_logits, hf_model, make_checkpoint, relative_error

import gemma_edge
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Export
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import geometry
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.quantize.options import QuantizeOptions

CONTEXT, CHUNK = 24, 7


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    options = ExportOptions(
        model=str(checkpoint("gemma3")),
        out=tmp_path_factory.mktemp("gemma3") / "bundle",
        quantization=QuantizeOptions(bits=32),
        context=CONTEXT,
        prefill_chunk=CHUNK,
        backend="onnx",
    )
    return pipeline.export(options)


def test_the_gate_passes_with_a_kl_of_nothing(made: Export) -> None:
    result = made.manifest.verification["onnx"]
    assert result.passed and result.past_wrap
    assert result.quality.kl <= 1e-6 and result.quality.top1 == 1.0


def test_the_manifest_and_genai_name_the_family(made: Export) -> None:
    config = made.manifest.config
    assert made.manifest.model.architecture == config.architecture == "gemma3_text" and config.qk_norm
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert json.loads((made.bundle / "genai_config.json").read_text())["model"]["type"] == "gemma3_text"


def test_only_global_layers_have_a_cache_of_the_context(made: Export) -> None:
    windows = [layer.window for layer in made.manifest.backends["onnx"].cache.layers]
    assert windows == [8, 8, 8, 8, 8, CONTEXT, 8]


def test_the_bundle_computes_what_transformers_computes(made: Export, checkpoint: Callable[..., Path]) -> None:
    ids = torch.arange(3, 3 + CONTEXT)
    found = torch.from_numpy(gemma_edge.load(made.bundle).score(ids.tolist()))
    assert relative_error(found, hf_logits(hf_model(checkpoint("gemma3")), ids)) <= 1e-4


def test_a_window_longer_than_the_context_is_the_context(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type="gemma3_text", num_hidden_layers=6, sliding_window=40)
    config = Checkpoint.open(folder).config
    cache = geometry(config, 20, CHUNK)
    assert [layer.window for layer in cache.layers] == [20] * 6
