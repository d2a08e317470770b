"""`gemma-export`: parses, calls api.py, prints with report.py. Heavy imports are inside the commands, for a quick --help."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from gemma_edge.bundle.accelerators import ACCELERATORS, CPU
from gemma_edge.bundle.backends import ALL, KV_DTYPES, registered
from gemma_edge.command import Command, DefaultGroup, clean_up_when_ended
from gemma_edge.export.bundle_cli import ADAPTER, COMMANDS, KEPT_TOKENS, OTHER_PYTHON, PATH, one_adapter
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.room import need_torch
from gemma_edge.export.targets import DEFAULT_CHUNK, DEFAULT_PINNED, TARGETS
from gemma_edge.files import check_writable, need, write_whole
from gemma_edge.model.hub import DEFAULT_MODEL
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions
from gemma_edge.quantize.recipe import BITS, DEFAULT_QUALITY, METHODS, QUALITIES

F = Callable[..., None]


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


SOURCE = (
    click.argument("model", default=DEFAULT_MODEL),
    ADAPTER,
    KEPT_TOKENS,
)
INTEGERS = (
    click.option(
        "--bits", type=int, help=f"Bits of the linear layers: {_list(BITS)}; 16 and 32 are floats. Default: 4."
    ),
    click.option("--group-size", type=int, help="Weights per scale, a multiple of 32; 0 means one scale per channel."),
    click.option(
        "--table-bits", type=click.Choice(["4", "8"]), help="Bits of the embedding table and the head. Default: 8."
    ),
    click.option(
        "--head-bits",
        type=click.Choice(["4", "8"]),
        help="Bits of the head alone, in integers of its own; the table keeps --embedding-bits. Default: 8.",
    ),
    click.option(
        "--embedding-bits",
        type=click.Choice(["4", "8"]),
        help="Bits of the table's rows that tokens look up, beside a head of its own. Default: 8.",
    ),
    click.option(
        "--bpw",
        type=float,
        help="Mixed precision: bits per weight of all matrices, the table among them; a scale counts 16 bits.",
    ),
    click.option(
        "--recipe",
        type=PATH,
        help="Take bits, groups and methods from a saved recipe or a bundle's manifest.json.",
    ),
    click.option(
        "--method", help=f"How integers are chosen: {_list(METHODS)}. Default: what suits bits and group size."
    ),
    click.option(
        "--quality",
        help=f"How thorough the search for 4-bit integers is: {_list(QUALITIES)}. Default: {DEFAULT_QUALITY}.",
    ),
    click.option(
        "--calibration",
        "calibration_text",
        type=PATH,
        multiple=True,
        help="Text to calibrate on: a file, a folder or JSON lines; may be repeated. Default: public-domain books.",
    ),
    click.option("--calibration-chat", is_flag=True, help="Put plain calibration text into chat form, for -it models."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed for choosing the calibration passages."),
)
# SIZE limits a backend's weights file, so `gemma-export quantize`, which writes none, does not have it.
SIZE = (click.option("--size", help="Mixed precision: largest size of the weights file, such as 1.4GB or 900MB."),)
WORK = (
    click.option(
        "--calibration-tokens",
        type=click.IntRange(256),
        help="Number of calibration tokens to use. Default: the number that the quality sets.",
    ),
    click.option(
        "--distill",
        type=click.IntRange(0),
        default=0,
        metavar="TOKENS",
        help="Train scales and norms on the original's logits afterwards, over this many tokens of text; this holds the"
        " whole model in memory.",
    ),
)
DEVICE = (
    click.option("--target", default="android", show_default=True, help=f"Class of devices: {_list(TARGETS)}."),
    click.option("--context", type=int, help="Tokens that the model can look back on. Default: what fits the target."),
    click.option(
        "--prefill-chunk", type=int, help=f"Largest number of prompt tokens in one call. Default: {DEFAULT_CHUNK}."
    ),
    click.option(
        "--pinned",
        type=int,
        metavar="TOKENS",
        help="Tokens at the beginning of a chat, such as its system turn, that the model can go on seeing beyond the context."
        f" Default: {DEFAULT_PINNED}, or a quarter of the context where that is less; 0 on web.",
    ),
    click.option(
        "--kv-bits",
        type=int,
        help=f"Bits of the KV cache: {_list(KV_DTYPES)}. Default: 8 on phones, if its scales are calibrated and the gate"
        " passes.",
    ),
    click.option(
        "--backend",
        help=f"Runtimes to export for: {_list(registered())}, several with commas, or {ALL} for"
        f" {_list(name for name, info in registered().items() if info.in_all)}. Default: the target's.",
    ),
    click.option(
        "--accelerator",
        default=CPU,
        show_default=True,
        help=f"What will compute the bundle: {_list(ACCELERATORS)}.",
    ),
    click.option("--ram", "ram_gib", type=float, help="GiB of memory that the app may take. Default: the target's."),
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of tables.")


def _options_of(*groups: Iterable[Callable[[F], F]]) -> Callable[[F], F]:
    """One decorator for all options of some groups."""

    def decorate(command: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


@click.group(cls=DefaultGroup, default="make", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-edge")
def main() -> None:
    """Export Gemma to a verified on-device bundle: gemma-export [MODEL] --target android --bits 4.

    MODEL is a Hugging Face folder or id, or a GGUF file. `gemma-export make --help` lists every option of an export.
    """


for _command in COMMANDS:
    main.add_command(_command)


@main.command(cls=Command)
@_options_of(SOURCE, INTEGERS, SIZE, WORK, DEVICE)
@click.option("-o", "--out", type=PATH, help="The bundle's folder. Default: a name made of model and recipe.")
@click.option("--verify", default="quick", show_default=True, help=f"How much text the gate checks: {_list(LEVELS)}.")
@OTHER_PYTHON
@click.option("--keep-failed", is_flag=True, help="Keep a bundle that fails the gate as OUT.failed.")
@click.option("--save-checkpoint", type=PATH, help="Also keep the quantized Hugging Face folder here.")
@click.option("--force", is_flag=True, help="Replace an existing bundle, and an OUT.failed.")
@JSON
def make(as_json: bool, **choices: Any) -> None:
    """Export MODEL (the default command)."""
    # before torch is loaded: a thread that waits must not spin, which beside other work costs most of an export's time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    clean_up_when_ended()
    options = _options(choices)
    from gemma_edge.export import api as pipeline
    from gemma_edge.export import report

    opened = pipeline.open_model(options, report.progress_bar)
    _say_how_long_calibration_takes(opened)
    done = pipeline.export(options, report.progress_bar, opened)
    if as_json:
        click.echo(json.dumps(pipeline.to_json(done), indent=1))
    else:
        report.print_export(done)


@main.command(name="quantize", cls=Command)
@_options_of(SOURCE, INTEGERS, WORK)
@click.option("-o", "--out", type=PATH, required=True, help="The folder of the quantized checkpoint.")
@click.option("--force", is_flag=True, help="Replace an existing quantized checkpoint.")
@JSON
def quantize_command(model: str, lora: tuple[str, ...], out: Path, as_json: bool, **choices: Any) -> None:
    """Quantize MODEL alone: a Hugging Face folder of integers, without a bundle.

    transformers and vLLM load the folder, and gemma-export takes it as a model.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in make
    clean_up_when_ended()
    need_torch()
    from gemma_edge.export import report
    from gemma_edge.quantize import api

    options, adapter = _quantize_options(choices), one_adapter(lora)
    made = api.quantize(model, out, options, lora=adapter, progress=report.progress_bar, **choices)
    if as_json:
        click.echo(json.dumps(report.quantized_to_json(made), indent=1))
    else:
        report.print_quantized(made)


