"""The first half of an export: the recipe that was asked for, the text to look at, and the quantized checkpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions
from gemma_edge.model.checkpoint import TABLE, Checkpoint, weight_shapes
from gemma_edge.progress import Progress, Stage, stage
from gemma_edge.quantize.calibration import cache, layerwise
from gemma_edge.quantize.calibration import text as calibration
from gemma_edge.quantize.checkpoint.kv_scales import KVScales
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, final_configs, write_quantized
from gemma_edge.quantize.distillation.distill import Schedule
from gemma_edge.quantize.distillation.recovery import recover
from gemma_edge.quantize.mixed import choose as mixed
from gemma_edge.quantize.recipe import (
    CALIBRATED,
    DEFAULT_QUALITY,
    METHODS,
    QUALITIES,
    QuantConfig,
    Recipe,
    default_method,
    make_recipe,
)
from gemma_edge.text import corpus
from gemma_edge.text.tokenizer import TOKENIZER_FILE, WAY_OUT

logger = logging.getLogger(__name__)

DEFAULT_BITS, DEFAULT_TABLE_BITS = 4, 8
# what decides the integers of every weight, and what may not stand beside it
EXCLUSIVE = {
    "--recipe": ("--size", "--bpw", "--bits", "--group-size", "--table-bits", "--method"),
    "--size": ("--bpw", "--bits", "--group-size", "--table-bits"),
    "--bpw": ("--bits", "--group-size", "--table-bits"),
}
SOURCE_BYTES = 2  # of a weight in the original, for the progress bar


def choose_recipe(
    options: ExportOptions, source: Checkpoint | QuantizedCheckpoint, progress: Progress
) -> tuple[Recipe, mixed.Mixed | None]:
    """The recipe of the options, and what was weighed if they give a budget.

    Raises:
        InputError: an option outside the allowed ones.
    """
    _refuse_exclusive(options)
    quality = options.quality
    if quality is not None and quality not in QUALITIES:
        raise InputError(f"--quality {quality}; supported: {', '.join(QUALITIES)}")
    if options.size is not None or options.bpw is not None:
        choice = _within_budget(options, source, quality or DEFAULT_QUALITY, progress)
        return choice.recipe, choice
    recipe = mixed.read_recipe(options.recipe, source) if options.recipe is not None else _made(options, source)
    _refuse_idle(options, source, recipe)
    return recipe, None


def _made(options: ExportOptions, source: Checkpoint | QuantizedCheckpoint) -> Recipe:
    bits = DEFAULT_BITS if options.bits is None else options.bits
    quality = options.quality
    if quality is None:
        # nothing to calibrate on without a tokenizer, and nothing to calibrate beside integers that are there already
        has_text, given = (source.folder / TOKENIZER_FILE).is_file(), isinstance(source, QuantizedCheckpoint)
        quality = DEFAULT_QUALITY if has_text and not given else "fast"
        if not has_text and not given and options.method is None and bits == DEFAULT_BITS:
            logger.warning("%s has no tokenizer, so nothing to calibrate on: --quality fast", source.folder)
    return make_recipe(
        bits,
        group_size=options.group_size,
        method=options.method,
        table_bits=DEFAULT_TABLE_BITS if options.table_bits is None else options.table_bits,
        quality=quality,
    )


def _refuse_idle(options: ExportOptions, source: Checkpoint | QuantizedCheckpoint, recipe: Recipe) -> None:
    """Refuse what was asked for where nothing would heed it. `--quality fast` asks for no text, and may stand anywhere."""
    name, searched = source.folder.name, options.quality not in (None, "fast")
    if isinstance(source, QuantizedCheckpoint):
        rules = [recipe.rule_for(weight) for weight, config in source.configs.items() if config is None]
        methods = {rule.method for rule in rules if rule.config is not None} - set(CALIBRATED)  # of what is float yet
        asked = {
            "--distill": bool(options.distill),
            f"--quality {options.quality}": searched,
            f"--method {options.method}": options.method is not None and options.method not in methods,
        }
        for what, idle in asked.items():
            if idle:
                raise InputError(
                    f"{what} works on float weights, and {name} is quantized already, its integers stay as they are:"
                    " leave it out, or pass the float original"
                )
    linears = [config for weight, config in final_configs(source, recipe).items() if weight != TABLE]
    if options.distill and not any(linears):
        raise InputError(
            f"--distill trains scales of quantized linears, and {name} becomes {recipe.name}: leave it out"
        )
    if searched and not recipe.calibrated:
        raise InputError(
            f"--quality {options.quality} looks at text, and nothing does where {name} becomes {recipe.name} without data:"
            f" leave it out{', or pass --method gptq' if any(linears) and options.recipe is None else ''}"
        )


def way_to_kv_scales(options: ExportOptions, source: Checkpoint | QuantizedCheckpoint, recipe: Recipe) -> str:
    """How to come by the scales of an int8 KV cache where there will be none, as the end of a sentence."""
    if isinstance(source, QuantizedCheckpoint):
        return f"{source.folder.name} is quantized already and holds none; pass the float original, or --kv-bits 32"
    if not any(recipe.rule_for(weight).config for weight in weight_shapes(source.config) if weight != TABLE):
        return f"none are found where the weights become {recipe.name}; use --kv-bits 32"
    return f"use {'a recipe with' if options.recipe is not None else '--method'} gptq, or --kv-bits 32"


def _within_budget(
    options: ExportOptions, source: Checkpoint | QuantizedCheckpoint, quality: str, progress: Progress
) -> mixed.Mixed:
    if options.method is not None and options.method not in METHODS:
        raise InputError(f"--method {options.method}; supported: {', '.join(METHODS)}")

    def methods(config: QuantConfig) -> str:
        return (options.method if config.bits == 4 else None) or default_method(config, quality)

    return mixed.choose(source, mixed.Budget(options.size, options.bpw), methods, options.text, progress)


def _refuse_exclusive(options: ExportOptions) -> None:
    def given(flag: str) -> bool:
        return getattr(options, flag.removeprefix("--").replace("-", "_")) is not None

    for flag, others in EXCLUSIVE.items():
        beside = [other for other in others if given(other)]
        if given(flag) and beside:
            raise InputError(f"{flag} decides the integers of every weight: {', '.join(beside)} cannot stand beside it")


def calibration_tokens(options: ExportOptions, source: Checkpoint | QuantizedCheckpoint, recipe: Recipe) -> int:
    """How much text a rule asks to look at; 0: none does, or the folder is quantized already."""
    if not recipe.calibrated or isinstance(source, QuantizedCheckpoint):
        return 0
    wanted = QUALITIES[options.quality or DEFAULT_QUALITY].tokens
    return options.text.tokens or wanted or QUALITIES[DEFAULT_QUALITY].tokens


def choose_calibration(
    options: ExportOptions, source: Checkpoint | QuantizedCheckpoint, recipe: Recipe
) -> layerwise.Calibration | None:
    """The windows to look at, if there are any.

    Raises:
        InputError: text that cannot be used, or that nothing would look at.
    """
    tokens = calibration_tokens(options, source, recipe)
    weighed = options.size is not None or options.bpw is not None
    if options.text != calibration.Source() and not (tokens or weighed or options.distill):
        given = isinstance(source, QuantizedCheckpoint)
        raise InputError(
            f"nothing looks at calibration text here, where {source.folder.name}"
            f" {'is quantized already' if given else f'becomes {recipe.name} without data'}: leave out --calibration,"
            " --calibration-tokens, --calibration-chat and --seed, or"
            f" {'pass the float original' if given else 'choose another --quality or --method'}"
        )
    if not tokens or isinstance(source, QuantizedCheckpoint):
        return None
    quality = QUALITIES[options.quality or DEFAULT_QUALITY]
    return layerwise.Calibration(_windows(source, options.text, tokens), quality.rounds, quality.refit)


def make_checkpoint(
    options: ExportOptions,
    source: Checkpoint | QuantizedCheckpoint,
    recipe: Recipe,
    seen: layerwise.Calibration | None,
    out: Path,
    progress: Progress,
    stages: list[Stage],
) -> tuple[QuantizedCheckpoint, dict[str, Any]]:
    """Calibrate if there is something to look at, write the checkpoint, and distill if asked to.

    Returns:
        the checkpoint, and what the manifest says of its calibration.
    """
    layers = None
    kv_scales: KVScales | None = None
    learnt: dict[str, Any] = {}
    if seen is not None and isinstance(source, Checkpoint):
        folder = cache.calibration_folder(layerwise.key_of(source, recipe, seen))
        with (
            layerwise.only_here(folder),
            stage(stages, "calibrate"),
            progress("calibrate, layers", source.config.num_hidden_layers, False) as advance,
        ):
            reports, kv_scales = layerwise.calibrate(source, recipe, seen, folder, advance)
        layers = partial(layerwise.layer_file, folder)
        texts = [path.name for path in options.text.paths] or list(corpus.CALIBRATION)
        learnt = {"tokens": seen.windows.numel(), "text": texts, "seed": options.text.seed}
        learnt["layers"] = [asdict(report) for report in reports]
    with stage(stages, "quantize"), progress("quantize", SOURCE_BYTES * source.config.num_parameters, True) as advance:
        quantized = write_quantized(
            source, recipe, out, lambda done: advance(SOURCE_BYTES * done), layers=layers, kv_scales=kv_scales
        )
    if options.distill and isinstance(source, Checkpoint):
        windows, schedule = _windows(source, options.text, options.distill), Schedule(seed=options.text.seed)
        steps = schedule.epochs * max(1, len(windows) - schedule.held_out)
        with stage(stages, "distill"), progress("distill, windows", steps, False) as advance:
            learnt["distilled"] = asdict(recover(source, quantized, windows, schedule, advance))
        quantized = QuantizedCheckpoint.open(out)
    return quantized, learnt


def _windows(source: Checkpoint, text: calibration.Source, tokens: int) -> Tensor:
    config = source.config
    wanted = replace(text, tokens=tokens)
    found = calibration.windows(source.folder, config.bos_token_id, config.max_position_embeddings, wanted)
    if found.max() >= config.vocab_size:
        raise InputError(
            f"{source.folder / TOKENIZER_FILE} gives token id {found.max()}, the model has a vocabulary of"
            f" {config.vocab_size}; {WAY_OUT}"
        )
    return found
