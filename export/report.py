"""Tables and progress bars for people, with the same numbers as `--json` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from gemma_edge.bundle.accelerators import CPU, DELEGATES
from gemma_edge.bundle.entries import BackendEntry, Difference, GateResult
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.report.console import ERR, OUT, plain, progress_bar, say, size

__all__ = ["ERR", "OUT", "progress_bar", "size"]

if TYPE_CHECKING:  # they import torch, which `inspect` does not need
    from gemma_edge.export.adapter.make import MadeAdapter
    from gemma_edge.export.api import Export
    from gemma_edge.export.gate.again import Verified
    from gemma_edge.export.plan import Plan
    from gemma_edge.progress import Stage
    from gemma_edge.quantize.api import QuantizedModel


PLAN_ROWS: dict[str, Callable[[Plan], str]] = {
    "accelerator": lambda plan: plan.accelerator,
    "context": lambda plan: f"{plan.context} tokens",
    "prefill chunk": lambda plan: f"{plan.prefill_chunk} tokens",
    "weights file": lambda plan: f"{size(plan.weights_bytes)} ({plan.weights_bytes} bytes)",
    "weights read per token": lambda plan: f"{size(plan.token_bytes)} ({plan.token_bytes} bytes)",
    "KV cache": lambda plan: f"{size(plan.kv_bytes)} ({plan.kv_bytes} bytes), {plan.kv_dtype}, never grows",
    "RAM on the device": lambda plan: f"about {size(plan.device_ram_bytes)} of {size(plan.device_ram_limit_bytes)}",
    "RAM for the export": lambda plan: f"about {size(plan.export_ram_bytes)}",
    "disk for the export": lambda plan: size(plan.export_disk_bytes),
}


def plan_table(plans: Sequence[Plan], parameters: int) -> Table:
    """What `gemma-export plan` shows: a column for each backend."""
    title = f"{plans[0].recipe} for {plans[0].target}, {parameters / 1e9:.2f} billion parameters"
    table = Table(title=plain(title), title_justify="left")
    table.add_column("what")
    for plan in plans:
        table.add_column(plan.backend, justify="right")
    for what, value in PLAN_ROWS.items():
        table.add_row(what, *(value(plan) for plan in plans))
    return table


def stages_table(title: str, stages: Sequence[Stage]) -> Table:
    """How long each stage took, and the peak of memory."""
    table = Table(title=plain(title), title_justify="left")
    for column in ("stage", "seconds", "peak RAM so far"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in stages:
        table.add_row(stage.name, f"{stage.seconds:.1f}", size(stage.peak_rss_bytes))
    return table


def files_table(manifest: Manifest) -> Table:
    """Files of a bundle."""
    table = Table(title="files", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("sha256")
    for name, entry in manifest.files.items():
        table.add_row(plain(name), str(entry.bytes), entry.sha256[:16])
    return table


def parts_table(manifest: Manifest) -> Table:
    """Bits per kind of weight."""
    table = Table(title=plain(f"weights: {manifest.recipe.name}"), title_justify="left")
    for column in ("part", "tensors", "bits", "group", "parameters", "size"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in manifest.recipe.parts:
        group = "float" if row.bits >= 16 else str(row.group_size or "channel")
        parameters = f"{row.weights / 1e6:.1f} M"
        table.add_row(plain(row.part), str(row.count), str(row.bits), group, parameters, size(row.bytes))
    return table


def gate_lines(manifest: Manifest) -> list[str]:
    """The gate's results, in sentences that claim no more than was measured."""
    unjudged = unjudged_lines(manifest.backends, manifest.verification)
    if not manifest.verification:
        return unjudged or ["NOT VERIFIED: exported with --verify none"]
    lines = [line for backend, result in manifest.verification.items() for line in _result_lines(backend, result)]
    return [*lines, *unjudged]


def unjudged_lines(backends: Mapping[str, BackendEntry[Any]], results: Mapping[str, GateResult]) -> list[str]:
    """What a reader must know of backends that were made for an accelerator on which nobody has judged them."""
    elsewhere = [
        f"{name}: NOT VERIFIED on the {entry.accelerator}, which it was made for, only on the {results[name].judged_on}"
        for name, entry in backends.items()
        if name in results and entry.accelerator != CPU and results[name].judged_on == CPU
    ]
    nowhere = [
        f"{name}: NOT VERIFIED, an experiment: nothing here runs {entry.accelerator}; run gemma-export verify where it does"
        for name, entry in backends.items()
        if name not in results and entry.accelerator in DELEGATES
    ]
    return [*elsewhere, *nowhere]


