"""The gate on a finished bundle, wherever it is: `gemma-export verify`. It runs the same text in the same way as after an export.

What it compares with is the original, where the user has it, and the bundle's own integers, read back from its files and run in
torch. Without the original only exporter and runtime are judged, and at every position: their limits hold instead of those for
quantization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from gemma_edge.bundle.backends import choose_backend
from gemma_edge.bundle.entries import BackendEntry, GateResult
from gemma_edge.bundle.manifest import MANIFEST, Manifest, check_hashes, confined
from gemma_edge.errors import InputError
from gemma_edge.export.backend import exporter
from gemma_edge.export.gate import verify as gate
from gemma_edge.export.gate.limits import LEVELS, Limits, limits_for
from gemma_edge.files import write_whole
from gemma_edge.logits import scored_at_once
from gemma_edge.model.checkpoint import Weights
from gemma_edge.progress import Progress, no_progress
from gemma_edge.quantize.api import open_source
from gemma_edge.quantize.checkpoint.store import open_weights
from gemma_edge.text.tokenizer import TOKENIZER_FILE

# UNCOMPARED: what may differ in a reference. A bundle's head may be another rounding of the table; token ids are the text's.
UNCOMPARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class VerifyOptions:
    """What a user can choose."""

    bundle: Path
    reference: str | None = None  # the original: a Hugging Face folder or id, or a GGUF file
    lora: str | Path | None = None  # the adapter that was merged into it
    vocab: str | None = None  # the text whose tokens were kept
    integers: Path | None = None  # the quantized checkpoint; None: the integers are read back from the bundle
    backend: str | None = None  # None: every backend of the bundle
    level: str = "quick"
    runtime_python: Path | None = None
    save: bool = False  # put the result into the manifest


@dataclass(frozen=True)
class Verified:
    """What the gate measured."""

    bundle: Path
    reference: str | None  # None: only the bundle's own integers
    results: dict[str, GateResult]  # by backend; without a reference, `quality` is the comparison with the integers
    backends: Mapping[str, BackendEntry[Any]]  # the manifest's

    @property
    def passed(self) -> bool:
        """Whether every backend did."""
        return all(result.passed for result in self.results.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure that is not finite is null."""
        return {
            "bundle": str(self.bundle),
            "reference": self.reference,
            "passed": self.passed,
            "verification": json.loads(msgspec.json.encode({name: asdict(one) for name, one in self.results.items()})),
        }


def verify_bundle(options: VerifyOptions, progress: Progress = no_progress) -> Verified:
    """Judge a bundle. It stays as it is, but for the manifest where `save` asks for that.

    Raises:
        InputError: the folder is not a bundle or was changed, the reference is another model, or nothing can be compared with.
    """
    if options.level not in LEVELS or options.level == "none":
        raise InputError(field="level", value=options.level, allowed=[name for name, level in LEVELS.items() if level])
    if options.save and options.reference is None:
        raise InputError(
            "`save` needs `reference`: without the original nobody knows what quantization costs", field="save"
        )
    bundle, manifest = options.bundle, Manifest.load(options.bundle)
    check_hashes(bundle, manifest)
    names = list(manifest.backends) if options.backend is None else [choose_backend(bundle, manifest, options.backend)]
    for name in names:
        if not gate.can_judge(manifest.backends[name]):
            made_for = manifest.backends[name].accelerator
            raise InputError(
                f"{bundle}: nothing here runs {made_for}; run the gate on a machine that does", field="bundle"
            )
    pythons = gate.gate_pythons(names, options.runtime_python)
    original, integers = _original(options, manifest), _integers(options, manifest)
    results = judged(options, manifest, names, pythons, original or integers, integers, progress)
    if options.save:
        now = Manifest.load(bundle)
        if now != manifest:
            raise InputError(f"{bundle} was replaced while it was judged; judge it again")
        saved = replace(manifest, verification={**manifest.verification, **results})
        write_whole(bundle / MANIFEST, saved.to_json())
    return Verified(bundle, options.reference, results, manifest.backends)


