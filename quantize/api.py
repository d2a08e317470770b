"""Quantization from options to a checkpoint: the recipe, the calibration text, the quantized checkpoint.

`quantize` does all of it. An export calls the steps one by one, because it plans between them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_edge.bundle.staging import Kind, refuse_existing, staged
from gemma_edge.errors import InputError
from gemma_edge.model import hub
from gemma_edge.model.checkpoint import TABLES, Weights, weight_shapes
from gemma_edge.model.quantized import QuantConfig
from gemma_edge.progress import Progress, Stage, no_progress, stage
from gemma_edge.quantize.calibration import cache, layerwise
from gemma_edge.quantize.calibration import text as calibration
from gemma_edge.quantize.calibration.head import calibrates_head, head_quantizer
from gemma_edge.quantize.calibration.windows import Each, in_turn
from gemma_edge.quantize.checkpoint.split_table import split_where_needed
from gemma_edge.quantize.checkpoint.store import (
    QuantizedCheckpoint,
    is_quantized_folder,
    named_by_content,
    open_weights,
)
from gemma_edge.quantize.checkpoint.writer import Fitted, write_quantized
from gemma_edge.quantize.checks import refuse_exclusive, refuse_idle, warn_of_rounded
from gemma_edge.quantize.distillation.distill import Schedule
from gemma_edge.quantize.distillation.recovery import recover
from gemma_edge.quantize.mixed import choose as mixed
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions
from gemma_edge.quantize.recipe import (
    DEFAULT_QUALITY,
    FIXED,
    METHODS,
    QUALITIES,
    Recipe,
    default_method,
    make_recipe,
)
from gemma_edge.quantize.vocabulary.trimmed import trim
from gemma_edge.reading import present
from gemma_edge.text import corpus
from gemma_edge.text.check import check_text_files
from gemma_edge.text.tokenizer import TOKENIZER_FILE, TOKENIZER_HINT

logger = logging.getLogger(__name__)

DEFAULT_BITS, DEFAULT_TABLE_BITS = 4, 8
SOURCE_BYTES = 2  # bytes of a weight in the original, for the progress bar
CHECKPOINT = Kind("checkpoint", "quantized checkpoint", is_quantized_folder)


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized checkpoint that was made."""

    path: Path  # its folder, which `gemma_edge.export` takes as a model
    recipe: Recipe
    configs: Mapping[str, QuantConfig | None]  # by weight: its integers; None: it is float
    stages: tuple[Stage, ...]  # what was done, with its time and memory
    calibration: Mapping[
        str, Any
    ]  # tokens, texts, seed, errors by layer, and what distillation did; {}: no text was used


@dataclass(frozen=True)
class Quantization:
    """A quantization with all its choices made, and nothing written yet."""

    options: QuantizeOptions
    source: Weights
    recipe: Recipe
    calibration: layerwise.Calibration | None  # None: no weight's integers depend on text


