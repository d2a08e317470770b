"""The stages of an export in order: open, plan, quantize, lower, verify, publish. The command line only parses and calls it."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gemma_edge.bundle.backends import ALL, ALL_BACKENDS, BACKENDS, MADE_WITH, bits_of, how_to_install
from gemma_edge.bundle.codec import convert
from gemma_edge.bundle.entries import GateResult, ModelEntry, PlanEntry, RecipeEntry, TargetEntry
from gemma_edge.bundle.manifest import (
    MANIFEST,
    BackendEntry,
    Manifest,
    list_files,
    typed_config,
    typed_settings,
    with_identities,
)
from gemma_edge.bundle.staging import refuse_existing, staged
from gemma_edge.errors import InputError
from gemma_edge.export import plan as planning
from gemma_edge.export.contents import parts, tool_versions
from gemma_edge.export.gate import verify as gate
from gemma_edge.export.gate.limits import LEVELS, LIMITS
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.targets import GIB, TARGETS, Target
from gemma_edge.logits import scored_at_once
from gemma_edge.model import hub
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.progress import Progress, Stage, no_progress, stage
from gemma_edge.quantize.api import (
    calibration_tokens,
    choose_calibration,
    choose_recipe,
    make_checkpoint,
    way_to_kv_scales,
)
from gemma_edge.quantize.calibration import cache, layerwise
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, named_by_content, open_weights
from gemma_edge.quantize.mixed.choose import Mixed, parse_size
from gemma_edge.quantize.recipe import Recipe
from gemma_edge.text.tokenizer import TOKENIZER_FILE, WAY_OUT, open_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Export:
    """A finished export."""

    bundle: Path
    manifest: Manifest
    stages: list[Stage] = field(default_factory=list)


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be exported: checked, nothing written yet."""

    name: str
    source: Checkpoint | QuantizedCheckpoint
    recipe: Recipe
    target: Target
    plans: dict[str, planning.Plan]  # by backend; one context
    calibration: layerwise.Calibration | None  # None: no weight's integers depend on text
    choice: Mixed | None  # what was weighed under a budget
    pythons: dict[str, str]  # by backend, what runs its gate; {} without one

    @property
    def context(self) -> int:
        """Of every backend."""
        return next(iter(self.plans.values())).context


def open_model(options: ExportOptions, progress: Progress = no_progress, *, plan_only: bool = False) -> Opened:
    """Find and check the model, and plan its export. Reads headers only, and the calibration text unless `plan_only`; under a
    budget it measures what each weight costs, unless that was done before.

    Raises:
        InputError: the model, an option or the target cannot be used.
    """
    for name, value, allowed in (("--target", options.target, TARGETS), ("--verify", options.verify, LEVELS)):
        if value not in allowed:
            raise InputError(f"{name} {value}; supported: {', '.join(allowed)}")
    target = TARGETS[options.target]
    backends = _choose_backends(options.backend or target.backend)
    if options.ram_gib is not None:
        target = replace(target, ram_bytes=int(options.ram_gib * GIB))
    gated = backends if options.verify != "none" and not plan_only else []
    pythons = _gate_pythons(gated, options.runtime_python)
    source = open_weights(hub.resolve(options.model), lora=options.lora)
    typed_config(source.config.to_json())  # refuses, before any work, what no bundle could hold
    recipe, choice = choose_recipe(options, source, progress)
    recipe = named_by_content(source, recipe)
    calibrated = source.kv_scales is not None if isinstance(source, QuantizedCheckpoint) else recipe.calibrated
    way_out = way_to_kv_scales(options, source, recipe)
    kv_dtypes = {
        backend: planning.choose_kv_dtype(options.kv_bits, target, backend, calibrated=calibrated, way_out=way_out)
        for backend in backends
    }
    plans = _plan(options, source, recipe, target, kv_dtypes)
    _check_size(options, plans)
    # a hub id's folder is called by the hash of its commit
    name = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model.rpartition("/")[2]
    seen = None if plan_only else choose_calibration(options, source, recipe)
    return Opened(name, source, recipe, target, plans, seen, choice, pythons)


