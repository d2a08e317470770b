"""The points of a sweep, planned: what each becomes, what it will weigh, and the hashes that its units are found by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export.api import open_model
from gemma_edge.export.contents import tool_versions
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import Plan
from gemma_edge.file_hash import file_hash
from gemma_edge.model.checkpoint import Weights
from gemma_edge.model.config import GemmaConfig
from gemma_edge.progress import Progress
from gemma_edge.quantize.api import calibration_tokens, open_source
from gemma_edge.quantize.calibration import layerwise
from gemma_edge.quantize.options import CalibrationText
from gemma_edge.quantize.recipe import DEFAULT_QUALITY, QUALITIES, Recipe
from gemma_edge.quantize.vocabulary.kept import AUTO
from gemma_edge.sweep.options import SweepOptions
from gemma_edge.sweep.space import Choice, combinations, name_of, options_of
from gemma_edge.sweep.units import key_of

# TEXT_FILES: files of a model, beside its weights, that decide what its bundle says.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Point:
    """One combination of values that can be exported."""

    number: int
    name: str
    choice: Choice
    options: ExportOptions
    plan: Plan
    quantization: str  # key
    lowering: str  # key
    recipe: Recipe
    calibration_tokens: int  # 0: its integers need no text
    model: str  # key of the original, with its adapter and vocabulary

    @property
    def merged(self) -> bool:
        """Whether its original differs from the model's folder."""
        return self.options.lora is not None or self.options.vocab is not None


@dataclass(frozen=True)
class LeftOut:
    """One combination of values that cannot be exported."""

    number: int
    name: str
    choice: Choice
    why: str


@dataclass(frozen=True)
class Planned:
    """All points of a sweep."""

    points: list[Point]
    left_out: list[LeftOut]
    config: GemmaConfig

    @property
    def smallest_context(self) -> int:
        """The context of the point that looks back on the fewest tokens."""
        return min(point.plan.context for point in self.points)


def plan_points(options: SweepOptions, progress: Progress) -> Planned:
    """Plan every point. Reads headers only, and hashes the model's files unless they were hashed before.

    Raises:
        InputError: the model cannot be used, or no combination can be exported.
    """
    choices = list(combinations(options.space))
    base = replace(options.base, verify="none")  # the gate judges what is picked
    plain = open_source(base.model, None)
    originals: dict[tuple[object, object], tuple[Weights, str]] = {(None, None): (plain, _model_key(plain))}
    points: list[Point] = []
    left_out: list[LeftOut] = []
    for number, choice in enumerate(choices):
        name = name_of(choice, options.space)
        try:
            exported = absolute(options_of(choice, base))
            variant = (exported.lora, exported.vocab)
            if variant not in originals:
                source = open_source(exported.model, *variant)
                originals[variant] = source, _model_key(source)
            source, model = originals[variant]
            opened = open_model(exported, progress, plan_only=True, source=source)
        except InputError as error:
            left_out.append(LeftOut(number, name, choice, str(error)))
            continue
        ((_, plan),) = opened.plans.items()
        tokens = calibration_tokens(exported.quantization, opened.source, opened.recipe)
        quantization = _quantization_key(model, exported, opened.recipe, tokens, options.where.cores)
        lowering = key_of("lower", quantization, plan.to_json(), tool_versions())
        twin = next((point for point in points if point.lowering == lowering), None)
        if twin is not None:
            left_out.append(LeftOut(number, name, choice, f"the same bundle as {twin.name}"))
            continue
        points.append(Point(number, name, choice, exported, plan, quantization, lowering, opened.recipe, tokens, model))
    if not points:
        raise InputError(f"no point of the space can be exported: {left_out[0].name}: {left_out[0].why}")
    return Planned(points, left_out, plain.config)


def _model_key(source: Weights) -> str:
    texts = [source.text_folder / name for name in TEXT_FILES]
    files = [*source.files(), *(path for path in texts if path.is_file())]
    return key_of(sorted((path.name, file_hash(path)) for path in files), source.config.to_json(), source.vocabulary)


def _quantization_key(model: str, options: ExportOptions, recipe: Recipe, tokens: int, cores: int) -> str:
    """A hash of everything that the integers depend on."""
    chosen = options.quantization
    quality = QUALITIES[chosen.quality or DEFAULT_QUALITY]
    seen = _text_of(chosen.calibration_text) if tokens or chosen.distill else None
    work = (tokens, quality.rounds, quality.refit) if tokens else None
    versions = (gemma_edge.__version__, torch.__version__, layerwise.VERSION)
    return key_of("quantize", versions, cores, model, recipe.to_json(), seen, work, chosen.distill)


def _text_of(text: CalibrationText) -> list[Any]:
    return [files_key(text.paths), text.chat, text.seed]


def files_key(paths: Sequence[Path]) -> list[str]:
    """The hashes of texts; a folder stands for all its files."""
    return [file_hash(file) for path in paths for file in _files(path)]


def _files(path: Path) -> Iterable[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def absolute(options: ExportOptions) -> ExportOptions:
    """The same options for a process with another current folder."""
    chosen = options.quantization
    text = replace(chosen.calibration_text, paths=tuple(path.absolute() for path in chosen.calibration_text.paths))
    recipe = None if chosen.recipe is None else chosen.recipe.absolute()
    return replace(
        options,
        model=_absolute(options.model),
        lora=None if options.lora is None else _absolute(str(options.lora)),
        vocab=None if options.vocab is None else _of_file(options.vocab),
        quantization=replace(chosen, calibration_text=text, recipe=recipe),
    )


def _absolute(name: str) -> str:
    """A path, absolute; what is none, such as a Hugging Face id, as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _of_file(vocab: str) -> str:
    name = vocab.removeprefix(AUTO)
    return vocab.removesuffix(name) + _absolute(name)


def local_paths(options: ExportOptions) -> list[Path]:
    """The files and folders of this machine that an export reads."""
    chosen, vocab = options.quantization, options.vocab
    names = [options.model, options.lora, chosen.recipe, vocab.removeprefix(AUTO) if vocab is not None else None]
    paths = [*(Path(name) for name in names if name is not None), *chosen.calibration_text.paths]
    return [path for path in paths if path.exists()]


def refuse_impossible(points: Sequence[Point], bounds: Mapping[str, int | None]) -> None:
    """Refuse limits of what is known before any work: bytes and RAM.

    Args:
        points: all that can be exported.
        bounds: `max_size` and `max_ram`.

    Raises:
        InputError: no point keeps to one of them; it names the nearest one.
    """
    for field, most in bounds.items():
        nearest = min(points, key=lambda point: known(point, field))
        if most is not None and known(nearest, field) > most:
            raise InputError(
                f"`{field}` {most} bytes: no point is that small",
                field=field,
                value=most,
                hint=f"the nearest is {nearest.name} with {known(nearest, field)} bytes",
            )


def known(point: Point, field: str) -> int:
    """What the plan says of a point: bytes of the weights for `max_size`, RAM on the device for `max_ram`."""
    return point.plan.weights_bytes if field == "max_size" else point.plan.device_ram_bytes
