"""A toy's bundle whose manifest has every part: four backends, a gate's result, a calibration. Only its onnx backend can run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemma_edge.bundle.entries import (
    BackendEntry,
    CalibrationEntry,
    Difference,
    Distilled,
    GateResult,
    IntegersEntry,
    LayerError,
    LimitsEntry,
    PartEntry,
    RecipeEntry,
    RuleEntry,
)
from gemma_edge.bundle.manifest import MANIFEST, Manifest, list_files, with_identities
from gemma_edge.bundle.settings import ExecuTorchSettings, Methods, TFLiteRuntimeSettings, TFLiteSettings
from gemma_edge.bundle.signature import Signature
from support.checkpoints import plan_of
from support.toys import CHUNK, toy_backend, write_toy_bundle

DIFFERENCE = Difference(
    tokens=12,
    kl=0.01,
    top1=0.97,
    ppl=11.0,
    ppl_reference=10.0,
    ppl_change=0.1,
    max_abs_logit_difference=0.5,
    logit_range=60.0,
)
GATE = GateResult(
    level="quick",
    text="heldout_austen.txt",
    fed_tokens=74,
    past_wrap=True,
    quality=DIFFERENCE,
    quality_past_context=DIFFERENCE,
    lowering=DIFFERENCE,
    generation_difference=0.01,
    limits=LimitsEntry(kl=0.5, top1=0.6, ppl_change=0.5, lowering=0.1, lowering_kl=0.05),
    failures=(),
    passed=True,
)
RECIPE = RecipeEntry(
    name="int4-g32",
    rules=(
        RuleEntry("model.embed_tokens", IntegersEntry(8, 0, symmetric=True), "rtn"),
        RuleEntry(".*norm", None, "rtn"),
        RuleEntry(".*", IntegersEntry(4, 32, symmetric=True), "gptq"),
    ),
    float_bits=32,
    parts=(PartEntry("mlp.down_proj", bits=4, group_size=32, count=2, weights=2048, bytes=1152),),
    calibration=CalibrationEntry(
        tokens=256,
        text=("calibration_kjv.txt",),
        seed=3,
        layers=(LayerError(0, 0.01), LayerError(1, 0.02)),
        distilled=Distilled(tokens=128, kl_before=0.02, kl_after=0.01),
    ),
)
SIGNATURES = (
    Signature("prefill_4", "prefill", CHUNK),
    Signature("decode", "decode", 1),
    Signature("score_4", "score", CHUNK),
    Signature("short_1", "decode", 1, longest=8),
)


def write_full_bundle(folder: Path) -> Path:
    """Write it; `folder` is made."""
    write_toy_bundle(folder)
    (folder / "model.pte").write_bytes(b"program")
    (folder / "model.tflite").write_bytes(b"model")
    onnx = toy_backend()
    settings = {
        "executorch": ExecuTorchSettings("model.pte", Methods("generate", "score"), "1.5"),
        "tflite": TFLiteSettings("model.tflite", SIGNATURES, "2.3"),
        "tflite-runtime": TFLiteRuntimeSettings("model.tflite", SIGNATURES, "2.14"),
        "of-the-future": {"any": ["thing", 1, None]},
    }
    others = {
        name: BackendEntry(onnx.cache, plan_of(onnx.cache, name), each, identity="") for name, each in settings.items()
    }
    manifest = replace(
        Manifest.load(folder),
        backends={"onnx": onnx, **others},
        files=list_files(folder),
        recipe=RECIPE,
        tools={"gemma-edge": "0.1.0", "onnx": "1.20"},
        verification={"onnx": GATE, "tflite": GATE},
    )
    (folder / MANIFEST).write_text(with_identities(manifest).to_json())
    return folder
