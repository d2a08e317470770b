"""Whole exports of fine-tunes with a head of their own: one quantization, three backends, each through the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import llm_compressor_folder, make_checkpoint

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'gemma-edge[executorch]'")
pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed: pip install 'gemma-edge[tflite]'")

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.export import api as pipeline
from gemma_edge.export.options import ExportOptions
from gemma_edge.model.checkpoint import HEAD, TABLE
from gemma_edge.model.quantized import QuantConfig
from gemma_edge.quantize.options import QuantizeOptions


def exported(model: Path, out: Path, lora: Path | None = None, group_size: int | None = 32) -> Manifest:
    """The manifest of a bundle with every backend, each of which the gate has passed."""
    options = ExportOptions(
        str(model),
        out=out,
        lora=lora,
        quantization=QuantizeOptions(bits=4, group_size=group_size),
        context=16,
        prefill_chunk=7,
        backend="all",
    )
    manifest = pipeline.export(options).manifest
    assert list(manifest.verification) == ["onnx", "executorch", "tflite"]
    assert all(result.passed and result.past_wrap for result in manifest.verification.values())
    assert not manifest.config.tie_word_embeddings
    return manifest


def parts(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Bits and group size of table and head."""
    return {
        part.part: (part.bits, part.group_size)
        for part in manifest.recipe.parts
        if part.part in ("embed_tokens", "lm_head")
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with one layer of each kind."""
    return make_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=2)


def test_an_adapter_with_its_own_table_and_head_passes_the_gate_of_every_backend(base: Path, tmp_path: Path) -> None:
    """As PEFT saves it for a resized vocabulary with `modules_to_save`."""
    adapter, rows = tmp_path / "adapter", 352
    adapter.mkdir()
    state = load_file(base / "model.safetensors")
    table = torch.cat([state[f"{TABLE}.weight"], state[f"{TABLE}.weight"][: rows - 320].flip(0)])
    tensors = {f"base_model.model.{TABLE}.weight": table, f"base_model.model.{HEAD}.weight": table.flip(0).contiguous()}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    manifest = exported(base, tmp_path / "bundle", adapter)
    assert parts(manifest) == {"embed_tokens": (8, 0), "lm_head": (8, 0)}
    assert manifest.config.vocab_size == rows and manifest.model.lora == "adapter"


def test_a_head_of_integers_passes_the_gate_of_every_backend_beside_another_kind_of_table(tmp_path: Path) -> None:
    untied = make_checkpoint(tmp_path / "untied", num_hidden_layers=2, tie_word_embeddings=False)
    folder = llm_compressor_folder(untied, tmp_path / "given", QuantConfig(4, 32), torch.bfloat16, ignore=())
    manifest = exported(folder, tmp_path / "bundle", group_size=None)
    assert parts(manifest) == {"embed_tokens": (8, 0), "lm_head": (4, 32)}
