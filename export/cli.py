"""`gemma-export`: parses, calls pipeline.py, prints with report.py. Heavy imports are inside the commands, for a quick --help."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from gemma_edge.bundle.backends import ALL, ALL_BACKENDS, BACKENDS, KV_DTYPES
from gemma_edge.command import Command, Group
from gemma_edge.errors import InputError
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.targets import DEFAULT_CHUNK, TARGETS
from gemma_edge.files import check_writable, need, write_whole
from gemma_edge.model.hub import DEFAULT_MODEL
from gemma_edge.quantize.recipe import BITS, DEFAULT_QUALITY, METHODS, QUALITIES

F = Callable[..., None]


class DefaultCommand(Group):
    """A group whose first command may be left out: `gemma-export FOLDER` is `gemma-export make FOLDER`."""

    default = "make"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front unless another one, or the group's help, is asked for."""
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h", "--version")):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


def _model_options(command: F) -> F:
    """Options of a model, its integers and its target: those that decide a plan."""
    options = [
        click.argument("model", default=DEFAULT_MODEL),
        click.option("--target", default="android", show_default=True, help=f"One of {_list(TARGETS)}."),
        click.option(
            "--bits",
            type=int,
            help=f"Of the linears: {_list(BITS)}; from 16 on they stay float. Default: 4.",
        ),
        click.option("--group-size", type=int, help="Weights per scale, a multiple of 32; 0 = one per channel."),
        click.option("--table-bits", type=click.Choice(["4", "8"]), help="Of the tied table. Default: 8."),
        click.option("--size", help="Mixed precision: the weights file takes at most this, such as 1.4GB or 900MB."),
        click.option(
            "--bpw",
            type=float,
            help="Mixed precision: bits per weight of all matrices, the table among them; a scale counts 16 bits.",
        ),
        click.option(
            "--recipe",
            type=click.Path(dir_okay=False, path_type=Path),
            help="A saved recipe, or that of a bundle's manifest.json.",
        ),
        click.option(
            "--method", help=f"How integers are found: {_list(METHODS)}. Default: what suits bits and group size."
        ),
        click.option(
            "--quality",
            help=f"How hard 4-bit integers are searched for: {_list(QUALITIES)}. Default: {DEFAULT_QUALITY}.",
        ),
        click.option(
            "--calibration",
            "calibration_text",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Text to calibrate on: a file, a folder or JSON lines; may be repeated. Default: public-domain books.",
        ),
        click.option(
            "--calibration-chat", is_flag=True, help="Put plain text into the form of a chat, for -it models."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the passages drawn from it."),
        click.option("--context", type=int, help="Tokens the model looks back on. Default: what fits the target."),
        click.option("--prefill-chunk", type=int, help=f"Most prompt tokens in one call. Default: {DEFAULT_CHUNK}."),
        click.option(
            "--kv-bits",
            type=int,
            help=f"Of the KV cache: {_list(KV_DTYPES)}. Default: 8 on phones, with calibrated scales and if the gate passes.",
        ),
        click.option(
            "--backend",
            help=f"Runtimes to export for: {_list(BACKENDS)}, several with commas, or {ALL} for"
            f" {_list(ALL_BACKENDS)}. Default: the target's.",
        ),
        click.option("--lora", type=click.Path(path_type=Path), help="PEFT adapter folder to merge."),
        click.option("--ram", "ram_gib", type=float, help="GiB that the app may take. Default: the target's."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of tables."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=DefaultCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-edge")
def main() -> None:
    """Export Gemma 2 to a verified on-device bundle: gemma-export [MODEL] --target android --bits 4.

    MODEL is a Hugging Face folder or id. `gemma-export make --help` lists every option; `plan` predicts, `inspect` looks.
    """


@main.command(cls=Command)
@_model_options
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="The bundle's folder. Default: named by model and recipe."
)
@click.option("--verify", default="quick", show_default=True, help=f"How far the gate looks: {_list(LEVELS)}.")
@click.option(
    "--runtime-python",
    type=click.Path(path_type=Path),
    envvar="GEMMA_EDGE_RUNTIME_PYTHON",
    show_envvar=True,
    help="Python with gemma-edge and a runtime that this one lacks (tflite-runtime): the gate runs there.",
)
@click.option("--keep-failed", is_flag=True, help="Keep a bundle that fails the gate as OUT.failed.")
@click.option(
    "--save-checkpoint", type=click.Path(path_type=Path), help="Also keep the quantized Hugging Face folder here."
)
@click.option(
    "--calibration-tokens", type=click.IntRange(256), help="How much of it. Default: what the quality asks for."
)
@click.option(
    "--distill",
    type=click.IntRange(0),
    default=0,
    metavar="TOKENS",
    help="Afterwards train scales and norms on the original's logits; holds the whole model in memory.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle, and an OUT.failed.")
def make(as_json: bool, **choices: Any) -> None:
    """Export MODEL (the default command)."""
    # before torch is loaded: a thread that waits must not spin, which beside other work costs most of an export's time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed export cleans up too
    options = _options(choices)
    from gemma_edge.export import api as pipeline
    from gemma_edge.export import report

    _show_warnings()
    opened = pipeline.open_model(options, report.progress_bar)
    _say_how_long_calibration_takes(opened)
    done = pipeline.export(options, report.progress_bar, opened)
    if as_json:
        click.echo(json.dumps(pipeline.to_json(done), indent=1))
    else:
        report.print_export(done)


@main.command(cls=Command)
@_model_options
@click.option("--save-recipe", type=click.Path(path_type=Path), help="Write the recipe here, for --recipe.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the bits of every weight here, as SVG.")
def plan(as_json: bool, save_recipe: Path | None, plot: Path | None, **choices: Any) -> None:
    """Predict bytes and RAM of an export of MODEL, before any work.

    With --size or --bpw it measures first what rounding each weight costs: minutes for a large model, kept for the export.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in make
    options = _options(choices)
    from gemma_edge.export import api as pipeline
    from gemma_edge.export import report
    from gemma_edge.quantize.checkpoint.store import final_configs
    from gemma_edge.quantize.mixed import table as layers

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
    report.OUT.print(report.plan_table(list(opened.plans.values()), opened.source.config.num_parameters))
    if opened.choice or options.recipe:
        report.OUT.print(layers.bits_table(configs))
    if opened.choice:
        report.OUT.print(
            f"{opened.choice.bits_per_weight:.3f} bits per weight; predicted KL to the original, all weights together:"
            f" {opened.choice.predicted_kl:.5f} nats per token",
            highlight=False,
            soft_wrap=True,
        )


@main.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--check-hashes", is_flag=True, help="Compare every file with its hash.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
def inspect(bundle: Path, check_hashes: bool, as_json: bool) -> None:
    """Show what a BUNDLE holds and what the gate found."""
    from gemma_edge.bundle import manifest as bundles
    from gemma_edge.export import report

    manifest = bundles.Manifest.load(bundle)
    if check_hashes:
        with report.progress_bar(
            "check hashes", sum(entry.bytes for entry in manifest.files.values()), True
        ) as advance:
            bundles.check_hashes(bundle, manifest, advance)
        click.echo(f"{len(manifest.files)} files: every hash is the manifest's", err=True)
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        report.print_inspect(manifest)


@main.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file. Default: BUNDLE's name with .litertlm.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def litertlm(bundle: Path, out: Path | None, force: bool) -> None:
    """Write a tflite BUNDLE as one file for LiteRT-LM and the AI Edge Gallery."""
    from gemma_edge.export.tflite.litertlm import write_litertlm

    out = out or Path(f"{bundle.resolve().name}.litertlm")
    write_litertlm(bundle, out, force=force)
    click.echo(f"{out.stat().st_size / 1e6:.1f} MB in {out}", err=True)


def _options(choices: dict[str, Any]) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "exporting needs PyTorch, which this installation leaves out: pip install 'gemma-edge[export]'"
        )
    from gemma_edge.export.options import ExportOptions
    from gemma_edge.quantize.calibration.text import Source

    text = Source(
        paths=choices.pop("calibration_text", ()),
        tokens=choices.pop("calibration_tokens", None) or 0,
        chat=choices.pop("calibration_chat", False),
        seed=choices.pop("seed", 0),
    )
    table_bits = choices.pop("table_bits")
    return ExportOptions(**choices, table_bits=table_bits and int(table_bits), text=text)


def _show_warnings() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("gemma_edge").addHandler(handler)


def _say_how_long_calibration_takes(opened: Any) -> None:
    if opened.calibration is None:
        return
    from gemma_edge.quantize.calibration.layerwise import estimate_s

    minutes = estimate_s(opened.source.config, opened.recipe, opened.calibration) / 60
    click.echo(
        f"calibrating on {opened.calibration.windows.numel()} tokens:"
        f" {'under a minute' if minutes < 1 else f'about {minutes:.0f} minutes here, and it goes on where it was stopped'};"
        f" --quality fast needs no text and takes groups of {QUALITIES['fast'].group_size}: larger, slower, less exact",
        err=True,
    )