def _choose_backends(asked: str) -> list[str]:
    """The names in `--backend`, `all` being every one.

    Raises:
        InputError: an unknown name, or a backend that is not installed.
    """
    names = list(ALL_BACKENDS) if asked == ALL else list(dict.fromkeys(asked.split(",")))
    for name in names:
        if name not in BACKENDS:
            raise InputError(f"--backend {name}; supported: {', '.join(BACKENDS)}, several with commas, or {ALL}")
        command = how_to_install(MADE_WITH.get(name, name))
        if command is not None:
            raise InputError(f"--backend {name} is not installed: {command}")
    return names


def _gate_pythons(backends: Iterable[str], other: Path | None) -> dict[str, str]:
    """The Python that runs each backend's gate: this one, or the other where this one lacks the runtime.

    Raises:
        InputError: neither has it.
    """
    pythons = {name: sys.executable for name in backends}
    for name in (name for name in backends if how_to_install(name)):
        way_out = (
            f"{how_to_install(name)}, then --runtime-python with that environment's python;"
            " or --verify none, and the bundle says NOT VERIFIED"
        )
        if other is None:
            raise InputError(f"--backend {name}: the gate runs what was made, and its runtime is not here: {way_out}")
        failure = gate.cannot_judge(str(other), name)
        if failure:
            raise InputError(f"--runtime-python {other} cannot run {name} bundles ({failure}): {way_out}")
        pythons[name] = str(other)
    return pythons


def _plan(
    options: ExportOptions,
    source: Checkpoint | QuantizedCheckpoint,
    recipe: Recipe,
    target: Target,
    kv_dtypes: Mapping[str, str],
) -> dict[str, planning.Plan]:
    """A plan for every backend, all with the context that fits the hungriest one."""

    def plans(context: int | None) -> dict[str, planning.Plan]:
        return {
            backend: planning.make_plan(
                source,
                recipe,
                target,
                backend,
                context=context,
                prefill_chunk=options.prefill_chunk,
                kv_dtype=kv_dtype,
                verify=options.verify,
                calibration_tokens=calibration_tokens(options, source, recipe),
            )
            for backend, kv_dtype in kv_dtypes.items()
        }

    fitting = plans(options.context)
    return plans(min(plan.context for plan in fitting.values()))


def _check_size(options: ExportOptions, plans: Mapping[str, planning.Plan]) -> None:
    """A budget is shared out by what ONNX stores; a backend that stores more must keep it too."""
    limit = parse_size(options.size) if options.size is not None else None
    for name, plan in plans.items():
        if limit is not None and plan.weights_bytes > limit:
            raise InputError(
                f"--size {options.size}: the {name} backend needs {plan.weights_bytes} bytes for these weights;"
                f" pass --size {2 * limit - plan.weights_bytes}, or leave this backend out"
            )


