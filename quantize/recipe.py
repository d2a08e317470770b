"""Which weight gets which integers, as data: the first rule whose pattern matches a weight's name wins.

A recipe says nothing of packing, tensor classes or backends. How the integers are computed is integers.py's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemma_edge.errors import InputError

GROUP_MULTIPLE = 32  # every backend's kernels take groups of a multiple of 32
DATA_FREE = ("rtn", "mse")
CALIBRATED = ("hscale", "gptq", "awq", "awq+gptq")
METHODS = (*DATA_FREE, *CALIBRATED)
BITS = (4, 8, 16, 32)
FLOAT_BITS = 32  # of matrices that stay float beside quantized ones
TABLE_PATTERN = r"model\.embed_tokens"
ANY = r".*"


@dataclass(frozen=True)
class QuantConfig:
    """The integers of one weight."""

    bits: int  # 4 or 8
    group_size: int  # along in_features; 0 = one scale per output channel
    symmetric: bool = True  # no zero point; the only form that every backend runs exactly

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"{self.bits} bits; quantized weights have 4 or 8")
        if self.group_size < 0 or self.group_size % GROUP_MULTIPLE:
            near = max(GROUP_MULTIPLE, round(self.group_size / GROUP_MULTIPLE) * GROUP_MULTIPLE)
            raise InputError(
                f"group size {self.group_size} is not a multiple of {GROUP_MULTIPLE}, which the kernels need;"
                f" use --group-size {near}, or 0 for one scale per channel"
            )
        if not self.symmetric:
            raise InputError("asymmetric weights (zero points) are not supported: not every backend runs them exactly")

    def fit(self, in_features: int) -> QuantConfig:
        """The same with the largest group that divides a row: a row of 96 at group 128 gets one group of 96.

        Raises:
            InputError: no multiple of 32 divides the row.
        """
        if self.group_size == 0:
            return self
        sizes = range(min(self.group_size, in_features), 0, -1)
        fitting = next((g for g in sizes if g % GROUP_MULTIPLE == 0 and in_features % g == 0), None)
        if fitting is None:
            raise InputError(
                f"rows of {in_features} cannot be cut into groups of a multiple of {GROUP_MULTIPLE};"
                " use --group-size 0 (one scale per channel)"
            )
        return QuantConfig(self.bits, fitting, self.symmetric)

    def stored_bytes(self, rows: int, columns: int) -> int:
        """What a matrix takes: its codes, and its scales in bfloat16."""
        return rows * (-(-columns * self.bits // 8) + 2 * (columns // self.group_size if self.group_size else 1))


@dataclass(frozen=True)
class QuantRule:
    """What the weights whose whole name (without `.weight`) matches `pattern` get; None leaves them float."""

    pattern: str
    config: QuantConfig | None
    method: str = "rtn"  # one of METHODS

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r}; supported: {', '.join(METHODS)}")


@dataclass(frozen=True)
class Recipe:
    """Rules for a whole model, and the width of what stays float."""

    name: str
    rules: tuple[QuantRule, ...]
    float_bits: int = FLOAT_BITS  # 16 or 32: how unquantized matrices are stored

    def rule_for(self, weight: str) -> QuantRule:
        """The first rule that matches."""
        return next(rule for rule in self.rules if re.fullmatch(rule.pattern, weight))

    def config_for(self, weight: str, in_features: int) -> QuantConfig | None:
        """The fitted configuration of one weight; None = float."""
        config = self.rule_for(weight).config
        return config.fit(in_features) if config else None

    def configs(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, QuantConfig | None]:
        """The configuration of every weight of a model, from its (out, in) shapes."""
        return {name: self.config_for(name, shape[1]) for name, shape in shapes.items()}

    @property
    def calibrated(self) -> bool:
        """Whether a rule asks for a method that looks at text."""
        return any(rule.config is not None and rule.method in CALIBRATED for rule in self.rules)

    @property
    def folds(self) -> bool:
        """Whether a rule asks for channel scales."""
        return any(rule.config is not None and rule.method.startswith("awq") for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {**asdict(self), "rules": [asdict(rule) for rule in self.rules]}

    @classmethod
    def from_json(cls, data: Any, origin: str) -> Recipe:
        """What `to_json` gave, also with other keys beside it, as in a manifest.

        Args:
            origin: where the data comes from, for the message.

        Raises:
            InputError: it is no recipe.
        """
        try:
            rules = tuple(
                QuantRule(rule["pattern"], QuantConfig(**rule["config"]) if rule["config"] else None, rule["method"])
                for rule in data["rules"]
            )
            for rule in rules:
                re.compile(rule.pattern)
            return cls(str(data["name"]), rules, int(data["float_bits"]))
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise InputError(f"{origin} is no recipe ({error!r}); `plan --save-recipe` writes one") from None


INT8_ROW = QuantConfig(bits=8, group_size=0)
UNCALIBRATED_GROUP = 32  # data-free rounding is good enough only in groups this small (docs/quantization.md)
CALIBRATED_GROUP = 128


@dataclass(frozen=True)
class Quality:
    """How much work 4-bit integers are worth; the figures behind each choice are in docs/quantization.md."""

    in_groups: str  # method
    per_channel: str
    group_size: int  # unless one is asked for
    tokens: int = 0  # of calibration text; 0: none is looked at
    rounds: int = 0  # of scales refitted and codes found again
    refit: bool = False  # of the post-norms

    def method(self, group_size: int) -> str:
        """What suits a granularity."""
        return self.in_groups if group_size else self.per_channel


# Data-free, clipping helps in small groups and does harm per channel.
QUALITIES = {
    "fast": Quality("mse", "rtn", UNCALIBRATED_GROUP),
    "balanced": Quality("gptq", "gptq", CALIBRATED_GROUP, tokens=8192),
    "best": Quality("awq+gptq", "awq+gptq", CALIBRATED_GROUP, tokens=16384, rounds=2, refit=True),
}
DEFAULT_QUALITY = "balanced"


def recipe_name(linears: Iterable[QuantConfig | None], table: QuantConfig | None, float_bits: int) -> str:
    """What weights are, the most frequent first: int4-g32, int4-g32+int8-channel. A table that is not the usual one is named."""
    kinds = [kind for kind, _ in Counter(linears).most_common()]
    tags = [
        f"float{float_bits}"
        if kind is None
        else f"int{kind.bits}-{f'g{kind.group_size}' if kind.group_size else 'channel'}"
        for kind in kinds
    ]
    usual = None if kinds == [None] else INT8_ROW
    return "+".join(tags) + ("" if table == usual else f"-table{table.bits if table else float_bits}")


def default_method(config: QuantConfig, quality: str) -> str:
    """How the integers of a linear are found; 8 bits need no calibration."""
    return "rtn" if config.bits == 8 else QUALITIES[quality].method(config.group_size)


def make_recipe(
    bits: int,
    *,
    group_size: int | None = None,
    method: str | None = None,
    table_bits: int = 8,
    quality: str = "fast",
) -> Recipe:
    """The recipe of a command line.

    Args:
        bits: 4 or 8 for the linears; 16 or 32 leaves the whole model float.
        group_size: weights per scale, 0 = per channel; None takes the default of bits and method.
        method: one of METHODS; None takes the one that suits bits, group and quality.
        table_bits: of the tied table; 8 = one scale per row, 4 = groups like the body's. Its method needs no data.
        quality: one of QUALITIES; 8 bits need no calibration.

    Raises:
        InputError: a value outside the allowed ones.
    """
    if bits not in BITS:
        raise InputError(f"--bits {bits}; supported: {', '.join(map(str, BITS))}")
    if bits >= 16:
        if group_size is not None or method is not None or table_bits != 8:
            raise InputError(
                f"--bits {bits} leaves the weights float: --group-size, --method and --table-bits do not apply"
            )
        return Recipe(recipe_name([None], None, bits), (QuantRule(ANY, None),), bits)
    if group_size is not None:
        group = group_size
    elif bits == 8:
        group = 0
    elif method is not None:
        group = CALIBRATED_GROUP if method in CALIBRATED else UNCALIBRATED_GROUP
    else:
        group = QUALITIES[quality].group_size
    config = QuantConfig(bits, group)
    chosen = method or default_method(config, quality)
    body = QuantRule(ANY, config, chosen)
    table = QuantRule(TABLE_PATTERN, INT8_ROW)
    if table_bits != 8:
        config = QuantConfig(table_bits, group or UNCALIBRATED_GROUP)
        table = QuantRule(TABLE_PATTERN, config, chosen if chosen in DATA_FREE else QUALITIES["fast"].in_groups)
    return Recipe(recipe_name([body.config], table.config, FLOAT_BITS), (table, body), FLOAT_BITS)
