"""Predictions against what is then measured, and the choice of a context."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import DEMO

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export import plan as planning
from gemma_edge.export.api import open_model
from gemma_edge.export.gate import verify as gate
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import MIB, Requested, make_plan
from gemma_edge.export.targets import GIB, TARGETS, Target
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import make_recipe

# Imports nothing that the commands themselves do not, and prints what the kernel says of its memory at the end.
EXPORT = """
import sys
from gemma_edge.export.cli import main
try:
    main(sys.argv[1:])
finally:
    print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
GENERATE = """
import sys, gemma_edge
runtime = gemma_edge.load(sys.argv[1])
context = runtime.cache.context
runtime.prefill([7] * context)
for token in range(context):
    runtime.decode(5)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")][0])
"""
linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: memory is read on Linux only")


def kib(code: str, *args: str | Path) -> int:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@linux_only
@pytest.mark.parametrize("bits", [4, 32])
def test_ram_of_export_and_device_are_within_15_percent_of_the_plan(bits: int, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_kib = kib(EXPORT, DEMO, "-o", out, "--bits", str(bits), "--verify", "none")
    plan = Manifest.load(out).backends["onnx"].plan
    assert export_kib * 1024 == pytest.approx(plan.export_ram_bytes, rel=0.15)
    assert kib(GENERATE, out) * 1024 == pytest.approx(plan.device_ram_bytes, rel=0.15)


@pytest.mark.parametrize("backend", ["onnx", "tflite", "executorch"])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_head_of_its_own_is_counted(backend: str, bits: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def planned(shape: str) -> int:
        return make_plan(
            Checkpoint.open(checkpoint(shape)), make_recipe(bits), TARGETS["desktop"], backend
        ).weights_bytes

    head = 320 * 64 * bits // 8
    assert head <= planned("untied") - planned("tiny") <= head + 320 * 12 + 2 * 4096  # scales and gaps


def test_context_is_halved_until_it_fits_and_what_never_fits_is_refused() -> None:
    source, recipe = Checkpoint.open(DEMO), make_recipe(4)
    whole = make_plan(source, recipe, TARGETS["desktop"], "onnx")
    assert whole.context == 512  # the model's own limit, not the target's
    tight = Target("watch", ram_bytes=whole.device_ram_bytes - MIB, threads=1, context=512)
    assert make_plan(source, recipe, tight, "onnx").context == 256
    with pytest.raises(InputError, match=r"as int4-g32 needs .* GiB of RAM at context 512.*context 320 fits"):
        make_plan(source, recipe, tight, "onnx", Requested(context=512))
    tiny = Target("badge", ram_bytes=MIB, threads=1, context=512)
    with pytest.raises(InputError, match="fewer bits, a smaller model, or ram_gib"):
        make_plan(source, recipe, tiny, "onnx")


def test_context_named_by_a_refusal_fits_and_the_next_larger_does_not() -> None:
    """It was the largest halving that fits: up to half of what does."""
    source, recipe = Checkpoint.open(DEMO), make_recipe(4)
    contexts = (64, 128, 192, 256, 320, 384, 448, 512)
    ram = {
        context: make_plan(source, recipe, TARGETS["desktop"], "onnx", Requested(context=context)).device_ram_bytes
        for context in contexts
    }
    for fits, too_large in pairwise(contexts):
        target = Target("watch", ram_bytes=ram[too_large] - 1, threads=1, context=512)
        with pytest.raises(InputError, match=f": context {fits} fits"):
            make_plan(source, recipe, target, "onnx", Requested(context=512))


def test_cache_of_the_2b_model_is_what_the_design_says() -> None:
    from gemma_edge.model.config import GEMMA2_2B

    cache = planning.geometry(GEMMA2_2B, 8192, 128)
    assert {layer.window for layer in cache.layers} == {4096, 8192}
    assert all(layer.slots == layer.window + 127 for layer in cache.layers)
    # 8 KiB per token and layer, K and V together
    assert cache.bytes == 8192 * (13 * (4096 + 127) + 13 * (8192 + 127))
    short = planning.geometry(GEMMA2_2B, 2048, 128)
    assert {layer.window for layer in short.layers} == {2048}


@pytest.mark.parametrize("level", LEVELS)
def test_disk_of_the_plan_counts_what_the_chosen_gate_writes(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full gate keeps the logits of every position: more than the plan once counted."""
    seen: list[int] = []
    judge = gate._judge

    def look_and_judge(
        folder: Path, progress: Callable[[int], None], python: str, environment: dict[str, str]
    ) -> dict[str, Any]:
        seen.extend(path.stat().st_size for path in folder.glob("*.f32"))
        return judge(folder, progress, python, environment)

    monkeypatch.setattr(gate, "_judge", look_and_judge)
    kept = tmp_path / "kept"
    options = ExportOptions(
        model=str(DEMO),
        out=tmp_path / "bundle",
        save_checkpoint=kept,
        verify=level,
        quantization=QuantizeOptions(quality="fast"),
    )
    plan = Manifest.load(pipeline.export(options).bundle).backends["onnx"].plan
    without = make_plan(Checkpoint.open(DEMO), make_recipe(4), TARGETS["android"], "onnx", Requested(verify="none"))
    assert (len(seen) == 2) is (level != "none")
    assert plan.export_disk_bytes - without.export_disk_bytes == sum(seen)
    files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(files) <= without.export_disk_bytes + 4 * MIB  # graphs and tokenizer, which do not grow with the model


def test_backend_is_the_targets_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target named its backend, and nobody read it."""
    monkeypatch.setitem(TARGETS, "watch", replace(TARGETS["android"], name="watch", backend="executorch"))
    options = ExportOptions(model=str(DEMO), target="watch")
    assert list(open_model(options).plans) == ["executorch"]
    assert list(open_model(replace(options, backend="onnx")).plans) == ["onnx"]
    assert list(open_model(replace(options, target="android")).plans) == ["onnx"]


def test_plan_is_json_and_targets_leave_room() -> None:
    plan = make_plan(Checkpoint.open(DEMO), make_recipe(8), TARGETS["android"], "onnx")
    assert json.loads(json.dumps(plan.to_json()))["recipe"] == "int8-channel"
    assert all(target.ram_bytes >= 4 * GIB for target in TARGETS.values())