def export(options: ExportOptions, progress: Progress = no_progress, opened: Opened | None = None) -> Export:
    """Make a bundle. It appears at `options.out` complete and verified, or not at all.

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
    _choose_gate(source, opened.context, options.verify)  # refuses a bad tokenizer before any work
    stages: list[Stage] = []
    with staged(out, force=options.force) as work:
        _check_disk(work, opened)  # here, because what a killed export left is gone now
        bundle, checkpoint = work / "bundle", work / "checkpoint"
        quantized, learnt = make_checkpoint(
            options, source, opened.recipe, opened.calibration, checkpoint, progress, stages
        )
        manifest = _lower_and_verify(options, opened, quantized, learnt, bundle, progress, stages)
        small = [name for name in _failures(manifest) if opened.plans[name].kv_dtype != "float32"]
        if small and options.kv_bits is None:
            for name in small:
                logger.warning(
                    "with its KV cache in %s the %s bundle differs too much from the original (%s): again with float32",
                    opened.plans[name].kv_dtype,
                    name,
                    "; ".join(_failures(manifest)[name]),
                )
            kv_dtypes = {name: "float32" if name in small else plan.kv_dtype for name, plan in opened.plans.items()}
            opened = replace(opened, plans=_plan(options, source, opened.recipe, opened.target, kv_dtypes))
            shutil.rmtree(bundle)
            bundle.mkdir()
            manifest = _lower_and_verify(options, opened, quantized, learnt, bundle, progress, stages)
        if _failures(manifest):
            raise _gate_failed(options, out, bundle, _failures(manifest))
        if options.save_checkpoint:
            options.save_checkpoint.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(checkpoint, options.save_checkpoint)
    return Export(out, manifest, stages)


def _check_checkpoint_place(kept: Path | None, out: Path) -> None:
    """Refuse a folder for the checkpoint that could not be written in the end, before any work."""
    if kept is None:
        return
    if kept.exists():
        raise InputError(f"{kept} exists; pass another folder to --save-checkpoint")
    inner, outer = kept.resolve(), out.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise InputError(f"--save-checkpoint {kept} and the bundle {out}: one would lie in the other; pass two folders")
    parent = next(parent for parent in inner.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"cannot write in {parent}; pass another folder to --save-checkpoint")


def _choose_gate(source: Checkpoint | QuantizedCheckpoint, context: int, level: str) -> gate.Gate | None:
    """The gate's tokens; a tokenizer that cannot be used shows here, also when nothing is verified."""
    tokenizer = source.folder / TOKENIZER_FILE
    if level == "none":
        if tokenizer.is_file():
            open_tokenizer(tokenizer, WAY_OUT)
        return None
    config = source.config
    return gate.make_gate(
        tokenizer if tokenizer.is_file() else None, config.vocab_size, config.bos_token_id, context, level
    )


