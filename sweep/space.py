"""Which points a sweep has: the values of every axis, from the command line or a TOML file, and all their combinations."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_edge.bundle.accelerators import ACCELERATORS
from gemma_edge.bundle.backends import ALL, KV_DTYPES, registered
from gemma_edge.errors import InputError, one_line
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.recipe import BITS, METHODS, QUALITIES
from gemma_edge.reading import read_text

Choice = Mapping[str, Any]  # axis -> value
TABLE_BITS = (4, 8)
MAX_POINTS = 10_000
NONE = "none"  # value of an axis whose option may also be left out
QUANTIZATION, CALIBRATION, EXPORT = "quantization", "calibration_text", ""


@dataclass(frozen=True)
class Axis:
    """An option of an export that may have several values."""

    kind: type[int] | type[float] | type[str] | type[Path]
    part: str  # of ExportOptions that holds it: QUANTIZATION, its CALIBRATION, or EXPORT for itself
    help: str
    allowed: tuple[Any, ...] | None = None  # None: an export checks it

    def value(self, name: str, given: object) -> Any:
        """A value of this axis from a word or a TOML value.

        Raises:
            InputError: it is none.
        """
        # bool is an int to Python, and a number is no name to a user
        fits = isinstance(given, str) or (type(given) in (int, float) and self.kind in (int, float))
        try:
            value = self.kind(given) if fits else None  # type: ignore[call-overload, arg-type]
        except ValueError:
            value = None
        if value is None or (self.kind is int and type(given) is float) or value == "":
            raise InputError(field=name, value=given, allowed=self.allowed, hint=None if self.allowed else self.hint)
        if self.allowed is not None and value not in self.allowed:
            raise InputError(field=name, value=given, allowed=self.allowed)
        return value

    @property
    def hint(self) -> str:
        """What it takes, in words."""
        return {int: "give integers", float: "give numbers"}.get(self.kind, "give names") + ", with commas"


AXES: dict[str, Axis] = {
    "bits": Axis(int, QUANTIZATION, "Bits of the linear layers.", BITS),
    "group_size": Axis(int, QUANTIZATION, "Weights per scale; 0: one scale per channel."),
    "method": Axis(str, QUANTIZATION, "How integers are chosen.", METHODS),
    "quality": Axis(str, QUANTIZATION, "How thorough the search for 4-bit integers is.", tuple(QUALITIES)),
    "table_bits": Axis(int, QUANTIZATION, "Bits of the embedding table and the head.", TABLE_BITS),
    "embedding_bits": Axis(int, QUANTIZATION, "Bits of the table where rows are looked up.", TABLE_BITS),
    "head_bits": Axis(int, QUANTIZATION, "Bits of a head of its own.", TABLE_BITS),
    "bpw": Axis(float, QUANTIZATION, "Mixed precision: bits per weight."),
    "size": Axis(str, QUANTIZATION, "Mixed precision: size of the weights file, such as 1.4GB."),
    "recipe": Axis(Path, QUANTIZATION, "Saved recipes, or manifests of bundles."),
    "distill": Axis(int, QUANTIZATION, "Tokens of distillation afterwards."),
    "calibration_tokens": Axis(int, CALIBRATION, "Number of calibration tokens."),
    "seed": Axis(int, CALIBRATION, "Seed for choosing the calibration passages."),
    "lora": Axis(str, EXPORT, f"PEFT adapters to merge first; {NONE}: no adapter."),
    "vocab": Axis(str, EXPORT, f"FILE or auto:FILE: texts whose tokens alone are kept; {NONE}: all tokens."),
    "context": Axis(int, EXPORT, "Tokens that the model can look back on."),
    "prefill_chunk": Axis(int, EXPORT, "Largest number of prompt tokens in one call."),
    "pinned": Axis(int, EXPORT, "Tokens at the beginning of a chat that are kept beyond the context."),
    "kv_bits": Axis(int, EXPORT, "Bits of the KV cache.", tuple(KV_DTYPES)),
    "backend": Axis(str, EXPORT, "Runtimes to export for.", tuple(registered())),
    "accelerator": Axis(str, EXPORT, "What will compute the bundle.", ACCELERATORS),
}


def values(name: str, given: object) -> tuple[Any, ...]:
    """The values of one axis: a text with commas, or a TOML value or list.

    Raises:
        InputError: there are none, or one of them is not a value of this axis.
    """
    words: Sequence[object]
    if isinstance(given, str):
        words = [word.strip() for word in given.split(",") if word.strip()]
        if name == "backend" and words == [ALL]:
            words = [backend for backend, info in registered().items() if info.in_all]
    else:
        words = given if isinstance(given, list) else [given]
    if not words:
        raise InputError(f"`{name}` has no value; give one or several, with commas", field=name, value=given)
    return tuple(dict.fromkeys(AXES[name].value(name, word) for word in words))


def read_space(path: Path) -> dict[str, tuple[Any, ...]]:
    """The axes of a TOML file: `bits = [4, 8]`.

    Raises:
        InputError: it is not TOML, or names something that is no axis.
    """
    try:
        table = tomllib.loads(read_text(path, "give a TOML file of lists, such as bits = [4, 8]", field="space"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"`space` {path} is not TOML: {one_line(error)}", field="space", value=path) from None
    for name in table:
        if name not in AXES:
            raise InputError(f"`space` {path}: {name}", field="space", value=name, allowed=AXES)
    return {name: values(name, given) for name, given in table.items()}


def combinations(space: Mapping[str, Sequence[Any]]) -> Iterator[Choice]:
    """Every combination; the last axis changes most often.

    Raises:
        InputError: there are too many, or none.
    """
    count = 1
    for words in space.values():
        count *= len(words)
    if not space:
        raise InputError("the space is empty: give lists, such as --bits 4,8 --group-size 32,128, or `space` FILE.toml")
    if count > MAX_POINTS:
        raise InputError(f"the space has {count} points; at most {MAX_POINTS} are planned; give fewer values")
    for chosen in itertools.product(*space.values()):
        yield dict(zip(space, chosen, strict=True))


def options_of(choice: Choice, base: ExportOptions) -> ExportOptions:
    """The export that a point stands for; `base` is what all points share."""
    parts: dict[str, dict[str, Any]] = {QUANTIZATION: {}, CALIBRATION: {}, EXPORT: {}}
    for name, value in choice.items():
        parts[AXES[name].part][name.removeprefix("calibration_")] = None if value == NONE else value
    text = replace(base.quantization.calibration_text, **parts[CALIBRATION])
    quantization = replace(base.quantization, calibration_text=text, **parts[QUANTIZATION])
    return replace(base, quantization=quantization, **parts[EXPORT])


def name_of(choice: Choice, space: Mapping[str, Sequence[Any]]) -> str:
    """A point's name for people: the values that tell it from other points."""
    varied = [name for name in choice if len(space[name]) > 1] or list(choice)
    return ", ".join(_word(name, choice[name]) for name in varied)


def _word(name: str, value: object) -> str:
    if value == NONE:
        return f"no {name}"
    return str(value) if AXES[name].kind is str else f"{name} {value}"
