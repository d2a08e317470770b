"""The commands of `gemma-export` that take a finished bundle. Heavy imports are inside them, for a quick --help."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gemma_edge.command import Command, clean_up_when_ended
from gemma_edge.errors import InputError
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.room import need_torch

FAILED_EXIT_CODE = 1  # the bundle is sound, and not as good as it must be
PATH = click.Path(path_type=Path)
ADAPTER = click.option(
    "--lora",
    multiple=True,
    help="PEFT adapter to merge into the weights first: a folder or a Hugging Face id.",
)
KEPT_TOKENS = click.option(
    "--vocab",
    metavar="FILE|auto:FILE",
    help="Keep only the tokens that this text needs; auto: also keeps every token of ASCII and the text's characters.",
)
OTHER_PYTHON = click.option(
    "--runtime-python",
    type=PATH,
    envvar="GEMMA_EDGE_RUNTIME_PYTHON",
    show_envvar=True,
    help="A Python with gemma-edge and a runtime that this one lacks (tflite-runtime): the gate runs there.",
)


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option("--check-hashes", is_flag=True, help="Compare every file with the hash in the manifest.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
def inspect(bundle: Path, check_hashes: bool, as_json: bool) -> None:
    """Show what a BUNDLE holds and what the gate measured."""
    from gemma_edge.bundle import manifest as bundles
    from gemma_edge.export import report

    manifest = bundles.Manifest.load(bundle)
    if check_hashes:
        with report.progress_bar("check hashes", manifest.bytes, True) as advance:
            bundles.check_hashes(bundle, manifest, advance)
        click.echo(f"{len(manifest.files)} files: all hashes match the manifest", err=True)
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        report.print_inspect(manifest)


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option("--reference", help="The original model: a Hugging Face folder or id, or a GGUF file.")
@ADAPTER
@KEPT_TOKENS
@click.option(
    "--integers",
    type=PATH,
    help="The checkpoint of --save-checkpoint. Default: the integers in the bundle, which executorch alone does not give back.",
)
@click.option("--backend", help="The only backend to judge. Default: every backend of the bundle.")
@click.option(
    "--level",
    default="quick",
    show_default=True,
    help=f"How much text is checked: {', '.join(name for name, level in LEVELS.items() if level)}.",
)
@OTHER_PYTHON
@click.option("--save", is_flag=True, help="Put the result into the bundle's manifest. This needs --reference.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of sentences.")
def verify(bundle: Path, lora: Sequence[str], as_json: bool, **choices: Any) -> None:
    """Run the gate again on a BUNDLE, on this machine.

    The bundle is compared with --reference, and with its own integers in torch. Without --reference only what exporter and
    runtime add is judged, not what quantization costs. The exit code is 0 if the bundle passes, 1 if it fails, and 2 if it cannot
    be judged.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in make
    clean_up_when_ended()
    need_torch()
    from gemma_edge.export import report
    from gemma_edge.export.gate import again

    options = again.VerifyOptions(bundle, lora=one_adapter(lora), **choices)
    verified = again.verify_bundle(options, report.progress_bar)
    if as_json:
        click.echo(json.dumps(verified.to_json(), indent=1))
    else:
        report.print_verified(verified)
    if not verified.passed:
        raise click.exceptions.Exit(FAILED_EXIT_CODE)


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option("-o", "--out", type=PATH, help="The file. Default: BUNDLE's name with .litertlm.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def litertlm(bundle: Path, out: Path | None, force: bool) -> None:
    """Write a tflite BUNDLE as one file for LiteRT-LM and the AI Edge Gallery."""
    from gemma_edge.export.tflite.litertlm import write_litertlm

    out = out or Path(f"{bundle.resolve().name}.litertlm")
    write_litertlm(bundle, out, force=force)
    click.echo(f"{out.stat().st_size / 1e6:.1f} MB in {out}", err=True)


@click.command(cls=Command)
@click.argument("integers", type=PATH, metavar="BUNDLE|CHECKPOINT")
@click.option("-o", "--out", type=PATH, help="The file. Default: the folder's name with .gguf.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a sentence.")
def gguf(integers: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Write a BUNDLE's integers as one file for llama.cpp.

    A CHECKPOINT is a folder that `gemma-export quantize` or --save-checkpoint wrote. What is float in it stays float.
    """
    need_torch()
    from gemma_edge.export import report
    from gemma_edge.export.gguf.writer import open_integers, write_gguf

    out = out or Path(f"{integers.resolve().name}.gguf")
    written = write_gguf(open_integers(integers), out, force=force, progress=report.progress_bar)
    if as_json:
        click.echo(json.dumps({**asdict(written), "file": str(out), "bytes": out.stat().st_size}, indent=1))
    else:
        click.echo(f"{out.stat().st_size / 1e6:.1f} MB in {out}: {written}", err=True)


@click.command(cls=Command)
@click.argument("lora", metavar="ADAPTER")
@click.option("--base", type=PATH, required=True, help="The bundle that it is used with. It needs the onnx backend.")
@click.option("-o", "--out", type=PATH, help="Folder to write. Default: ADAPTER's name with -adapter.")
@click.option("--reference", help="The bundle's original: a Hugging Face folder or id, or a GGUF file.")
@click.option(
    "--factors", default="float16", show_default=True, help="How the factors are stored: float32, float16 or int8."
)
@click.option("--verify", "level", default="quick", show_default=True, help=f"The gate: {', '.join(LEVELS)}.")
@click.option("--force", is_flag=True, help="Replace an existing adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of sentences.")
def adapter(lora: str, out: Path | None, as_json: bool, **choices: Any) -> None:
    """Make a PEFT ADAPTER (a folder or a Hugging Face id) switchable beside a bundle.

    The bundle stays as it is. With --reference the pair is compared with the original into which the adapter is merged; without
    it only with the bundle's own integers.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in make
    clean_up_when_ended()
    need_torch()
    from gemma_edge.export import report
    from gemma_edge.export.adapter.make import AdapterOptions, make_adapter

    options = AdapterOptions(lora, out=out or Path(f"{Path(lora).resolve().name}-adapter"), **choices)
    made = make_adapter(options, report.progress_bar)
    if as_json:
        click.echo(json.dumps({"out": str(made.out), **json.loads(made.manifest.to_json())}, indent=1))
    else:
        report.print_adapter(made)


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option("-o", "--out", type=PATH, help="The file; plots come beside it. Default: README.md in the bundle.")
@click.option("--base", metavar="HUB_ID", help="The original's Hugging Face id, which the card then names.")
@click.option("--license", default="gemma", show_default=True, help="The original's licence, as Hugging Face names it.")
@click.option("--push", metavar="HUB_ID", help="Upload the bundle with its card to this repository of yours.")
@click.option("--force", is_flag=True, help="Replace an existing card.")
def card(bundle: Path, out: Path | None, base: str | None, license: str, push: str | None, force: bool) -> None:
    """Write a model card of a BUNDLE: sizes, recipe, what the gate measured, plots, licence.

    With --push the bundle and the card go to Hugging Face in one commit. A repository that does not exist is made, private.
    """
    from gemma_edge.export.card import card as cards
    from gemma_edge.export.card import push as pushes

    if push is not None:
        pushes.check_push(push)
    out = out or bundle / cards.CARD
    written = cards.write_card(bundle, out, cards.CardOptions(base, license), force=force)
    click.echo(f"card in {out}", err=True)
    if push is not None:
        click.echo(f"pushed: {pushes.push(bundle, written, push)}", err=True)


def one_adapter(lora: Sequence[str]) -> str | None:
    """The adapter, if one is given. A second one is refused, because click would silently take the last."""
    if len(lora) > 1:
        raise InputError(
            field="lora", value=" ".join(lora), hint="only one adapter is merged: merge the others into the model first"
        )
    return lora[0] if lora else None


COMMANDS = (inspect, verify, litertlm, gguf, adapter, card)
