"""The stages of an export in order: open, plan, quantize, lower, verify, publish. The command line parses and calls this."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma_edge.bundle.backends import refuse_accelerator
from gemma_edge.bundle.manifest import Manifest, typed_config
from gemma_edge.bundle.staging import put, refuse_existing, staged
from gemma_edge.errors import InputError
from gemma_edge.export import plan as planning
from gemma_edge.export.assembly import Assembly
from gemma_edge.export.backend import choose_backends, exporter
from gemma_edge.export.contents import Integers
from gemma_edge.export.disk import check_disk, check_memory
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.gate.verify import choose_gate, gate_pythons
from gemma_edge.export.onnx import weights as onnx_weights
from gemma_edge.export.opened import Opened
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.targets import GIB, TARGETS, Target
from gemma_edge.files import nearest_existing
from gemma_edge.model.checkpoint import Weights
from gemma_edge.model.gguf.folder import model_name
from gemma_edge.progress import Progress, Stage, no_progress
from gemma_edge.quantize.api import (
    CHECKPOINT,
    DEFAULT_BITS,
    Quantization,
    calibration_tokens,
    choose_calibration,
    choose_recipe,
    make_checkpoint,
    open_source,
    way_to_kv_scales,
)
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.mixed.choose import parse_size
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import FIXED, Recipe

__all__ = ["Export", "Opened", "export", "open_model", "to_json"]

logger = logging.getLogger(__name__)

CLOSER = "closer are `quality` best, `group_size` 32 and `bits` 8"  # than the same model with coarser integers


@dataclass
class Export:
    """A finished export."""

    bundle: Path
    manifest: Manifest
    stages: list[Stage] = field(default_factory=list)


@dataclass(frozen=True)
class Ready:
    """What an earlier export left of the same model with the same choices."""

    checkpoint: Path  # its integers
    learnt: Mapping[str, Any]  # what the manifest says of their calibration
    bundle: Path | None = None  # the bundle as it was lowered, which only has to be judged; None: it is lowered now

    def open(self, source: Weights) -> QuantizedCheckpoint:
        """The integers, with the configuration of the model that they were made from."""
        quantized = QuantizedCheckpoint.open(self.checkpoint)
        quantized.config = source.config  # it may have more stop ids than the files
        return quantized


def open_model(
    options: ExportOptions, progress: Progress = no_progress, *, plan_only: bool = False, source: Weights | None = None
) -> Opened:
    """Find and check the model, and plan its export. Reads headers only, and the calibration text unless `plan_only`; under a
    budget it measures what each weight costs, unless that was done before.

    Args:
        options: what the user chose.
        progress: shows how far measuring is.
        plan_only: nothing will be exported: neither the destination nor the gate is checked, and no text is read.
        source: the options' model where it is open already, as for many plans of one model; None opens it.

    Raises:
        InputError: the model, an option or the target cannot be used.
    """
    if options.target not in TARGETS:
        raise InputError(field="target", value=options.target, allowed=TARGETS)
    if options.verify not in LEVELS:
        raise InputError(field="verify", value=options.verify, allowed=LEVELS)
    if options.out is not None and not plan_only:
        refuse_existing(options.out, options.force)
    target = TARGETS[options.target]
    backends = choose_backends(options.backend or target.backend)
    refuse_accelerator(options.accelerator, backends)
    if options.ram_gib is not None:
        target = replace(target, ram_bytes=int(options.ram_gib * GIB))
    gated = backends if options.verify != "none" and not plan_only else []
    pythons = gate_pythons(gated, options.runtime_python)
    source = source or open_source(options.model, options.lora, options.vocab)
    options = replace(options, quantization=_for_kernels(options.quantization, backends, options.accelerator, source))
    typed_config(source.config.to_json())  # refuses, before any work, what no bundle could hold
    source, recipe, choice = choose_recipe(options.quantization, source, onnx_weights, progress)
    calibrated = source.kv_scales is not None if source.is_quantized else recipe.calibrated
    hint = way_to_kv_scales(options.quantization, source, recipe)
    kv_dtypes = {
        backend: planning.choose_kv_dtype(
            options.kv_bits,
            target,
            backend,
            head_dim=source.config.head_dim,
            calibrated=calibrated,
            hint=hint,
            accelerator=options.accelerator,
        )
        for backend in backends
    }
    plans = _plan(options, source, recipe, target, kv_dtypes)
    _check_size(options, plans)
    # a hub id's folder is called by the hash of its commit
    path = Path(options.model)
    name = path.resolve().name if path.is_dir() else model_name(Path(path.name))
    seen = None if plan_only else choose_calibration(options.quantization, source, recipe)
    return Opened(name, source, recipe, target, plans, seen, choice, pythons)


def _for_kernels(
    quantization: QuantizeOptions, backends: Sequence[str], accelerator: str, source: Weights
) -> QuantizeOptions:
    """The options with the group size that the kernels need, where they leave it open and it applies."""
    needed = [size for name in backends if (size := exporter(name, accelerator).group_size) is not None]
    decided = (quantization.group_size, quantization.recipe, quantization.size, quantization.bpw)
    open_still = all(choice is None for choice in decided) and quantization.bits in (None, DEFAULT_BITS)
    if not needed or not open_still or quantization.method in FIXED or source.is_quantized:
        return quantization
    return replace(quantization, group_size=needed[0])


def _plan(
    options: ExportOptions,
    source: Weights,
    recipe: Recipe,
    target: Target,
    kv_dtypes: Mapping[str, str],
) -> dict[str, planning.Plan]:
    """A plan for every backend, all with the context that fits the one that needs most RAM."""

    def plans(context: int | None) -> dict[str, planning.Plan]:
        return {
            backend: planning.make_plan(
                source,
                recipe,
                target,
                backend,
                planning.Requested(
                    context=context,
                    prefill_chunk=options.prefill_chunk,
                    pinned=options.pinned,
                    kv_dtype=kv_dtype,
                    accelerator=options.accelerator,
                    verify=options.verify,
                    calibration_tokens=calibration_tokens(options.quantization, source, recipe),
                ),
            )
            for backend, kv_dtype in kv_dtypes.items()
        }

    fitting = plans(options.context)
    return plans(min(plan.context for plan in fitting.values()))


def _check_size(options: ExportOptions, plans: Mapping[str, planning.Plan]) -> None:
    """Refuse backends that need more than the budget, which is shared out by what the onnx backend stores."""
    limit = parse_size(options.quantization.size) if options.quantization.size is not None else None
    for name, plan in plans.items():
        if limit is not None and plan.weights_bytes > limit:
            raise InputError(
                f"`size` {options.quantization.size}: the {name} backend needs {plan.weights_bytes} bytes for these weights;"
                f" pass `size` {2 * limit - plan.weights_bytes}, or leave this backend out",
                field="size",
                value=options.quantization.size,
            )


def export(
    options: ExportOptions, progress: Progress = no_progress, opened: Opened | None = None, ready: Ready | None = None
) -> Export:
    """Make a bundle. It appears at `options.out` complete and verified, or not at all.

    Args:
        options: what the user chose.
        progress: is told how far each stage is.
        opened: the result of `open_model` for the same options; None opens the model here.
        ready: work that was done before with the same choices, and is not done again.

    Raises:
        InputError: bad input, too little disk, or the gate failed; nothing is left behind.
        RuntimeError: the exported graph is not what it should be.
    """
    opened = opened or open_model(options)
    source = opened.source
    out = options.out or Path(f"{opened.name}-{opened.recipe.name}-{options.target}")
    _check_checkpoint_place(options.save_checkpoint, out)
    if options.keep_failed:
        refuse_existing(_failed_place(out), options.force)
    choose_gate(source, opened.context, options.verify)  # refuses a bad tokenizer before any work
    check_memory(opened.plans.values())
    stages: list[Stage] = []
    with staged(out, force=options.force) as work:
        # not earlier: only now is gone what a killed export left
        check_disk(work, opened.plans.values(), source, opened.recipe, opened.calibration)
        checkpoint = work / "checkpoint"
        if ready is not None:
            quantized, learnt = ready.open(source), ready.learnt
        else:
            quantization = Quantization(options.quantization, source, opened.recipe, opened.calibration)
            quantized, learnt = make_checkpoint(quantization, checkpoint, progress, stages)
        integers = Integers(quantized, learnt, Path(options.lora).name if options.lora else None)
        assembly = Assembly(opened, integers, options.verify, work, progress, stages)
        if ready is not None and ready.bundle is not None:
            assembly.adopt(ready.bundle)
        manifest = assembly.make()
        small = [name for name in assembly.failures if opened.plans[name].kv_dtype != "float32"]
        if small and options.kv_bits is None:
            assembly.forget(small, _with_float_caches(options, opened, assembly.failures))
            manifest = assembly.make()
        if assembly.failures:
            raise _gate_failed(options, out, assembly.bundle, assembly.failures)
        if options.save_checkpoint:
            with staged(options.save_checkpoint, force=False, kind=CHECKPOINT) as beside:  # perhaps on another disk
                (beside / CHECKPOINT.folder).rmdir()
                shutil.move(checkpoint, beside / CHECKPOINT.folder)
    return Export(out, manifest, stages)


def _with_float_caches(options: ExportOptions, opened: Opened, failures: Mapping[str, Sequence[str]]) -> Opened:
    """The same model, planned with float32 KV caches in the backends that failed with smaller ones."""
    kv_dtypes = {name: plan.kv_dtype for name, plan in opened.plans.items()}
    for name, out_of_bounds in failures.items():
        if kv_dtypes[name] != "float32":
            logger.warning(
                "with its KV cache in %s the %s bundle differs too much from the original (%s): again with float32",
                kv_dtypes[name],
                name,
                "; ".join(out_of_bounds),
            )
            kv_dtypes[name] = "float32"
    return replace(opened, plans=_plan(options, opened.source, opened.recipe, opened.target, kv_dtypes))


def _check_checkpoint_place(kept: Path | None, out: Path) -> None:
    """Refuse a folder for the checkpoint that could not be written in the end, before any work."""
    if kept is None:
        return
    if kept.exists():
        raise InputError(f"{kept} exists; pass another folder to `save_checkpoint`")
    inner, outer = kept.resolve(), out.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise InputError(f"`save_checkpoint` {kept} and the bundle {out}: one would lie in the other; pass two folders")
    parent = nearest_existing(inner.parent)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"cannot write in {parent}; pass another folder to `save_checkpoint`")


def _failed_place(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed")


def _gate_failed(options: ExportOptions, out: Path, bundle: Path, failures: dict[str, list[str]]) -> InputError:
    figures = "; ".join(f"{name}: {figure}" for name, out_of_bounds in failures.items() for figure in out_of_bounds)
    where = "`keep_failed` keeps it to look at"
    if options.keep_failed:
        kept = _failed_place(out)
        refuse_existing(kept, options.force)  # somebody may have made it in the meantime
        put(bundle, kept, aside=bundle.with_name("failed"))
        where = f"it lies in {kept}"
    return InputError(f"{out} not made: it differs too much from the original ({figures})", hint=f"{CLOSER}; {where}")


def to_json(done: Export) -> dict[str, Any]:
    """The result of an export for `--json`."""
    return {
        "bundle": str(done.bundle),
        "manifest": json.loads(done.manifest.to_json()),
        "stages": [asdict(stage) for stage in done.stages],
    }