def _result_lines(backend: str, result: GateResult, quality_to: str = "to the original") -> list[str]:
    """One backend's result. `quality_to`: what its quality was compared with."""
    quality, lowering = result.quality, result.lowering
    wrap = "past" if result.past_wrap else "NOT past"
    accelerated = "" if result.judged_on == CPU else f" on {result.judged_on}"
    return [
        f"{backend}: {'passed' if result.passed else 'FAILED'} the {result.level} gate{accelerated}:"
        f" {result.fed_tokens} tokens fed, {wrap} the end of the context; text: {result.text}",
        f"  {quality_to} ({quality.tokens} positions): KL {quality.kl:.5f} nats,"
        f" same top token {quality.top1:.1%}, perplexity {quality.ppl_reference:.2f} -> {quality.ppl:.2f}"
        f" ({quality.ppl_change:+.2%}), max |logit difference| {quality.max_abs_logit_difference:.3f}",
        *_past_context(result.quality_past_context),
        f"  to the same integers in torch ({lowering.tokens} positions): KL {lowering.kl:.6f} nats,"
        f" max |logit difference| {lowering.max_abs_logit_difference:.4f}"
        f" of a range of {lowering.logit_range:.1f}",
        *(f"  out of bounds: {failure}" for failure in result.failures),
    ]


def _past_context(quality: Difference | None) -> list[str]:
    if quality is None:
        return []
    return [
        f"  of these past the context ({quality.tokens}): KL {quality.kl:.5f} nats,"
        f" same top token {quality.top1:.1%}, perplexity change {quality.ppl_change:+.2%}"
    ]


def print_export(done: Export) -> None:
    """The end of `gemma-export`."""
    ERR.print(stages_table(str(done.bundle), done.stages))
    ERR.print(parts_table(done.manifest))
    for line in gate_lines(done.manifest):
        say(ERR, line)
    say(ERR, f"{size(done.manifest.bytes)} in {done.bundle}; try: gemma-run {done.bundle} --prompt 'Hello'")


def print_verified(verified: Verified) -> None:
    """What `gemma-export verify` measured."""
    quality_to = "to the original" if verified.reference else "to the bundle's own integers in torch, every position"
    for backend, result in verified.results.items():
        for line in _result_lines(backend, result, quality_to):
            say(OUT, line)
    for line in unjudged_lines(verified.backends, verified.results):
        say(OUT, line)
    if not verified.reference:
        say(OUT, "what quantization costs was not measured: that needs --reference, the original model")


def print_adapter(made: MadeAdapter) -> None:
    """The end of `gemma-export adapter`."""
    manifest = made.manifest
    if manifest.verification is not None:
        for line in _result_lines(manifest.backend, manifest.verification, "to the merged original"):
            say(ERR, line)
    else:
        say(ERR, "NOT VERIFIED against the merged original: that needs --reference, the original model")
    say(
        ERR,
        f"{size(made.bytes)} in {made.out}: rank {manifest.rank}, {manifest.linears} linears, {manifest.factors}",
    )


def print_quantized(made: QuantizedModel) -> None:
    """The end of `gemma-export quantize`."""
    ERR.print(stages_table(str(made.path), made.stages))
    say(ERR, f"{made.recipe.name} in {made.path}; make a bundle of it: gemma-export {made.path}")


def quantized_to_json(made: QuantizedModel) -> dict[str, Any]:
    """The result of `gemma-export quantize` for `--json`."""
    return {
        "path": str(made.path),
        "recipe": made.recipe.to_json(),
        "weights": {name: config and asdict(config) for name, config in made.configs.items()},
        "calibration": dict(made.calibration),
        "stages": [asdict(stage) for stage in made.stages],
    }


def print_inspect(manifest: Manifest) -> None:
    """What `gemma-export inspect` shows."""
    model = manifest.model
    say(
        OUT,
        f"{model.name}: {model.parameters / 1e9:.3f} billion parameters, made {manifest.created} for"
        f" {manifest.target.name}, backends: {', '.join(manifest.backends)}",
    )
    if model.vocabulary is not None:
        kept, also = model.vocabulary, ", and every other token of the same characters"
        say(
            OUT,
            f"vocabulary: {kept.kept} of {kept.tokens} tokens, those of {', '.join(kept.text)}"
            f"{also if kept.by_characters else ''}",
        )
    for name, entry in manifest.backends.items():
        cache = entry.cache
        say(
            OUT,
            f"{name} on {entry.accelerator}: context {cache.context} tokens, chunks of {cache.prefill_chunk},"
            f" KV cache {size(cache.bytes)} ({cache.dtype})"
            + (f", {size(entry.plan.token_bytes)} of weights read per token" if entry.plan.token_bytes else ""),
        )
    OUT.print(files_table(manifest))
    OUT.print(parts_table(manifest))
    for line in gate_lines(manifest):
        say(OUT, line)
