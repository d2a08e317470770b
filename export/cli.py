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

from gemma_edge.command import Command, Group
from gemma_edge.errors import InputError
from gemma_edge.export.choices import BACKENDS, DEFAULT_CHUNK, KV_DTYPES, LEVELS, TARGETS
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
            default=4,
            show_default=True,
            help=f"Of the linears: {_list(BITS)}; from 16 on they stay float.",
        ),
        click.option("--group-size", type=int, help="Weights per scale, a multiple of 32; 0 = one per channel."),
        click.option(
            "--table-bits", type=click.Choice(["4", "8"]), default="8", show_default=True, help="Of the tied table."
        ),
        click.option(
            "--method", help=f"How integers are found: {_list(METHODS)}. Default: what suits bits and group size."
        ),
        click.option(
            "--quality",
            help=f"How hard 4-bit integers are searched for: {_list(QUALITIES)}. Default: {DEFAULT_QUALITY}.",
        ),
        click.option("--context", type=int, help="Tokens the model looks back on. Default: what fits the target."),
        click.option("--prefill-chunk", type=int, help=f"Most prompt tokens in one call. Default: {DEFAULT_CHUNK}."),
        click.option(
            "--kv-bits",
            type=int,
            help=f"Of the KV cache: {_list(KV_DTYPES)}. Default: 8 on phones, with calibrated scales and if the gate passes.",
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
@click.option("--backend", help=f"Runtime to export for: {_list(BACKENDS)}. Default: the target's.")
@click.option("--verify", default="quick", show_default=True, help=f"How far the gate looks: {_list(LEVELS)}.")
@click.option("--keep-failed", is_flag=True, help="Keep a bundle that fails the gate as OUT.failed.")
@click.option(
    "--save-checkpoint", type=click.Path(path_type=Path), help="Also keep the quantized Hugging Face folder here."
)
@click.option(
    "--calibration",
    "calibration_text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Text to calibrate on: a file, a folder or JSON lines; may be repeated. Default: public-domain books.",
)
@click.option(
    "--calibration-tokens", type=click.IntRange(256), help="How much of it. Default: what the quality asks for."
)
@click.option("--calibration-chat", is_flag=True, help="Put plain text into the form of a chat, for -it models.")
@click.option(
    "--distill",
    type=click.IntRange(0),
    default=0,
    metavar="TOKENS",
    help="Afterwards train scales and norms on the original's logits; holds the whole model in memory.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the passages drawn from it.")
@click.option("--force", is_flag=True, help="Replace an existing bundle, and an OUT.failed.")
def make(as_json: bool, **choices: Any) -> None:
    """Export MODEL (the default command)."""
    # before torch is loaded: a thread that waits must not spin, which beside other work costs most of an export's time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed export cleans up too
    options = _options(choices)
    from gemma_edge.export import pipeline, report

    _show_warnings()
    opened = pipeline.open_model(options)
    _say_how_long_calibration_takes(opened)
    done = pipeline.export(options, report.progress_bar, opened)
    if as_json:
        click.echo(json.dumps(pipeline.to_json(done), indent=1))
    else:
        report.print_export(done)


@main.command(cls=Command)
@_model_options
def plan(as_json: bool, **choices: Any) -> None:
    """Predict bytes and RAM of an export of MODEL, before any work."""
    options = _options(choices)
    from gemma_edge.export import pipeline, report

    opened = pipeline.open_model(options, plan_only=True)
    if as_json:
        click.echo(json.dumps(opened.plan.to_json(), indent=1))
    else:
        report.OUT.print(report.plan_table(opened.plan, opened.source.config.num_parameters))


@main.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--check-hashes", is_flag=True, help="Compare every file with its hash.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
def inspect(bundle: Path, check_hashes: bool, as_json: bool) -> None:
    """Show what a BUNDLE holds and what the gate found."""
    from gemma_edge.export import bundle as bundles
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


def _options(choices: dict[str, Any]) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "exporting needs PyTorch, which this installation leaves out: pip install 'gemma-edge[export]'"
        )
    from gemma_edge.export.calibration import Source
    from gemma_edge.export.options import ExportOptions

    text = Source(
        paths=choices.pop("calibration_text", ()),
        tokens=choices.pop("calibration_tokens", None) or 0,
        chat=choices.pop("calibration_chat", False),
        seed=choices.pop("seed", 0),
    )
    return ExportOptions(**{**choices, "table_bits": int(choices["table_bits"]), "text": text})


def _show_warnings() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("gemma_edge").addHandler(handler)


def _say_how_long_calibration_takes(opened: Any) -> None:
    if opened.calibration is None:
        return
    from gemma_edge.quantize.layerwise import estimate_s

    minutes = estimate_s(opened.source.config, opened.recipe, opened.calibration) / 60
    click.echo(
        f"calibrating on {opened.calibration.windows.numel()} tokens:"
        f" {'under a minute' if minutes < 1 else f'about {minutes:.0f} minutes here, and it goes on where it was stopped'};"
        f" --quality fast needs no text and takes groups of {QUALITIES['fast'].group_size}: larger, slower, less exact",
        err=True,
    )
