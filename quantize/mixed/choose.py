"""From a budget to a recipe: what the user allows, in bytes or bits per weight, and what each weight gets of it.

The measurement is quantize/mixed/sensitivity.py's and is kept between exports; the choice is quantize/mixed/budget.py's.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import HEAD, TABLE, Weights, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.quantized import QuantConfig
from gemma_edge.progress import Progress
from gemma_edge.quantize.calibration import cache
from gemma_edge.quantize.calibration import text as calibration
from gemma_edge.quantize.calibration.layerwise import only_here
from gemma_edge.quantize.mixed import sensitivity
from gemma_edge.quantize.mixed.budget import Option, as_recipe, solve
from gemma_edge.quantize.options import CalibrationText
from gemma_edge.quantize.recipe import DATA_FREE, FLOAT_BITS, HEAD_METHODS, METHODS, Recipe
from gemma_edge.reading import present, read_json
from gemma_edge.text.tokenizer import TOKENIZER_FILE

TOKENS = 8192  # tokens of calibration text that are measured on
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
MEASUREMENT = "sensitivity.json"


class FileSizes(Protocol):
    """How large a backend's weights file is. The module `gemma_edge.export.onnx.weights` is one."""

    def matrix_bytes(self, config: GemmaConfig, configs: Mapping[str, QuantConfig]) -> dict[str, int]:
        """Bytes of every matrix in the file, by its name."""
        ...

    def weights_bytes(
        self, source: Weights, configs: Mapping[str, QuantConfig | None], float_bits: int, *, int8_kv: bool
    ) -> int:
        """Bytes of the whole file."""
        ...


@dataclass(frozen=True)
class Budget:
    """What the user allows: `size` or `bpw`."""

    size: str | None = None  # largest size of the weights file, such as "1.4GB"
    bpw: float | None = None  # bits per weight of all matrices, the table among them; scales count 16 bits each
    sizes: FileSizes | None = None  # of the weights file that `size` limits; None: there is no such file

    @property
    def field(self) -> str:
        """The option's name."""
        return "size" if self.size is not None else "bpw"

    def __str__(self) -> str:
        """The option and its value, as an InputError names them."""
        return f"`size` {self.size}" if self.size is not None else f"`bpw` {self.bpw:g}"

    def refused(self, problem: str) -> InputError:
        """The error that says what is wrong with the budget."""
        return InputError(problem, field=self.field, value=self.size if self.bpw is None else self.bpw)