def _lower_and_verify(
    options: ExportOptions,
    opened: Opened,
    quantized: QuantizedCheckpoint,
    learnt: dict[str, Any],
    bundle: Path,
    progress: Progress,
    stages: list[Stage],
) -> Manifest:
    """The bundle's files, and what the gate found of them; nobody has looked at that yet."""
    source, entries = opened.source, {}
    for backend, plan in opened.plans.items():
        cache = planning.geometry(source.config, plan.context, plan.prefill_chunk, plan.kv_dtype, backend=backend)
        with stage(stages, f"lower {backend}"), progress(f"export {backend}", plan.weights_bytes, True) as advance:
            settings = importlib.import_module(BACKENDS[backend]).lower(
                quantized, cache, bundle, float_bits=opened.recipe.float_bits, progress=advance
            )
        entries[backend] = BackendEntry(
            cache, convert(plan.to_json(), PlanEntry), typed_settings(backend, settings), identity=""
        )
    with stage(stages, "hash"):
        has_tokenizer = _copy_tokenizer(source.folder, bundle)
        manifest = _manifest(options, opened, quantized, entries, has_tokenizer, bundle, learnt)
        (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    chosen = _choose_gate(source, opened.context, options.verify)
    if chosen is not None:
        with stage(stages, "verify"):
            found = _verify(chosen, opened, quantized, manifest, bundle, progress)
        manifest = replace(manifest, verification=convert(found, dict[str, GateResult]))
        (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _failures(manifest: Manifest) -> dict[str, list[str]]:
    """What is out of bounds, by backend; none where nothing is."""
    return {name: list(result.failures) for name, result in manifest.verification.items() if result.failures}


def _verify(
    chosen: gate.Gate,
    opened: Opened,
    quantized: QuantizedCheckpoint,
    manifest: Manifest,
    bundle: Path,
    progress: Progress,
) -> dict[str, Any]:
    config = opened.source.config
    caches = {name: entry.cache for name, entry in manifest.backends.items()}
    bits = [config.bits if config else opened.recipe.float_bits for config in quantized.configs.values()]
    limits = {name: LIMITS[min(*bits, bits_of(cache.dtype))] for name, cache in caches.items()}
    chunk = scored_at_once(next(iter(caches.values())).prefill_chunk, config.vocab_size)
    total = gate.steps(config.num_hidden_layers, len(chosen.ids), chunk, len(caches))
    with progress(f"verify ({len(chosen.ids)} tokens)", total, False) as advance:
        return gate.verify(
            bundle,
            opened.source,
            quantized,
            chosen,
            context=opened.context,
            limits=limits,
            pythons=opened.pythons,
            progress=advance,
        )


def _failed_place(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed")


def _gate_failed(options: ExportOptions, out: Path, bundle: Path, failures: dict[str, list[str]]) -> InputError:
    found = "; ".join(f"{name}: {failure}" for name, found in failures.items() for failure in found)
    if not options.keep_failed:
        return InputError(
            f"{out} not made: it differs too much from the original ({found}); --keep-failed keeps it to look at"
        )
    kept = _failed_place(out)
    refuse_existing(kept, options.force)  # somebody may have made it in the meantime
    shutil.rmtree(kept, ignore_errors=True)
    bundle.rename(kept)
    return InputError(f"{out} not made: it differs too much from the original ({found}); it lies in {kept}")


def _check_disk(work: Path, opened: Opened) -> None:
    """Refuse what will not fit: the export in its folder, the calibration in its cache, and both where they share a disk."""
    out = next(parent for parent in work.absolute().parents if parent.exists())
    needs = [(out, planning.disk_bytes(opened.plans.values()), "pass -o on another disk")]
    if opened.calibration is not None and isinstance(opened.source, Checkpoint):
        kept = cache.calibration_folder(layerwise.key_of(opened.source, opened.recipe, opened.calibration))
        need = layerwise.missing_bytes(kept, opened.source.config, opened.recipe, opened.calibration)
        if need:
            needs.append((kept, need, f"set {cache.VARIABLE} to a folder on another disk"))
    for folder, _, way_out in needs:
        disk = folder.stat().st_dev
        need = sum(need for other, need, _ in needs if other.stat().st_dev == disk)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise InputError(
                f"no space for the export: it needs {need / GIB:.2f} GiB in {folder},"
                f" {free / GIB:.2f} GiB are free; free some, or {way_out}"
            )


def _copy_tokenizer(folder: Path, bundle: Path) -> bool:
    """Copy tokenizer and chat files; whether the bundle can turn text into tokens."""
    hub.copy_companions(folder, bundle)
    if (bundle / TOKENIZER_FILE).is_file():
        return True
    logger.warning("%s has no tokenizer.json: the bundle takes and gives token ids, not text", folder)
    return False


def _manifest(
    options: ExportOptions,
    opened: Opened,
    quantized: QuantizedCheckpoint,
    backends: dict[str, BackendEntry[Any]],
    has_tokenizer: bool,
    bundle: Path,
    learnt: dict[str, Any],
) -> Manifest:
    config, recipe, target = opened.source.config, opened.recipe, opened.target
    made = {**recipe.to_json(), "parts": parts(quantized, recipe.float_bits), "calibration": learnt}
    manifest = Manifest(
        model=ModelEntry(
            opened.name, "gemma2", config.num_parameters, lora=options.lora.name if options.lora else None
        ),
        config=typed_config(config.to_json()),
        recipe=convert(made, RecipeEntry),
        target=TargetEntry(target.name, target.ram_bytes, target.threads),
        backends=backends,
        files=list_files(bundle),
        tokenizer=has_tokenizer,
        tools=tool_versions(),
        verification={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return with_identities(manifest)


def to_json(done: Export) -> dict[str, Any]:
    """The result of an export for `--json`."""
    return {
        "bundle": str(done.bundle),
        "manifest": json.loads(done.manifest.to_json()),
        "stages": [asdict(stage) for stage in done.stages],
    }