@main.command(cls=Command)
@_options_of(SOURCE, INTEGERS, SIZE, DEVICE)
@click.option("--save-recipe", type=PATH, help="Write the recipe to this file, for --recipe.")
@click.option("--plot", type=PATH, help="Draw the bits of every weight into this file, as SVG.")
@JSON
def plan(as_json: bool, save_recipe: Path | None, plot: Path | None, **choices: Any) -> None:
    """Predict bytes and RAM of an export of MODEL, before any work.

    With --size or --bpw it first measures what rounding each weight costs. That takes minutes for a large model; the result is
    kept for the export.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in make
    options = _options(choices)
    from gemma_edge.export import api as pipeline
    from gemma_edge.export import report
    from gemma_edge.quantize.checkpoint.store import final_configs
    from gemma_edge.quantize.mixed import table as layers
    from gemma_edge.report import console

    if plot is not None:
        need("--plot", "matplotlib")
    for option, path in (("--save-recipe", save_recipe), ("--plot", plot)):
        if path is not None:
            check_writable(option, path)
    opened = pipeline.open_model(options, report.progress_bar, plan_only=True)
    configs = final_configs(opened.source, opened.recipe)
    if save_recipe is not None:
        write_whole(save_recipe, json.dumps(opened.recipe.to_json(), indent=1) + "\n")
    if plot is not None:
        from gemma_edge.quantize.mixed.plot import svg

        write_whole(plot, svg(opened.recipe.name, configs))
    if as_json:
        choice = {"mixed": opened.choice.to_json()} if opened.choice else {}
        plans = {backend: plan.to_json() for backend, plan in opened.plans.items()}
        click.echo(json.dumps({"plans": plans, **choice}, indent=1))
        return
    console.OUT.print(report.plan_table(list(opened.plans.values()), opened.source.num_parameters))
    if opened.choice or options.quantization.recipe:
        console.OUT.print(layers.bits_table(configs))
    if opened.choice:
        console.say(
            console.OUT,
            f"{opened.choice.bits_per_weight:.3f} bits per weight; predicted KL to the original, all weights together:"
            f" {opened.choice.predicted_kl:.5f} nats per token",
        )


def _quantize_options(choices: dict[str, Any]) -> QuantizeOptions:
    """Takes what belongs to the quantization out of `choices`."""
    text = CalibrationText(
        paths=choices.pop("calibration_text"),
        tokens=choices.pop("calibration_tokens", None) or 0,
        chat=choices.pop("calibration_chat"),
        seed=choices.pop("seed"),
    )
    tables = {name: choices.pop(name) for name in ("table_bits", "head_bits", "embedding_bits")}
    rest = {field.name: choices.pop(field.name) for field in fields(QuantizeOptions) if field.name in choices}
    bits = {name: value and int(value) for name, value in tables.items()}
    return QuantizeOptions(**{**rest, **bits, "calibration_text": text})


def _options(choices: dict[str, Any]) -> ExportOptions:
    need_torch()
    quantization, lora = _quantize_options(choices), one_adapter(choices.pop("lora"))
    return ExportOptions(**choices, lora=lora, quantization=quantization)


def _say_how_long_calibration_takes(opened: Any) -> None:
    if opened.calibration is None:
        return
    from gemma_edge.quantize.calibration.estimate import estimate_s

    minutes = estimate_s(opened.source.config, opened.recipe, opened.calibration) / 60
    click.echo(
        f"calibrating on {opened.calibration.windows.numel()} tokens:"
        f" {'under a minute' if minutes < 1 else f'about {minutes:.0f} minutes here, and it goes on where it was stopped'};"
        f" --quality fast needs no text and takes groups of {QUALITIES['fast'].group_size}: larger, slower, less exact",
        err=True,
    )
