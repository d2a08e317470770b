"""`gemma-export verify`: the gate on a finished bundle, against the original and against the integers that its files hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.checkpoints import DEMO
from support.commands import refused, run
from support.lowered import lower_bundle

from gemma_edge.bundle.backends import BackendInfo
from gemma_edge.bundle.manifest import Manifest, list_files, with_identities
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Export
from gemma_edge.export.backend import exporter
from gemma_edge.export.options import ExportOptions
from gemma_edge.model.checkpoint import norm_names, weight_shapes
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import Recipe, make_recipe

GROUPS, CHANNELS = make_recipe(4, group_size=32, method="rtn"), make_recipe(4, group_size=0, method="rtn")
BYTES, FLOATS = make_recipe(8, group_size=0, method="rtn"), make_recipe(16)
LOWERED = (
    ("onnx", GROUPS, "tiny"),
    ("onnx", GROUPS, "gemma3_scaled"),
    ("onnx", FLOATS, "untied"),
    ("tflite", CHANNELS, "untied"),
    ("tflite", CHANNELS, "gemma1"),
    ("tflite", GROUPS, "gemma3_scaled"),
    ("tflite-runtime", BYTES, "tiny"),
)


@pytest.fixture(scope="module")
def unverified(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A bundle that nobody has judged; its context is soon full."""
    out = tmp_path_factory.mktemp("unverified") / "bundle"
    quantization = QuantizeOptions(bits=8, group_size=0)
    options = ExportOptions(str(checkpoint()), out, quantization=quantization, context=16, verify="none")
    return pipeline.export(options)


@pytest.fixture
def bundle(unverified: Export, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(unverified.bundle, tmp_path / "bundle"))


def rehash(bundle: Path) -> None:
    """Let the manifest name the files as they are now: what is wrong with them is not their hash."""
    manifest = Manifest.load(bundle)
    with_identities(replace(manifest, files=list_files(bundle))).save(bundle)


