"""Core ML's and Vulkan's delegates: nothing here runs them, so what is tested is the file, and the same halves in torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import DEMO, make_checkpoint, relative_error
from support.commands import refused, run
from support.lowered import lower_bundle, some_ids
from support.tflite_bundles import reference
from torch import Tensor, nn

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'gemma-edge[executorch]'")

import gemma_edge
from gemma_edge.bundle.accelerators import COREML, DELEGATES, VULKAN, Accelerator
from gemma_edge.errors import InputError
from gemma_edge.export.backend import exporter
from gemma_edge.export.executorch import ahead
from gemma_edge.export.executorch.compose import Composed
from gemma_edge.export.executorch.pte import Pte
from gemma_edge.export.executorch.seams import AttendHalf, Half, Limits, Linear, ProjectHalf
from gemma_edge.export.plan import geometry
from gemma_edge.quantize.checkpoint.split_table import split_where_needed
from gemma_edge.quantize.checkpoint.store import open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.integers import QuantizedTensor
from gemma_edge.quantize.recipe import make_recipe

CHUNK, CONTEXT = 7, 16
RECIPES = {
    "float32": make_recipe(32),
    "int8": make_recipe(8),
    "int4 in groups": make_recipe(4, group_size=32),
    "int4 per channel": make_recipe(4, group_size=0),
}


UNEVEN = [7, 3, 1, 7, 2, *[1] * 8]  # 28 tokens, past the window of 8 and the context


needs_coremltools = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")


class Eager(nn.Module):
    """A half as it is lowered, run by torch."""

    def __init__(self, half: Half) -> None:
        super().__init__()
        self.inner = half

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.inner(*inputs)
        return out if isinstance(out, tuple) else (out,)


def delegates(bundle: Path) -> list[str]:
    """The ids of the delegates of both methods, which have the same ones."""
    plans = {plan.name: plan for plan in Pte.open(bundle / "model.pte").program.execution_plan}
    ids, others = ([delegate.id for delegate in plans[name].delegates] for name in ("forward", "score"))
    assert ids == others
    return ids


@pytest.mark.parametrize(
    ("accelerator", "recipe"),
    [
        pytest.param(COREML, "float32", marks=needs_coremltools),
        pytest.param(COREML, "int4 in groups", marks=needs_coremltools),
        (VULKAN, "int8"),
    ],
)
def test_one_delegate_a_half_and_nothing_else_outside(accelerator: Accelerator, recipe: str, tmp_path: Path) -> None:
    """Every weight lies in the file with the bits of its integers."""
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=1, layer_types=["sliding_attention"])
    backend = exporter("executorch", accelerator)
    _, bundle = lower_bundle(backend, folder, tmp_path, RECIPES[recipe], CONTEXT, CHUNK, accelerator=accelerator)
    assert delegates(bundle) == 3 * [DELEGATES[accelerator]]
    with pytest.raises(InputError, match=f"was made for {accelerator}, and the ExecuTorch of this machine has no"):
        gemma_edge.load(bundle)
    with pytest.raises(InputError, match=f"runs on {accelerator} only"):
        gemma_edge.load(bundle, accelerator="cpu")


class EagerHalves(ahead.Halves):
    """The model's halves as they would be lowered, run by torch."""

    def called(self, half: Half, limits: Limits, prefix: str) -> Any:
        self.write(half, prefix)
        return Eager(half)


@pytest.mark.parametrize(("recipe", "shape"), [*((name, "tiny") for name in RECIPES), ("int8", "gemma3_odd")])
@torch.no_grad()
def test_the_halves_compute_the_model(recipe: str, shape: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Past window and context, in uneven chunks: what the delegates are made from gives the logits of the same integers."""
    source = split_where_needed(open_weights(checkpoint(shape)), RECIPES[recipe])
    quantized = write_quantized(source, RECIPES[recipe], tmp_path / "checkpoint")
    config, cache = quantized.config, geometry(quantized.config, CONTEXT, CHUNK, backend="executorch")
    halves = EagerHalves(quantized, lambda: None, cache, lambda done: None)
    layers = [
        (halves.half(ProjectHalf, layer), halves.half(AttendHalf, layer)) for layer in range(config.num_hidden_layers)
    ]
    composed = Composed(config, cache, ahead.table(quantized), layers, halves.head(), every_position=True).eval()
    ids, rows, start = some_ids(sum(UNEVEN), config.vocab_size), [], 0
    for count in UNEVEN:
        rows.append(composed(torch.tensor([ids[start : start + count]]), torch.tensor([start]))[0])
        start += count
    assert relative_error(torch.cat(rows), reference(quantized, ids, CONTEXT)) < 1e-4


def test_a_delegate_that_is_larger_than_its_integers_is_noticed(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that was silently left float, as the library's delegate would hold it."""

    def floats(half: Half, limits: Limits, partitioner: object) -> Any:
        given = [linear.given for linear in half.modules() if isinstance(linear, Linear)]
        size = sum(4 * each.codes.numel() for each in given if isinstance(each, QuantizedTensor))
        return SimpleNamespace(processed_bytes=bytes(size), named_data_store_output=None), [], []

    monkeypatch.setattr(ahead, "delegated", floats)
    monkeypatch.setattr(ahead, "ROOM", 0)  # the model is tiny
    with pytest.raises(RuntimeError, match="ProjectHalf lowered to"):
        lower_bundle(
            exporter("executorch", VULKAN),
            checkpoint("tiny"),
            tmp_path,
            RECIPES["int8"],
            CONTEXT,
            CHUNK,
            accelerator=VULKAN,
        )


def test_the_command_says_that_nobody_has_run_it(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1, layer_types=["sliding_attention"])
    options = ("--backend", "executorch", "--quality", "fast", "--context", "64", "--prefill-chunk", "16")
    done = run(model, *options, "--accelerator", VULKAN, "-o", out)
    assert done.exit_code == 0, done.output
    said = "executorch: NOT VERIFIED, an experiment: nothing here runs vulkan"
    assert said in " ".join(done.output.split())
    assert said in " ".join(run("inspect", out).output.split())
    manifest = json.loads((out / "manifest.json").read_text())
    assert delegates(out) == 3 * [DELEGATES[VULKAN]]
    assert manifest["backends"]["executorch"]["accelerator"] == VULKAN and manifest["verification"] == {}
    refused(run("verify", out, "--reference", model), "nothing here runs vulkan")


def test_what_cannot_be_lowered_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    refused(run(DEMO, "--backend", "onnx", "--accelerator", COREML, "-o", out), "coreml", "executorch")
    ahead_of_time = ("--backend", "executorch", "--accelerator", COREML, "-o", out)
    refused(run(DEMO, *ahead_of_time, "--bits", "8", "--group-size", "32"), "8 bits in groups")
    refused(run(DEMO, *ahead_of_time, "--kv-bits", "8"), "cache in float32")
    monkeypatch.setattr(
        "gemma_edge.bundle.backends.importlib.util.find_spec", lambda name: None if name == "coremltools" else 1
    )
    refused(run(DEMO, *ahead_of_time), "needs coremltools: pip install")
    assert not out.exists()
