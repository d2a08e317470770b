"""Makes an adapter beside a bundle: `gemma-export adapter`. The pair passes the gate, or nothing is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.numpy import save

from gemma_edge.bundle.accelerators import CPU
from gemma_edge.bundle.entries import GateResult
from gemma_edge.bundle.manifest import Manifest, check_hashes, list_files, total_bytes
from gemma_edge.bundle.staging import Kind, refuse_existing, staged
from gemma_edge.errors import InputError
from gemma_edge.export.adapter.factors import DTYPES, AdaptedWeights, Factors, factors_of, refolded, stored
from gemma_edge.export.gate import again
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.gate.verify import gate_pythons
from gemma_edge.export.onnx.adapted import write_graphs
from gemma_edge.model import hub
from gemma_edge.model.checkpoint import Weights, adaptable_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.lora import Lora
from gemma_edge.progress import Progress, no_progress
from gemma_edge.quantize.api import open_source
from gemma_edge.quantize.recipe import Recipe
from gemma_edge.runtimes.engines.adapter import ADAPTER, FACTORS, Adapter, AdapterManifest

BACKEND = "onnx"  # the only one whose graphs can take factors
KIND = Kind("adapter", "adapter", lambda folder: (folder / ADAPTER).exists())


@dataclass(frozen=True)
class AdapterOptions:
    """What a user can choose."""

    adapter: str | Path  # a PEFT folder or a Hugging Face id
    base: Path  # the bundle
    out: Path
    reference: str | None = None  # the bundle's original: a Hugging Face folder or id, or a GGUF file
    factors: str = "float16"  # how they are stored, one of DTYPES
    level: str = "quick"  # of the gate, one of LEVELS
    force: bool = False  # replace an adapter that is already there


@dataclass(frozen=True)
class MadeAdapter:
    """A finished adapter."""

    out: Path
    manifest: AdapterManifest

    @property
    def bytes(self) -> int:
        """Of all files that adapter.json lists."""
        return total_bytes(self.manifest.files)


def make_adapter(options: AdapterOptions, progress: Progress = no_progress) -> MadeAdapter:
    """Write an adapter's folder, and judge it with its bundle. It appears at `options.out` complete, or not at all.

    Raises:
        InputError: the adapter, the bundle or the reference cannot be used, or the pair failed the gate.
    """
    if options.factors not in DTYPES:
        raise InputError(field="factors", value=options.factors, allowed=DTYPES)
    if options.level not in LEVELS:
        raise InputError(field="verify", value=options.level, allowed=LEVELS)
    refuse_existing(options.out, options.force, KIND)
    manifest = _base(options.base)
    check_hashes(options.base, manifest)
    config = GemmaConfig(**asdict(manifest.config))
    lora = Lora.open(hub.resolve_adapter(options.adapter), adaptable_shapes(config))
    base = again.read_back(options.base, manifest, "make the bundle with gemma-export --backend onnx")
    factors = _factors(options, manifest, lora, base)
    with staged(options.out, force=options.force, kind=KIND) as work:
        folder = work / KIND.folder
        (folder / FACTORS).write_bytes(save(stored(factors, options.factors)))
        graphs = write_graphs(options.base, manifest.backends[BACKEND].settings, config, folder)
        made = AdapterManifest(
            name=Path(options.adapter).resolve().name if Path(options.adapter).is_dir() else str(options.adapter),
            base=manifest.backends[BACKEND].identity,
            backend=BACKEND,
            factors=options.factors,  # type: ignore[arg-type]  # checked above
            rank=max(a.shape[1] for a, _ in factors.values()),
            linears=len(factors),
            graphs=graphs,
            files=list_files(folder),
            verification=None,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        _save(folder, made)
        if LEVELS[options.level] is not None:
            result = _judged(options, manifest, base, folder, progress)
            if not result.passed:
                raise InputError(
                    f"{options.out} not made: the bundle with this adapter differs too much from"
                    f" {'the merged original' if options.reference else 'its own integers'} ({'; '.join(result.failures)})",
                    hint="use `factors` float32, or merge the adapter into a bundle of its own with gemma-export --lora",
                )
            if options.reference is not None:
                made = replace(made, verification=result)
                _save(folder, made)
    return MadeAdapter(options.out, made)


def _base(bundle: Path) -> Manifest:
    """The manifest of a bundle that can take adapters."""
    manifest = Manifest.load(bundle)
    if BACKEND not in manifest.backends:
        raise InputError(
            f"{bundle} holds only {', '.join(manifest.backends)}: adapters are switched by the {BACKEND} backend alone",
            field="base",
            value=bundle,
            hint=f"make one with gemma-export --backend {BACKEND}, or merge the adapter into it with gemma-export --lora",
        )
    accelerator = manifest.backends[BACKEND].accelerator
    if accelerator != CPU:
        raise InputError(
            f"{bundle} was made for the {accelerator}, where adapters are not switched",
            field="base",
            value=bundle,
            hint="make one without --accelerator, or merge the adapter into it with gemma-export --lora",
        )
    return manifest


def _factors(options: AdapterOptions, manifest: Manifest, lora: Lora, base: Weights) -> Factors:
    """The factors for the bundle's own form of the model."""
    factors = factors_of(lora, base.config)
    recipe = Recipe.from_json(asdict(manifest.recipe), str(options.base))
    if not recipe.folds:
        return factors
    if options.reference is None:
        raise InputError(
            f"{options.base} was made by a method that moves scales between weights (awq): the factors need the original",
            field="reference",
            value=None,
            hint="pass the model that the bundle was made from as `reference`",
        )
    return refolded(factors, _original(options, manifest, merged=False), base)


def _original(options: AdapterOptions, manifest: Manifest, *, merged: bool) -> Weights:
    """The float model that the bundle was made from, with or without the adapter."""
    assert options.reference is not None
    for field, made_with in (("lora", manifest.model.lora), ("vocab", manifest.model.vocabulary)):
        if made_with is not None:
            raise InputError(
                f"{options.base} was made with `{field}`, which is not in {options.reference}",
                field="reference",
                value=options.reference,
                hint="leave `reference` out, or pass a bundle that was made of the whole model",
            )
    source = open_source(options.reference, options.adapter if merged else None)
    again.check_model("reference", options.reference, source, manifest)
    return source


def _judged(options: AdapterOptions, manifest: Manifest, base: Weights, folder: Path, progress: Progress) -> GateResult:
    """The gate on the pair: against the merged original, and against the bundle's integers with the stored factors added."""
    opened = Adapter.open(folder)
    factors = {name: (torch.from_numpy(a), torch.from_numpy(b)) for name, (a, b) in opened.factors.items()}
    integers = AdaptedWeights(base, factors)
    original = integers if options.reference is None else _original(options, manifest, merged=True)
    chosen = again.VerifyOptions(options.base, backend=BACKEND, level=options.level)
    return again.judged(
        chosen, manifest, [BACKEND], gate_pythons([BACKEND], None), original, integers, progress, adapter=folder
    )[BACKEND]


def _save(folder: Path, manifest: AdapterManifest) -> None:
    (folder / ADAPTER).write_text(manifest.to_json(), encoding="utf-8")
