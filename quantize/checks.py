"""Options of a quantization that may not stand beside each other, or that would change nothing, are refused; and a warning where
the weights of a GGUF file are rounded a second time.
"""

from __future__ import annotations

import logging

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import TABLE, TABLES, Weights, weight_shapes
from gemma_edge.quantize.checkpoint.store import final_configs
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import CALIBRATED, Recipe

logger = logging.getLogger(__name__)

# EXCLUSIVE: options that decide the integers of every weight, and the options that may not stand beside them
TABLE_OPTIONS = ("table_bits", "embedding_bits", "head_bits")
EXCLUSIVE = {
    "recipe": ("size", "bpw", "bits", "group_size", *TABLE_OPTIONS, "method"),
    "size": ("bpw", "bits", "group_size", *TABLE_OPTIONS),
    "bpw": ("bits", "group_size", *TABLE_OPTIONS),
}


def refuse_exclusive(options: QuantizeOptions) -> None:
    """Refuse options that may not stand beside each other.

    Raises:
        InputError: names them.
    """
    for field, others in EXCLUSIVE.items():
        beside = [f"`{other}`" for other in others if getattr(options, other) is not None]
        if getattr(options, field) is not None and beside:
            raise InputError(
                f"`{field}` decides the integers of every weight: {', '.join(beside)} cannot be combined with it",
                field=field,
                value=getattr(options, field),
            )
    for field in TABLE_OPTIONS[1:]:
        if getattr(options, field) is not None and options.table_bits is not None:
            raise InputError(
                f"`table_bits` gives table and head the same bits: `{field}` cannot be combined with it",
                field="table_bits",
                value=options.table_bits,
            )


def refuse_idle(options: QuantizeOptions, source: Weights, recipe: Recipe) -> None:
    """Refuse options that would change nothing, or undo another. The quality `fast` needs no text and is always allowed.

    Raises:
        InputError: names the option.
    """
    name, searched = source.origin.name, options.quality not in (None, "fast")
    if source.is_quantized:
        _refuse_float_only(options, source, recipe)
        _refuse_other_tables(options, source)
    linears = [config for weight, config in final_configs(source, recipe).items() if weight not in TABLES]
    if options.distill and not any(linears):
        raise InputError(
            f"`distill` trains scales of quantized linears, and {name} becomes {recipe.name}: leave it out",
            field="distill",
            value=options.distill,
        )
    if options.distill and recipe.fixed is not None:
        raise InputError(
            f"`distill` trains scales, and `method` {recipe.fixed} keeps those of llama.cpp: leave it out",
            field="distill",
            value=options.distill,
        )
    if searched and not recipe.calibrated:
        raise InputError(
            f"`quality` {options.quality} uses calibration text, and {name} becomes {recipe.name} without data:"
            f" leave it out{', or pass `method` gptq' if any(linears) and options.recipe is None else ''}",
            field="quality",
            value=options.quality,
        )


def _refuse_float_only(options: QuantizeOptions, source: Weights, recipe: Recipe) -> None:
    """Refuse options that need float weights, for a folder that is already quantized."""
    rules = [recipe.rule_for(weight) for weight, config in source.configs.items() if config is None]
    methods = {rule.method for rule in rules if rule.config is not None} - set(CALIBRATED)  # of weights still float
    idle = {
        "distill": bool(options.distill),
        "quality": options.quality not in (None, "fast"),
        "method": options.method is not None and options.method not in methods,
    }
    for field in (field for field, is_idle in idle.items() if is_idle):
        value = getattr(options, field)
        raise InputError(
            f"`{field}`{'' if field == 'distill' else f' {value}'} works on float weights, and {source.origin.name} is"
            " quantized already, its integers stay as they are: leave it out, or pass the float original",
            field=field,
            value=value,
        )


def _refuse_other_tables(options: QuantizeOptions, source: Weights) -> None:
    """Refuse bits of a table or a head that is there in other integers already."""
    weights = {"table_bits": TABLE, "embedding_bits": TABLE, "head_bits": source.config.head}
    for field, weight in weights.items():
        value, config = getattr(options, field), source.configs[weight]
        if value is not None and config is not None and config.bits != value:
            raise InputError(
                f"`{field}` {value} works on float weights, and {weight} of {source.origin.name} has {config} already: leave it"
                " out, or pass the float original",
                field=field,
                value=value,
            )


def warn_of_rounded(source: Weights, recipe: Recipe) -> None:
    """Log a warning if integers are made from the integers of a GGUF file, which they are not where these are kept.

    A calibration rounds all linears anew, because folds may have changed them.
    """
    configs = [(weight, config) for weight, config in final_configs(source, recipe).items() if config is not None]
    anew = weight_shapes(source.config).keys() - set(TABLES) if recipe.calibrated else set()
    made = [
        weight
        for weight, config in configs
        if weight in anew or not source.keeps(weight, config, recipe.rule_for(weight).method)
    ]
    types = [kind for kind in map(source.rounded, made) if kind is not None]
    if types:
        logger.warning(
            "%s: its weights are quantized already (%s), and integers are made from these: the original's would be better",
            source.origin,
            ", ".join(f"{kind} x {types.count(kind)}" for kind in sorted({*types})),
        )
