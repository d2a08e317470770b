"""Which weight gets which integers, as data: the first rule whose pattern matches a weight's name decides.

A recipe says nothing about packing, tensor classes or backends. integers.py computes the integers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemma_edge.bundle.codec import typed_value
from gemma_edge.bundle.ranges import Count, Name
from gemma_edge.errors import InputError, one_line
from gemma_edge.model import patterns
from gemma_edge.model.config import HEAD, TABLE, TABLES
from gemma_edge.model.quantized import QuantConfig as QuantConfig

DATA_FREE = ("rtn", "mse", "q4_0")
CALIBRATED = ("hscale", "gptq", "awq", "awq+gptq")
METHODS = (*DATA_FREE, *CALIBRATED)
# FIXED: methods that make integers of one kind only; their scales are those of llama.cpp, which may be below zero
FIXED = {"q4_0": QuantConfig(bits=4, group_size=32)}
BITS = (4, 8, 16, 32)
FLOAT_BITS = 32  # bits of matrices that stay float beside quantized ones
TABLE_PATTERN, HEAD_PATTERN = map(re.escape, TABLES)
ANY = r".*"
RECIPE_HINT = "`plan --save-recipe` writes one"


@dataclass(frozen=True)
class QuantRule:
    """What happens to the weights whose whole name, without `.weight`, matches `pattern`."""

    pattern: str
    config: QuantConfig | None  # None leaves them float
    method: str = "rtn"  # one of METHODS

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r}", field="method", value=self.method, allowed=METHODS)
        kind = FIXED.get(self.method)
        if kind is not None and self.config is not None and self.config != kind:
            raise InputError(
                f"`method` {self.method} makes {kind}, not {self.config}; leave out `bits` and `group_size`",
                field="method",
                value=self.method,
            )


@dataclass(frozen=True)
class Recipe:
    """Rules for a whole model, and how unquantized matrices are stored."""

    name: str
    rules: tuple[QuantRule, ...]
    float_bits: int = FLOAT_BITS  # bits of unquantized matrices, 16 or 32

    def rule_for(self, weight: str) -> QuantRule:
        """The first rule that matches."""
        return next(self._matching(weight))

    def covers(self, weight: str) -> bool:
        """Whether a rule matches."""
        return any(self._matching(weight))

    def _matching(self, weight: str) -> Iterator[QuantRule]:
        """The rules that match, in order. A head becomes what the table becomes, unless a rule names it before."""
        names = (HEAD, TABLE) if weight == HEAD else (weight,)
        return (rule for rule in self.rules if any(patterns.matches(rule.pattern, name) for name in names))

    def config_for(self, weight: str, in_features: int) -> QuantConfig | None:
        """The fitted configuration of one weight; None = float."""
        config = self.rule_for(weight).config
        return config.fit(in_features) if config else None

    def configs(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, QuantConfig | None]:
        """The configuration of every weight of a model, from its (out, in) shapes."""
        return {name: self.config_for(name, shape[1]) for name, shape in shapes.items()}

    @property
    def calibrated(self) -> bool:
        """Whether a rule has a method that looks at text."""
        return any(rule.config is not None and rule.method in CALIBRATED for rule in self.rules)

    @property
    def fixed(self) -> str | None:
        """A method of FIXED that a rule has; None: no rule has one."""
        return next((rule.method for rule in self.rules if rule.config is not None and rule.method in FIXED), None)

    @property
    def folds(self) -> bool:
        """Whether a rule has a method that folds channel scales into the weights."""
        return any(rule.config is not None and rule.method.startswith("awq") for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {**asdict(self), "rules": [asdict(rule) for rule in self.rules]}

    @classmethod
    def from_json(cls, data: Any, origin: str) -> Recipe:
        """The recipe that `to_json` gave. Other keys may stand beside its own, as in a manifest.

        Args:
            origin: where the data comes from, for the message.

        Raises:
            InputError: it is not a recipe.
        """
        read = typed_value(data, _File, f"{origin} is not a recipe", RECIPE_HINT)
        try:
            rules = tuple(QuantRule(rule.pattern, _config_of(rule), rule.method) for rule in read.rules)
            patterns.check(rule.pattern for rule in rules)
        except (InputError, patterns.PatternError) as error:
            raise InputError(f"{origin} is not a recipe ({one_line(error)}); {RECIPE_HINT}") from None
        return cls(read.name, rules, read.float_bits)


@dataclass(frozen=True)
class _Integers:
    """The keys of QuantConfig. Only the types of their values are checked here."""

    bits: Count
    group_size: Count
    symmetric: bool = True


@dataclass(frozen=True)
class _Rule:
    """The keys of QuantRule."""

    pattern: str
    config: _Integers | None
    method: str


@dataclass(frozen=True)
class _File:
    """A recipe's file."""

    name: Name
    rules: tuple[_Rule, ...]
    float_bits: int


def _config_of(rule: _Rule) -> QuantConfig | None:
    return QuantConfig(**asdict(rule.config)) if rule.config else None


INT8_ROW = QuantConfig(bits=8, group_size=0)
UNCALIBRATED_GROUP = 32  # data-free rounding is good enough only in groups this small (docs/quantization.md)
CALIBRATED_GROUP = 128


@dataclass(frozen=True)
class Quality:
    """How much work 4-bit integers are worth. docs/export/quantization.md has the figures behind each choice."""

    in_groups: str  # method for linears with groups
    per_channel: str  # method for linears with one scale per channel
    group_size: int  # default group size
    tokens: int = 0  # tokens of calibration text; 0: no text is used
    rounds: int = 0  # rounds in which scales are refitted and codes are found again
    refit: bool = False  # whether the post-norms are refitted

    def method(self, group_size: int) -> str:
        """The method for a group size."""
        return self.in_groups if group_size else self.per_channel


