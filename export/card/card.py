"""What a bundle is, in Markdown: sizes, recipe, what the gate measured, plots, and the licence of the base model.

All of it comes from the manifest. The head of the file is what Hugging Face reads: huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError, printable
from gemma_edge.export.report import gate_lines, size
from gemma_edge.files import check_writable, replacing

CARD = "README.md"
GEMMA, TERMS = "gemma", "https://ai.google.dev/gemma/terms"
SIZES, LAYERS = "card-sizes.png", "card-layers.png"  # files of the plots, beside the card
DOTS_PER_INCH = 120


@dataclass(frozen=True)
class CardOptions:
    """What the manifest does not say."""

    base: str | None = None  # the Hugging Face id of the original
    license: str = GEMMA  # of the original, as Hugging Face names licences


def write_card(bundle: Path, out: Path, options: CardOptions, *, force: bool) -> list[Path]:
    """Write the card, and beside it its plots where matplotlib is installed.

    Args:
        bundle: the folder.
        out: the card's file. It appears complete, after its plots.
        options: what the manifest does not say.
        force: whether an older card is replaced.

    Returns:
        the files, the card last.

    Raises:
        InputError: the folder is not a bundle, or the file exists or cannot be written.
    """
    manifest = Manifest.load(bundle)
    if out.exists() and not force:
        raise InputError(f"{out} exists", field="out", value=out, hint="give another file, or `force` to replace it")
    check_writable("`out`", out)
    images = plots(manifest)
    files = [*((out.with_name(name), image) for name, image in images.items())]
    files.append((out, card(manifest, options, plots=list(images)).encode("utf-8")))
    for path, data in files:
        with replacing(path) as partial:
            partial.write_bytes(data)
    return [path for path, _ in files]


def card(manifest: Manifest, options: CardOptions, *, plots: Sequence[str] = ()) -> str:
    """The Markdown text; `plots` are names of images beside it."""
    model, recipe = manifest.model, manifest.recipe
    license = f"[Gemma's terms of use]({TERMS})" if options.license == GEMMA else _text(options.license)
    merged = [("adapter merged", model.lora)] if model.lora else []
    calibration = recipe.calibration
    text = [
        *_head(options),
        f"# {_text(model.name)}, {_text(recipe.name)}",
        "",
        f"{size(manifest.bytes)} for {', '.join(map(_text, manifest.backends))}: {_text(model.name)} with"
        f" {model.parameters / 1e9:.3f} billion parameters, made by gemma-edge for {_text(manifest.target.name)}.",
        "",
        *_table(
            ("what", "value"),
            [
                ("base model", options.base or model.name),
                ("architecture", model.architecture),
                *merged,
                ("recipe", recipe.name),
                (
                    "calibrated on",
                    f"{calibration.tokens} tokens of {', '.join(calibration.text)}" if calibration.tokens else "-",
                ),
                ("made", manifest.created),
            ],
        ),
        "## Sizes",
        "",
        *_table(("file", "size"), [(name, size(entry.bytes)) for name, entry in manifest.files.items()]),
        *_table(
            ("weights", "bits", "group", "parameters", "size"),
            [
                (
                    part.part,
                    str(part.bits),
                    "float" if part.bits >= 16 else str(part.group_size or "channel"),
                    f"{part.weights / 1e6:.1f} M",
                    size(part.bytes),
                )
                for part in recipe.parts
            ],
        ),
        *_table(
            ("backend", "accelerator", "context", "KV cache", "RAM on the device"),
            [
                (
                    name,
                    entry.accelerator,
                    f"{entry.cache.context} tokens",
                    f"{size(entry.cache.bytes)} ({entry.cache.dtype})",
                    f"about {size(entry.plan.device_ram_bytes)}",
                )
                for name, entry in manifest.backends.items()
            ],
        ),
        "## How close it is to the original",
        "",
        "```text",
        *(printable(line) for line in gate_lines(manifest)),
        "```",
        "",
        *(line for name in plots for line in (f"![{PLOTS[name]}]({name})", "")),
        "## Run it",
        "",
        "```sh",
        'gemma-run chat FOLDER   # pip install "gemma-edge[onnx]"',
        "```",
        "",
        "## Licence",
        "",
        f"The licence of the base model: {license}. A bundle made from Gemma's weights stays under Gemma's terms."
        if options.license == GEMMA
        else f"The licence of the base model: {license}.",
    ]
    return "\n".join(text) + "\n"


PLOTS = {SIZES: "Bytes of each kind of weight", LAYERS: "Relative error of each layer's output, as calibration saw it"}


def plots(manifest: Manifest) -> dict[str, bytes]:
    """The plots as PNG, by file name; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return {}
    from gemma_edge.report.drawing import axes, png

    images = {}
    parts, layers = manifest.recipe.parts, manifest.recipe.calibration.layers
    if parts:
        figure, plane = axes("MB", "")
        names = [f"{part.part}, {part.bits} bits" for part in parts]
        plane.barh(range(len(parts)), [part.bytes / 1e6 for part in parts])
        plane.set_yticks(range(len(parts)), names, parse_math=False)
        plane.invert_yaxis()
        images[SIZES] = png(figure, DOTS_PER_INCH)
    if layers:
        figure, plane = axes("layer", "relative error")
        plane.plot([entry.layer for entry in layers], [entry.relative_error for entry in layers], "o-", markersize=4)
        plane.set_ylim(bottom=0)
        images[LAYERS] = png(figure, DOTS_PER_INCH)
    return images


def _head(options: CardOptions) -> Iterable[str]:
    """YAML, whose texts are JSON here."""
    yield "---"
    yield f"license: {json.dumps(options.license)}"
    if options.license == GEMMA:
        yield f"license_link: {TERMS}"
    if options.base:
        yield f"base_model: {json.dumps(options.base)}"
        yield "base_model_relation: quantized"
    yield "library_name: gemma-edge"
    yield "pipeline_tag: text-generation"
    yield "---"
    yield ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_text, row))} |" for row in rows]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *lines, ""] if lines else []


def _text(text: str) -> str:
    """A name as text of Markdown: it is neither markup nor HTML."""
    plain = printable(text)
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#!" else character for character in plain)
