"""The functions of the public API. Each imports what it calls when it is called."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemma_edge.progress import Progress, no_progress

if TYPE_CHECKING:
    from gemma_edge.bundle.manifest import Manifest
    from gemma_edge.evaluate.options import EvaluationOptions
    from gemma_edge.evaluate.result import Evaluation
    from gemma_edge.export.api import Export
    from gemma_edge.export.options import ExportOptions
    from gemma_edge.export.plan import Plan
    from gemma_edge.quantize.api import QuantizedModel
    from gemma_edge.quantize.options import QuantizeOptions
    from gemma_edge.runtimes.engines.base import Runtime
    from gemma_edge.sweep.options import SweepOptions
    from gemma_edge.sweep.result import SweepResult


def load(
    bundle: str | Path,
    *,
    backend: str | None = None,
    threads: int | None = None,
    accelerator: str | None = None,
    adapter: str | Path | None = None,
) -> Runtime:
    """Open a bundle and return its runtime, ready for `prefill`, `decode` and `score`.

    Args:
        bundle: the bundle's folder, made by `export` or `gemma-export`.
        backend: which backend of the bundle to use; None takes the first one that is installed.
        threads: threads for the matrix products; None takes the default of the bundle's target.
        accelerator: what computes: "cpu", or what the backend was made for; None takes that.
        adapter: the folder of one that `gemma-export adapter` made for this bundle.

    Raises:
        InputError: the folder is not a bundle, is damaged, or needs a package that is not installed.
    """
    from gemma_edge.runtimes.engines.load import open_runtime

    return open_runtime(bundle, backend=backend, threads=threads, accelerator=accelerator, adapter=adapter)


def inspect(bundle: str | Path, *, check_hashes: bool = False) -> Manifest:
    """Read what a bundle says of itself, and check that its files are there with the right size.

    Args:
        bundle: the bundle's folder.
        check_hashes: also compare every file with the hash in the manifest.

    Raises:
        InputError: the folder is not a bundle, or a file is missing, truncated or changed.
    """
    from gemma_edge.bundle import manifest as module

    folder = Path(bundle)
    manifest = module.Manifest.load(folder)
    if check_hashes:
        module.check_hashes(folder, manifest)
    return manifest


def export(options: ExportOptions, progress: Progress = no_progress) -> Export:
    """Make a bundle and verify it. It appears at `options.out` complete, or not at all.

    Args:
        options: the model, the target, and what is to differ from the defaults.
        progress: called with (what, total, in_bytes) for each longer piece of work; returns a context manager that gives a
            function to call with the amount just done.

    Raises:
        InputError: the model or an option cannot be used, the disk is too small, or the bundle failed the gate.
    """
    from gemma_edge.export import api

    return api.export(options, progress)


def plan(options: ExportOptions, progress: Progress = no_progress) -> dict[str, Plan]:
    """Predict file sizes and memory of an export, before any work. Reads headers only.

    With a budget (`size` or `bpw`) it first measures what rounding each weight costs, which takes minutes for a large model.

    Returns:
        The prediction for each backend, by its name.

    Raises:
        InputError: the model, an option or the target cannot be used.
    """
    from gemma_edge.export import api

    return dict(api.open_model(options, progress, plan_only=True).plans)


def quantize(
    model: str | Path,
    out: str | Path,
    options: QuantizeOptions | None = None,
    *,
    lora: str | Path | None = None,
    vocab: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> QuantizedModel:
    """Make the quantized checkpoint alone, without a bundle: a Hugging Face folder that transformers and vLLM load too.

    Args:
        model: a Hugging Face folder or id, or a GGUF file.
        out: the new folder; it appears complete, or not at all.
        options: bits, group size, method, calibration text; None takes the defaults.
        lora: a PEFT adapter, a folder or a Hugging Face id, merged before the weights are quantized.
        vocab: a text whose tokens alone are kept, or auto: and a text.
        force: replace a quantized checkpoint that is there.
        progress: as for `export`.

    Raises:
        InputError: the model or an option cannot be used, or `out` exists.
    """
    from gemma_edge.quantize import api
    from gemma_edge.quantize.options import QuantizeOptions

    chosen = options or QuantizeOptions()
    return api.quantize(str(model), Path(out), chosen, lora=lora, vocab=vocab, force=force, progress=progress)


def evaluate(options: EvaluationOptions, progress: Progress = no_progress) -> Evaluation:
    """Measure bundles and Hugging Face folders side by side on the same tokens: perplexity, and KL and top-1 to a reference.

    Raises:
        InputError: a model, a text or a number that cannot be used.
    """
    from gemma_edge.evaluate import evaluate as module

    return module.evaluate(options, progress)


def sweep(options: SweepOptions, progress: Progress = no_progress) -> SweepResult:
    """Export a model in every combination of a space, measure each bundle, and publish the best one within limits.

    Call it under `if __name__ == "__main__":`, because every unit of its work is a process that imports the calling script.

    Raises:
        InputError: the model, an option or the storage cannot be used, or no point keeps to the limits.
    """
    from gemma_edge.sweep import sweep as module

    return module.sweep(options, progress)


class _CallablePackage(ModuleType):
    """A package that is called like the function of the same name: `gemma_edge.export(...)` and `gemma_edge.export.api`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the public function."""
        return _FUNCTIONS[self.__name__](*args, **options)


_FUNCTIONS = {f"gemma_edge.{function.__name__}": function for function in (export, quantize, evaluate, sweep)}


def callable_package(name: str) -> None:
    """Let a package be called. Importing it puts it in the place of the public function that has its name."""
    package = sys.modules[name]
    package.__class__ = _CallablePackage
    functools.update_wrapper(package, _FUNCTIONS[name], assigned=(), updated=())  # type: ignore[arg-type]