@dataclass(frozen=True)
class Mixed:
    """What every weight gets."""

    recipe: Recipe
    chosen: dict[str, Option]  # by weight
    bits_per_weight: float

    @property
    def predicted_kl(self) -> float:
        """Predicted KL to the original in nats per token: the errors of all weights, as they were measured, added up."""
        return sum(option.error for option in self.chosen.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        weights = {
            weight: {"bits": option.config.bits, "group_size": option.config.group_size, "predicted_kl": option.error}
            for weight, option in self.chosen.items()
        }
        return {
            "recipe": self.recipe.name,
            "bits_per_weight": self.bits_per_weight,
            "predicted_kl": self.predicted_kl,
            "weights": weights,
        }


def parse_size(text: str) -> int:
    """Bytes: "1.4GB", "900 MB", "1.3GiB", "1400000000".

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in UNITS:
        raise InputError(
            f"`size` {text}: a number of bytes with a unit, such as 1.4GB, 900MB or 1.3GiB", field="size", value=text
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def choose(
    source: Weights,
    budget: Budget,
    methods: sensitivity.Methods,
    text: CalibrationText,
    progress: Progress,
) -> Mixed:
    """The recipe with the least predicted error that keeps the budget.

    Args:
        methods: gives the method by which a linear's integers are found, from their configuration.
        text: text to measure on, unless this model was measured on it before.

    Raises:
        InputError: the budget cannot be kept, or nothing can be measured.
    """
    if source.is_quantized:
        raise budget.refused(f"{source.origin} is quantized already; {budget} needs the original float folder")
    if not source.config.tie_word_embeddings:
        raise budget.refused(
            f"{source.origin} has a head of its own, but {budget} needs a tied head; use `bits`, or a `recipe`"
        )
    if budget.bpw is not None and not math.isfinite(budget.bpw):
        raise budget.refused(f"{budget}; give a number of bits per weight")
    costs, limit = _costs(source, budget)
    _check(source, budget, costs, limit)
    errors = _errors(source, budget, methods, text, progress)
    options = {
        weight: [Option(config, cost, errors[weight][config]) for config, cost in candidates.items()]
        for weight, candidates in costs.items()
    }
    chosen = solve(options, limit)
    shapes = weight_shapes(source.config)
    bits = 8 * sum(option.config.stored_bytes(*shapes[weight]) for weight, option in chosen.items()) / _weights(source)
    rules = {weight: (option.config, methods(option.config)) for weight, option in chosen.items() if weight != TABLE}
    table = chosen[TABLE].config
    rules = {TABLE: (table, sensitivity.TABLE_METHODS[table]), **rules}
    return Mixed(as_recipe(f"mixed-{bits:.2f}bpw", rules), chosen, bits)


def _weights(source: Weights) -> int:
    """Number of weights in all matrices."""
    return sum(rows * columns for rows, columns in weight_shapes(source.config).values())


def _costs(source: Weights, budget: Budget) -> tuple[dict[str, dict[QuantConfig, int]], int]:
    """Bytes of every candidate of every matrix, and how many bytes all matrices may take together."""
    shapes = weight_shapes(source.config)
    choices = {weight: sensitivity.candidates(weight, columns) for weight, (_, columns) in shapes.items()}
    if budget.bpw is not None:
        stored = {w: {config: config.stored_bytes(*shapes[w]) for config in some} for w, some in choices.items()}
        return stored, int(budget.bpw * _weights(source) / 8)
    assert budget.size is not None
    if budget.sizes is None:
        raise budget.refused(
            "`size` limits the weights file of a bundle, and a quantized checkpoint has none; pass `bpw`, or a `recipe`"
            " that was made for this size"
        )
    costs: dict[str, dict[QuantConfig, int]] = {weight: {} for weight in shapes}
    for i in range(max(map(len, choices.values()))):
        configs = {weight: some[min(i, len(some) - 1)] for weight, some in choices.items()}
        for weight, count in budget.sizes.matrix_bytes(source.config, configs).items():
            costs[weight][configs[weight]] = count
    whole = budget.sizes.weights_bytes(source, configs, FLOAT_BITS, int8_kv=True)
    rest = whole - sum(costs[weight][configs[weight]] for weight in shapes)
    return costs, parse_size(budget.size) - rest


def _check(source: Weights, budget: Budget, costs: Mapping[str, Mapping[QuantConfig, int]], limit: int) -> None:
    """Refuse a budget that no choice of candidates can keep or use, before anything is measured."""
    smallest, largest = (sum(pick(some.values()) for some in costs.values()) for pick in (min, max))
    if smallest <= limit <= largest:
        return
    if budget.bpw is not None:
        weights = _weights(source)
        # rounded inwards, so that both numbers are themselves allowed
        low, high = math.ceil(800 * smallest / weights) / 100, math.floor(800 * largest / weights) / 100
        raise budget.refused(f"{budget}; mixed recipes of this model have {low:.2f} to {high:.2f} bits per weight")
    assert budget.size is not None
    rest = parse_size(budget.size) - limit
    raise budget.refused(
        f"{budget}; weights files of mixed recipes of this model take {smallest + rest} to {largest + rest} bytes"
    )


def _errors(
    source: Weights,
    budget: Budget,
    methods: sensitivity.Methods,
    text: CalibrationText,
    progress: Progress,
) -> sensitivity.Errors:
    """What each candidate costs the output: measured once per model, text and method."""
    if not present(source.text_folder / TOKENIZER_FILE):
        raise budget.refused(
            f"{source.origin} has no tokenizer, so no text to measure on for {budget}; use `group_size`"
        )
    config, text = source.config, replace(text, tokens=TOKENS)
    windows = calibration.windows(source.text_folder, config.bos_token_id, config.max_position_embeddings, text)
    folder = cache.calibration_folder(sensitivity.key_of(source, windows, methods))
    path = folder / MEASUREMENT
    errors = sensitivity.load(path)
    if errors is None:
        total = sensitivity.steps(config.num_hidden_layers)
        inputs = folder / "inputs"
        with only_here(folder), progress("measure sensitivity, layers there and back", total, False) as advance:
            inputs.mkdir(exist_ok=True)
            try:
                errors = sensitivity.measure(source, windows, methods, inputs, advance)
                sensitivity.save(errors, path)
            finally:
                shutil.rmtree(inputs, ignore_errors=True)
    return errors


def read_recipe(path: Path, source: Weights) -> Recipe:
    """A recipe that was saved, or the one in a bundle's manifest.

    Raises:
        InputError: no recipe, or not one for this model.
    """

    def refused(problem: str) -> InputError:
        return InputError(problem, field="recipe", value=path)

    if source.is_quantized:
        raise refused(f"{source.origin} is quantized already; `recipe` needs the original float folder")
    data = read_json(path, "`plan --save-recipe` writes a recipe", field="recipe")
    recipe = Recipe.from_json(data.get("recipe", data), f"`recipe` {path}")
    if recipe.float_bits not in (16, FLOAT_BITS):
        raise refused(f"`recipe` {path}: float_bits {recipe.float_bits}; supported: 16, {FLOAT_BITS}")
    for weight, (_, columns) in weight_shapes(source.config).items():
        if not recipe.covers(weight):
            raise refused(f"`recipe` {path}: no rule matches {weight}; is it of another model?")
        recipe.config_for(weight, columns)
    table = recipe.rule_for(TABLE)
    if table.config is not None and table.method not in DATA_FREE:
        raise refused(f"`recipe` {path}: the table is quantized by {table.method}; supported: {', '.join(DATA_FREE)}")
    head = recipe.rule_for(HEAD)
    if head.config is not None and head.method in HEAD_METHODS:
        supported = [method for method in METHODS if method not in HEAD_METHODS]
        raise refused(f"`recipe` {path}: the head is quantized by {head.method}; supported: {', '.join(supported)}")
    return recipe