def quantize(
    model: str | Path,
    out: Path,
    options: QuantizeOptions = QuantizeOptions(),  # noqa: B008, it is frozen
    *,
    lora: str | Path | None = None,
    vocab: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> QuantizedModel:
    """Make a quantized checkpoint. It appears at `out` complete, or not at all.

    Its integers are those of an export with the same options.

    Args:
        model: a Hugging Face folder or id, or a GGUF file.
        out: the checkpoint's folder.
        options: how the weights become integers.
        lora: a PEFT adapter to merge first, a folder or a Hugging Face id.
        vocab: a text whose tokens alone are kept, or auto: and a text.
        force: replace a quantized checkpoint that is already at `out`.
        progress: is told how far each stage is.

    Raises:
        InputError: the model or an option cannot be used, or `out` exists.
    """
    refuse_existing(out, force, CHECKPOINT)
    source = open_source(str(model), lora, vocab)
    if out.resolve() == source.origin.resolve():
        raise InputError(f"{out} is the model itself", field="out", value=out, hint="pass another folder to `out`")
    source, recipe, _ = choose_recipe(options, source, None, progress)
    work = Quantization(options, source, recipe, choose_calibration(options, source, recipe))
    stages: list[Stage] = []
    with staged(out, force=force, kind=CHECKPOINT) as folder:
        quantized, learnt = make_checkpoint(work, folder / CHECKPOINT.folder, progress, stages)
    return QuantizedModel(out, recipe, quantized.configs, tuple(stages), learnt)


def open_source(model: str, lora: str | Path | None, vocab: str | None = None) -> Weights:
    """Find and open a model that a checkpoint or a bundle will be made of. It reads only the headers of the weights.

    Args:
        model: a Hugging Face folder or id, or a GGUF file.
        lora: a PEFT adapter to merge, a folder or a Hugging Face id.
        vocab: a text whose tokens alone are kept, or auto: and a text.

    Raises:
        InputError: the model or the adapter cannot be used, or one of its files could not be copied in the end.
    """
    folder = hub.resolve(model)
    hub.companions(folder)
    source = open_weights(folder, lora=hub.resolve_adapter(lora) if lora is not None else None)
    hub.companions(source.text_folder)
    source.config = replace(source.config, eos_token_id=check_text_files(source.text_folder, source.config))
    return source if vocab is None else trim(source, vocab)


def choose_recipe(
    options: QuantizeOptions, source: Weights, sizes: mixed.FileSizes | None, progress: Progress
) -> tuple[Weights, Recipe, mixed.Mixed | None]:
    """The weights as they will be made into integers, the recipe that the options describe, named by what they will be, and the
    choice behind it under a budget.

    Args:
        source: a tied model gets a head of its own where the recipe makes other integers of it than of the table.
        sizes: of the weights file that `options.size` limits; None: there is no such file, and `size` is refused.

    Raises:
        InputError: an option outside the allowed ones.
    """
    refuse_exclusive(options)
    quality = options.quality
    if quality is not None and quality not in QUALITIES:
        raise InputError(field="quality", value=quality, allowed=QUALITIES)
    choice: mixed.Mixed | None = None
    if options.has_budget:
        choice = _within_budget(options, source, sizes, progress)
        recipe = choice.recipe
    else:
        recipe = mixed.read_recipe(options.recipe, source) if options.recipe is not None else _made(options, source)
        source = split_where_needed(source, recipe)
        refuse_idle(options, source, recipe)
    warn_of_rounded(source, recipe)
    return source, named_by_content(source, recipe), choice


def _made(options: QuantizeOptions, source: Weights) -> Recipe:
    """The recipe of bits, group size, method and quality."""
    bits = DEFAULT_BITS if options.bits is None else options.bits
    quality = options.quality
    if quality is None:
        # without a tokenizer there is no text to calibrate on, and integers that are already there need none
        has_text = present(source.text_folder / TOKENIZER_FILE)
        quality = DEFAULT_QUALITY if has_text and not source.is_quantized else "fast"
        if not has_text and not source.is_quantized and options.method is None and bits == DEFAULT_BITS:
            logger.warning("%s has no tokenizer, so nothing to calibrate on: `quality` fast", source.origin)
    table, head = options.table_bits, options.head_bits
    if options.embedding_bits is not None or head is not None:
        table = options.embedding_bits
        head = DEFAULT_TABLE_BITS if head is None else head
    return make_recipe(
        bits,
        group_size=options.group_size,
        method=options.method,
        table_bits=DEFAULT_TABLE_BITS if table is None else table,
        head_bits=head,
        quality=quality,
    )


def way_to_kv_scales(options: QuantizeOptions, source: Weights, recipe: Recipe) -> str:
    """How to get the scales of an int8 KV cache where there will be none, as the end of an InputError's sentence."""
    if source.is_quantized:
        return f"{source.origin.name} is quantized already and holds none; pass the float original, or `kv_bits` 32"
    linears = weight_shapes(source.config).keys() - set(TABLES)
    if not any(recipe.rule_for(weight).config for weight in linears):
        return f"none are found where the weights become {recipe.name}; use `kv_bits` 32"
    return f"use {'a recipe with' if options.recipe is not None else '`method`'} gptq, or `kv_bits` 32"


def _within_budget(
    options: QuantizeOptions, source: Weights, sizes: mixed.FileSizes | None, progress: Progress
) -> mixed.Mixed:
    if options.method is not None and options.method not in METHODS:
        raise InputError(field="method", value=options.method, allowed=METHODS)
    if options.method in FIXED:
        raise InputError(
            f"`method` {options.method} makes {FIXED[options.method]} everywhere: `size` and `bpw` cannot be combined with it",
            field="method",
            value=options.method,
        )
    quality = options.quality or DEFAULT_QUALITY

    def methods(config: QuantConfig) -> str:
        return (options.method if config.bits == 4 else None) or default_method(config, quality)

    budget = mixed.Budget(options.size, options.bpw, sizes)
    return mixed.choose(source, budget, methods, options.calibration_text, progress)


def calibration_tokens(options: QuantizeOptions, source: Weights, recipe: Recipe) -> int:
    """How many tokens of text the recipe's methods look at; 0: none of them does, or the folder is quantized already."""
    if not recipe.calibrated or source.is_quantized:
        return 0
    by_quality = QUALITIES[options.quality or DEFAULT_QUALITY].tokens
    return options.calibration_text.tokens or by_quality or QUALITIES[DEFAULT_QUALITY].tokens


def choose_calibration(options: QuantizeOptions, source: Weights, recipe: Recipe) -> layerwise.Calibration | None:
    """The windows of text to calibrate on; None: nothing is calibrated.

    Raises:
        InputError: text that cannot be used, or that nothing would look at.
    """
    tokens = calibration_tokens(options, source, recipe)
    if options.calibration_text != CalibrationText() and not (tokens or options.has_budget or options.distill):
        given = source.is_quantized
        raise InputError(
            f"no step of this quantization uses calibration text: {source.origin.name}"
            f" {'is quantized already' if given else f'becomes {recipe.name} without data'}; leave out"
            " `calibration_text`, `calibration_tokens`, `calibration_chat` and `seed`, or"
            f" {'pass the float original' if given else 'choose another `quality` or `method`'}",
            field="calibration_text",
            value=options.calibration_text,
        )
    if not tokens:
        return None
    quality = QUALITIES[options.quality or DEFAULT_QUALITY]
    return layerwise.Calibration(_windows(source, options.calibration_text, tokens), quality.rounds, quality.refit)


def make_checkpoint(
    work: Quantization, out: Path, progress: Progress, stages: list[Stage], each: Each = in_turn
) -> tuple[QuantizedCheckpoint, dict[str, Any]]:
    """Calibrate if there is text to look at, write the checkpoint, and distill if the options say so.

    Args:
        each: does the jobs of a calibration that do not depend on each other.

    Returns:
        the checkpoint, and what the manifest says of its calibration.
    """
    source, fitted = work.source, None
    learnt: dict[str, Any] = {}
    if work.calibration is not None:
        folder = cache.calibration_folder(layerwise.key_of(source, work.recipe, work.calibration))
        with (
            layerwise.only_here(folder),
            stage(stages, "calibrate"),
            progress("calibrate, layers", source.config.num_hidden_layers, False) as advance,
        ):
            reports, kv_scales = layerwise.calibrate(source, work.recipe, work.calibration, folder, advance, each)
        head = head_quantizer(folder, work.recipe) if calibrates_head(source, work.recipe) else None
        fitted = Fitted(partial(layerwise.layer_file, folder), head, kv_scales)
        learnt = _learnt(work.options.calibration_text, work.calibration, reports)
    with stage(stages, "quantize"), progress("quantize", SOURCE_BYTES * source.config.num_parameters, True) as advance:
        quantized = write_quantized(source, work.recipe, out, lambda done: advance(SOURCE_BYTES * done), fitted=fitted)
    if work.options.distill:
        learnt["distilled"] = _distill(work, quantized, progress, stages)
        quantized = QuantizedCheckpoint.open(out)
    quantized.config = source.config  # it may have more stop ids than the files
    return quantized, learnt


def _learnt(text: CalibrationText, used: layerwise.Calibration, reports: list[layerwise.Report]) -> dict[str, Any]:
    return {
        "tokens": used.windows.numel(),
        "text": [path.name for path in text.paths] or list(corpus.CALIBRATION),
        "seed": text.seed,
        "layers": [asdict(report) for report in reports],
    }


def _distill(
    work: Quantization, quantized: QuantizedCheckpoint, progress: Progress, stages: list[Stage]
) -> dict[str, Any]:
    options, source = work.options, work.source
    schedule = Schedule(seed=options.calibration_text.seed)
    windows = _windows(source, options.calibration_text, options.distill)
    steps = schedule.epochs * max(1, len(windows) - schedule.held_out)
    with stage(stages, "distill"), progress("distill, windows", steps, False) as advance:
        return asdict(recover(source, quantized, windows, schedule, advance))


def _windows(source: Weights, text: CalibrationText, tokens: int) -> Tensor:
    config, text = source.config, replace(text, tokens=tokens)
    windows = calibration.windows(source.text_folder, config.bos_token_id, config.max_position_embeddings, text)
    if windows.max() >= config.vocab_size:
        raise InputError(
            f"{source.text_folder / TOKENIZER_FILE} gives token id {windows.max()}, the model has a vocabulary of"
            f" {config.vocab_size}; {TOKENIZER_HINT}"
        )
    return windows