# Without data, clipping helps in small groups and does harm per channel.
QUALITIES = {
    "fast": Quality("mse", "rtn", UNCALIBRATED_GROUP),
    "balanced": Quality("gptq", "gptq", CALIBRATED_GROUP, tokens=8192),
    "best": Quality("awq+gptq", "awq+gptq", CALIBRATED_GROUP, tokens=16384, rounds=2, refit=True),
}
DEFAULT_QUALITY = "balanced"


def recipe_name(
    linears: Iterable[QuantConfig | None], table: QuantConfig | None, head: QuantConfig | None, float_bits: int
) -> str:
    """What the linears are, the most frequent kind first: int4-g32, int4-g32+int8-channel. An unusual table is named too, and a
    head that has other integers than the table.
    """
    kinds = [kind for kind, _ in Counter(linears).most_common()]
    tags = [
        f"float{float_bits}"
        if kind is None
        else f"int{kind.bits}-{f'g{kind.group_size}' if kind.group_size else 'channel'}"
        for kind in kinds
    ]
    usual = None if kinds == [None] else INT8_ROW  # table
    unusual = [
        f"-{what}{config.bits if config else float_bits}"
        for what, config, other in (("table", table, usual), ("head", head, table))
        if config != other
    ]
    return "+".join(tags) + "".join(unusual)


def default_method(config: QuantConfig, quality: str) -> str:
    """The method of a linear when none is chosen; 8 bits need no calibration."""
    return "rtn" if config.bits == 8 else QUALITIES[quality].method(config.group_size)


# HEAD_METHODS: how a head of 4 bits is rounded where that is not as the linears are: nothing folds scales into its inputs
HEAD_METHODS = {"awq": "hscale", "awq+gptq": "gptq"}


def make_recipe(
    bits: int,
    *,
    group_size: int | None = None,
    method: str | None = None,
    table_bits: int = 8,
    head_bits: int | None = None,
    quality: str = "fast",
) -> Recipe:
    """The recipe that the options of a quantization describe.

    Args:
        bits: 4 or 8 for the linears; 16 or 32 leaves the whole model float.
        group_size: weights per scale, 0: one scale per channel; None takes the default of bits and method.
        method: one of METHODS; None takes the default of bits, group size and quality.
        table_bits: bits of the table, and of a head of its own; 8: one scale per row, 4: groups as in the linears. Their method
            needs no data.
        head_bits: bits of the head where it has integers of its own; 4: rounded as the linears of 4 bits are. None: the head
            becomes what the table becomes.
        quality: one of QUALITIES; 8 bits need no calibration.

    Raises:
        InputError: a value outside the allowed ones.
    """
    if bits not in BITS:
        raise InputError(field="bits", value=bits, allowed=BITS)
    if bits >= 16:
        if group_size is not None or method is not None or table_bits != 8 or head_bits is not None:
            raise InputError(
                f"`bits` {bits} leaves the weights float: `group_size`, `method`, `table_bits`, `embedding_bits` and"
                " `head_bits` do not apply",
                field="bits",
                value=bits,
            )
        return Recipe(recipe_name([None], None, None, bits), (QuantRule(ANY, None),), bits)
    group = _group_size(bits, group_size, method, quality)
    config = QuantConfig(bits, group)
    chosen = method or default_method(config, quality)
    body = QuantRule(ANY, config, chosen)
    table = _table_rule(table_bits, group, chosen)
    rules: tuple[QuantRule, ...] = (table, body)
    if head_bits is not None:
        head = _head_rule(head_bits, _group_size(head_bits, group_size, method, quality), method, quality)
        rules = (head, *rules)
    name = recipe_name([body.config], table.config, rules[0].config, FLOAT_BITS)
    return Recipe(name, rules, FLOAT_BITS)


def _group_size(bits: int, requested: int | None, method: str | None, quality: str) -> int:
    """Weights per scale of a linear: the requested number, or what suits bits and method."""
    if requested is not None:
        return requested
    if bits == 8:
        return 0
    if method in FIXED:
        return FIXED[method].group_size
    if method is not None:
        return CALIBRATED_GROUP if method in CALIBRATED else UNCALIBRATED_GROUP
    return QUALITIES[quality].group_size


def _table_rule(bits: int, group: int, method: str) -> QuantRule:
    """The rule of the table; `group` and `method` are those of the linears."""
    if bits == 8:
        return QuantRule(TABLE_PATTERN, INT8_ROW)
    config = QuantConfig(bits, group or UNCALIBRATED_GROUP)
    return QuantRule(TABLE_PATTERN, config, method if method in DATA_FREE else QUALITIES["fast"].in_groups)


def _head_rule(bits: int, group: int, method: str | None, quality: str) -> QuantRule:
    """The rule of a head with integers of its own."""
    if bits == 8:
        return QuantRule(HEAD_PATTERN, INT8_ROW)
    config = QuantConfig(bits, group)
    chosen = method or default_method(config, quality)
    if chosen in DATA_FREE:  # without data, one scale for a row of four bits is too few
        return QuantRule(HEAD_PATTERN, QuantConfig(bits, group or UNCALIBRATED_GROUP), chosen)
    return QuantRule(HEAD_PATTERN, config, HEAD_METHODS.get(chosen, chosen))