@pytest.mark.parametrize(("name", "recipe", "shape"), LOWERED)
def test_what_is_read_back_from_a_bundle_is_what_was_lowered(
    name: str, recipe: Recipe, shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    quantized, bundle = lower_bundle(exporter(name), checkpoint(shape), tmp_path, recipe, context=16, chunk=8)
    manifest = Manifest.load(bundle)
    weights = exporter(name).stored(bundle, manifest.backends[name].settings, manifest.config)
    assert weights is not None
    for weight, (rows, _) in weight_shapes(quantized.config).items():
        assert torch.equal(weights.rows(weight, 1, rows), quantized.rows(weight, 1, rows)), weight
    for norm in norm_names(quantized.config):  # stored as 1 + w, which costs a rounding
        torch.testing.assert_close(weights.vector(norm), quantized.vector(norm), rtol=0, atol=5e-7)


def test_a_bundle_is_judged_by_its_own_integers(bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    done = run("verify", bundle, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    result = found["verification"]["onnx"]
    assert found["passed"] and found["reference"] is None and result["past_wrap"]
    assert result["quality"]["tokens"] > result["quality_past_context"]["tokens"] > 0
    assert result["limits"]["kl"] == result["limits"]["lowering_kl"]
    shown = run("verify", bundle).stdout
    assert "to the bundle's own integers in torch, every position" in shown and "was not measured" in shown
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_result_can_be_saved_and_only_with_the_original(bundle: Path, checkpoint: Callable[..., Path]) -> None:
    refused(run("verify", bundle, "--save"), "--save needs --reference")
    assert "NOT VERIFIED" in run("inspect", bundle).stdout
    done = run("verify", bundle, "--reference", checkpoint(), "--save")
    assert done.exit_code == 0, done.output
    result = Manifest.load(bundle).verification["onnx"]
    assert result.passed and result.quality.kl > 0 and f"KL {result.quality.kl:.5f}" in done.stdout
    assert "passed the quick gate" in run("inspect", bundle).stdout
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle"]


def test_a_graph_that_computes_something_else_fails(bundle: Path) -> None:
    """The softcap of the scores is another one in the graphs: the files' hashes are right, the logits are not."""
    for graph in ("generate.onnx", "score.onnx"):
        model = onnx.load(bundle / graph, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "GroupQueryAttention" and attribute.name == "scale":
                    attribute.f *= 1.5
        onnx.save(model, bundle / graph)
    rehash(bundle)
    done = run("verify", bundle)
    assert done.exit_code == 1 and "FAILED the quick gate" in done.stdout and "out of bounds: lowering" in done.stdout


def test_weights_that_are_not_the_original_fail_against_it_alone(bundle: Path, checkpoint: Callable[..., Path]) -> None:
    """A matrix that is turned upside down: the bundle computes with it correctly, and only the original shows it."""
    graph = onnx.load(bundle / "generate.onnx", load_external_data=False).graph
    (packed,) = (each for each in graph.initializer if each.name.endswith("layers.1.mlp.down_proj.weight_packed"))
    place = {each.key: each.value for each in packed.external_data}
    stored = np.memmap(bundle / place["location"], np.uint8, "r+", int(place["offset"]), int(place["length"]))
    stored[:] = 255 - stored
    stored.flush()
    rehash(bundle)
    assert run("verify", bundle).exit_code == 0
    done = run("verify", bundle, "--reference", checkpoint(), "--save")
    assert done.exit_code == 1 and "out of bounds: quality kl" in done.stdout
    assert not Manifest.load(bundle).verification["onnx"].passed


def test_a_bundle_that_computes_no_numbers_fails_and_says_so(bundle: Path, checkpoint: Callable[..., Path]) -> None:
    """NaN among the figures became a traceback, here and after an export: no manifest holds it."""
    graph = onnx.load(bundle / "generate.onnx", load_external_data=False).graph
    (norm,) = (each for each in graph.initializer if each.name == "model.norm.weight")
    place = {each.key: each.value for each in norm.external_data}
    stored = np.memmap(bundle / place["location"], np.float32, "r+", int(place["offset"]), int(place["length"]) // 4)
    stored[:] = np.nan
    stored.flush()
    rehash(bundle)
    done = run("verify", bundle, "--reference", checkpoint(), "--json")
    assert done.exit_code == 1, done.output
    result = json.loads(done.stdout)["verification"]["onnx"]
    assert result["quality"]["kl"] is None and not result["passed"] and "quality kl: nan > 0.03" in result["failures"]


def test_what_cannot_be_judged_is_refused_in_one_line(
    bundle: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    refused(run("verify", tmp_path), "is not a bundle")
    refused(run("verify", bundle, "--level", "none"), "--level none", "quick, full")
    refused(run("verify", bundle, "--backend", "tflite"), "holds no 'tflite' backend")
    refused(run("verify", bundle, "--reference", DEMO), "is another model", "vocab_size")
    refused(run("verify", bundle, "--integers", DEMO), "--integers", "is another model")
    refused(run("verify", bundle, "--integers", checkpoint()), "holds float weights", "--save-checkpoint")
    refused(run("verify", bundle, "--vocab", "x"), "--vocab has no effect without --reference")
    refused(run("verify", bundle, "--reference", checkpoint(), "--lora", "x"), "was made without --lora")
    with (bundle / "generate.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    refused(run("verify", bundle), "was changed")


def test_a_bundle_whose_files_give_no_integers_needs_the_checkpoint(
    toy: BackendInfo, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Also with the original: the toy's own file is not read back, as ExecuTorch's is not."""
    bundle, kept = tmp_path / "bundle", tmp_path / "kept"
    options = ExportOptions(
        str(checkpoint()),
        bundle,
        quantization=QuantizeOptions(bits=8, group_size=0),
        context=16,
        backend=toy.name,
        verify="none",
        save_checkpoint=kept,
    )
    pipeline.export(options)
    refused(run("verify", bundle, "--reference", checkpoint()), "cannot be read back", "--integers")
    done = run("verify", bundle, "--integers", kept)
    assert done.exit_code == 0, done.output