def _original(options: VerifyOptions, manifest: Manifest) -> Weights | None:
    """The float model, if it was given and is the bundle's."""
    if options.reference is None:
        for field in ("lora", "vocab"):
            if getattr(options, field) is not None:
                raise InputError(f"`{field}` has no effect without `reference`; leave it out", field=field)
        return None
    for field, made_with in (("lora", manifest.model.lora), ("vocab", manifest.model.vocabulary)):
        if (getattr(options, field) is None) != (made_with is None):
            without = "with" if made_with is not None else "without"
            raise InputError(
                f"{options.bundle} was made {without} `{field}`: it has to be judged {without} it", field=field
            )
    source = open_source(options.reference, options.lora, options.vocab)
    check_model("reference", options.reference, source, manifest)
    return source


def check_model(field: str, value: object, weights: Weights, manifest: Manifest) -> None:
    """Refuse the weights of another model than the bundle's."""
    for each in fields(manifest.config):
        ours, other = getattr(manifest.config, each.name), getattr(weights.config, each.name)
        if each.name not in UNCOMPARED and ours != other:
            raise InputError(
                f"`{field}` {value} is another model: its {each.name} is {other}, the bundle's is {ours}",
                field=field,
                value=value,
            )


def _integers(options: VerifyOptions, manifest: Manifest) -> Weights:
    """The integers of the checkpoint, else those of the first backend whose files can be read back."""
    if options.integers is not None:
        weights = open_weights(options.integers)
        check_model("integers", options.integers, weights, manifest)
        if min(_bits(manifest)) < 16 and not weights.is_quantized:
            raise InputError(
                f"`integers` {options.integers} holds float weights, the bundle integers; pass the checkpoint that"
                " --save-checkpoint kept",
                field="integers",
                value=options.integers,
            )
        return weights
    return read_back(options.bundle, manifest, "pass the checkpoint that --save-checkpoint kept as `integers`")


def read_back(bundle: Path, manifest: Manifest, hint: str) -> Weights:
    """The integers of the first backend of a bundle whose files can be read back.

    Raises:
        InputError: it holds other backends only; `hint` says what to do.
    """
    for name, entry in manifest.backends.items():
        stored = exporter(name).stored(bundle, entry.settings, manifest.config)
        if stored is not None:
            return stored
    raise InputError(
        f"{bundle} holds only {', '.join(manifest.backends)}, whose integers cannot be read back; {hint}",
        field="integers",
    )


def judged(
    options: VerifyOptions,
    manifest: Manifest,
    names: list[str],
    pythons: Mapping[str, str],
    original: Weights,
    integers: Weights,
    progress: Progress,
    adapter: Path | None = None,
) -> dict[str, GateResult]:
    """Run the gate on the named backends of a bundle, with an adapter where there is one."""
    config, cache = manifest.config, manifest.backends[names[0]].cache
    tokenizer = confined(options.bundle, TOKENIZER_FILE) if manifest.tokenizer else None
    chosen = gate.make_gate(tokenizer, config.vocab_size, config.bos_token_id, cache.context, options.level)
    steps = gate.reference_steps(config.num_hidden_layers)
    steps += gate.judging_steps(len(chosen.ids), scored_at_once(cache.prefill_chunk, config.vocab_size), len(names))
    with (
        TemporaryDirectory(prefix="gemma-edge-") as folder,
        progress(f"verify ({len(chosen.ids)} tokens)", steps, False) as advance,
    ):
        references = gate.save_references(Path(folder), chosen, cache.context, original, integers, advance)
        limits = {name: limits_of(manifest, name, of_integers=original is integers) for name in names}
        found = gate.verify(options.bundle, references, limits, pythons=pythons, adapter=adapter, progress=advance)
    return gate.typed(found)


def limits_of(manifest: Manifest, backend: str, *, of_integers: bool = False) -> Limits:
    """What a backend of a bundle must reach.

    Args:
        manifest, backend: the bundle's, and which of its backends.
        of_integers: it is compared with the integers alone, to which it must be as near as a lowering.
    """
    limits = limits_for(_bits(manifest), manifest.backends[backend].cache.dtype)
    return replace(limits, kl=limits.lowering_kl) if of_integers else limits


def _bits(manifest: Manifest) -> list[int]:
    """Of the matrices of a bundle, part by part."""
    return [part.bits for part in manifest.recipe.parts] or [manifest.recipe.float_bits]
