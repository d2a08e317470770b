"""A bundle that is being made: each backend is lowered, the manifest is written, the gate judges.

When one backend must be made again, the others stay as they are, and so do the references that all are judged by.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma_edge.bundle.codec import convert
from gemma_edge.bundle.entries import BackendEntry, GateResult, PlanEntry
from gemma_edge.bundle.manifest import Manifest, confined, typed_settings
from gemma_edge.export.backend import LoweringTask, exporter
from gemma_edge.export.contents import Integers, copy_tokenizer, make_manifest
from gemma_edge.export.gate import verify as gate
from gemma_edge.export.gate.limits import limits_for
from gemma_edge.export.opened import Opened
from gemma_edge.export.plan import geometry
from gemma_edge.logits import scored_at_once
from gemma_edge.progress import Progress, Stage, stage


@dataclass
class Assembly:
    """A bundle in `work`, and what is known of it so far."""

    opened: Opened
    integers: Integers
    verify: str  # level of the gate
    work: Path  # a folder of its own with `bundle/` in it
    progress: Progress
    stages: list[Stage]
    _entries: dict[str, BackendEntry[Any]] = field(default_factory=dict)  # by backend that is lowered
    _files: dict[str, set[Path]] = field(default_factory=dict)  # by backend that is lowered
    _verification: dict[str, GateResult] = field(default_factory=dict)  # by backend that is judged
    _references: gate.References | None = None

    @property
    def bundle(self) -> Path:
        """The bundle's folder."""
        return self.work / "bundle"

    @property
    def failures(self) -> dict[str, list[str]]:
        """Figures that are out of bounds, by backend that failed the gate."""
        return {name: list(result.failures) for name, result in self._verification.items() if result.failures}

    def adopt(self, bundle: Path) -> None:
        """Take over a bundle that was lowered before, from the same integers and with the same plans."""
        shutil.copytree(bundle, self.bundle, dirs_exist_ok=True)
        manifest = Manifest.load(bundle)
        for name in self.opened.plans:
            self._entries[name] = manifest.backends[name]
            self._files[name] = {confined(self.bundle, file) for file in manifest.backends[name].files}

    def forget(self, backends: Iterable[str], opened: Opened) -> None:
        """Have `make` make backends again, after a change of plan.

        Args:
            backends: the backends whose plan changed.
            opened: with the new plans. A change of the context concerns every backend, and the references.
        """
        if opened.context != self.opened.context:
            backends, self._references = list(self._entries), None
        for name in backends:
            del self._entries[name]
            self._verification.pop(name, None)
            for path in self._files.pop(name):
                path.unlink()
        self.opened = opened

    def make(self) -> Manifest:
        """Lower and judge every backend for which that is not done. The manifest lies in the bundle, too.

        Raises:
            InputError: a backend cannot hold a weight.
            RuntimeError: a file is not what it should be, or the bundle does not run.
        """
        for name in self.opened.plans:
            if name not in self._entries:
                self._lower(name)
        with stage(self.stages, "hash"):
            has_tokenizer = copy_tokenizer(self.opened.source, self.bundle)
            entries = {name: self._entries[name] for name in self.opened.plans}
            manifest = make_manifest(self.opened, self.integers, entries, self.bundle, has_tokenizer=has_tokenizer)
            manifest.save(self.bundle)
        chosen = gate.choose_gate(self.opened.source, self.opened.context, self.verify)
        if chosen is not None and any(map(gate.can_judge, entries.values())):
            with stage(self.stages, "verify"):
                self._judge(chosen)
            manifest = replace(
                manifest,
                verification={name: self._verification[name] for name in entries if name in self._verification},
            )
            manifest.save(self.bundle)
        return manifest

    def _lower(self, name: str) -> None:
        plan, quantized = self.opened.plans[name], self.integers.quantized
        backend = exporter(name, plan.accelerator)
        sizes = plan.context, plan.prefill_chunk, plan.kv_dtype
        cache = geometry(quantized.config, *sizes, pinned=plan.pinned, backend=name, accelerator=plan.accelerator)
        float_bits, before = self.opened.recipe.float_bits, set(self.bundle.rglob("*"))
        with (
            stage(self.stages, f"lower {name}"),
            self.progress(f"export {name}", plan.weights_bytes, True) as advance,
        ):
            task = LoweringTask(quantized, cache, self.bundle, float_bits, advance)
            settings = backend.lower(task)
            backend.check(task)
        self._files[name] = {path for path in self.bundle.rglob("*") if path not in before and path.is_file()}
        predicted = convert(plan.to_json(), PlanEntry)
        self._entries[name] = BackendEntry(cache, predicted, typed_settings(name, settings), "", predicted.accelerator)

    def _judge(self, chosen: gate.Gate) -> None:
        """Judge what is not judged yet; compute the references if nobody has."""
        opened, quantized = self.opened, self.integers.quantized
        config = opened.source.config
        waiting = {
            name: entry.cache
            for name, entry in self._entries.items()
            if name not in self._verification and gate.can_judge(entry)
        }
        bits = [config.bits if config else opened.recipe.float_bits for config in quantized.configs.values()]
        limits = {name: limits_for(bits, cache.dtype) for name, cache in waiting.items()}
        chunk = scored_at_once(next(iter(waiting.values())).prefill_chunk, config.vocab_size)
        steps = gate.judging_steps(len(chosen.ids), chunk, len(waiting))
        if self._references is None:
            steps += gate.reference_steps(config.num_hidden_layers)
        with self.progress(f"verify ({len(chosen.ids)} tokens)", steps, False) as advance:
            if self._references is None:
                folder = self.work / "gate"
                folder.mkdir(exist_ok=True)
                self._references = gate.save_references(
                    folder, chosen, opened.context, opened.source, quantized, advance
                )
            results = gate.verify(self.bundle, self._references, limits, pythons=opened.pythons, progress=advance)
        self._verification |= gate.typed(results)
