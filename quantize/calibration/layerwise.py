"""The calibration pass over a Gemma checkpoint, layer by layer. Finished layers are kept on disk, so a killed pass goes on.

Two streams of activations run through the layers. The first runs through the quantized layers; the next layer's integers are
fitted to it. The second runs through the original layers and shows how far the two have come apart. What happens inside a layer
is block.py's.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import TABLE, Weights, layer_norms, linear_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import DecoderLayer
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.quantize.calibration.block import Choice, gemma_topology, quantize_block, second_moments
from gemma_edge.quantize.calibration.head import HEAD_FILE, calibrates_head, write_moment
from gemma_edge.quantize.calibration.refit import refit_post_norms
from gemma_edge.quantize.calibration.windows import Each, advance, advance_with_ranges, in_turn, runner
from gemma_edge.quantize.checkpoint.kv_scales import KVRanges, KVScales
from gemma_edge.quantize.checkpoint.safetensors_writer import plain_spec, write_safetensors
from gemma_edge.quantize.checkpoint.writer import block_specs, float_type
from gemma_edge.quantize.integers import QuantizedTensor, quantize
from gemma_edge.quantize.recipe import Recipe

VERSION = 6  # version of what this pass computes; a pass does not go on with files of another version
STATE = "state.safetensors"
SAMPLES, SAMPLE_BYTES = 256, 64  # number and size of the pieces of each model file that go into the key
HEADER_BYTES = 8192  # bytes of a layer's file beside its tensors, with what packing rounds up


@dataclass(frozen=True)
class Calibration:
    """The text of a pass, and how much work it does."""

    windows: Tensor  # (N, T) int64, BOS first
    rounds: int = 0  # rounds in which scales are refitted and codes are found again
    refit: bool = False  # whether the post-norms are refitted


@dataclass(frozen=True)
class Report:
    """One finished layer."""

    layer: int
    relative_error: float  # error of the residual stream after the layer, from `stream_error`


def stream_error(x: Tensor, original: Tensor) -> float:
    """How far a residual stream is from the original's: the mean over positions of |x - original| / |original|.

    Per position, because BOS carries activations so large that they would drown the rest.

    Args:
        x, original: (..., T, hidden).
    """
    return float(((x - original).norm(dim=-1) / original.norm(dim=-1)).mean())


def layer_file(folder: Path, layer: int) -> Path:
    """The file of a finished layer, which becomes the layer's shard of the quantized checkpoint."""
    return folder / f"layer-{layer:03d}.safetensors"


def key_of(source: Weights, recipe: Recipe, calibration: Calibration) -> str:
    """A hash of everything that a pass depends on."""
    return hash_of(source, calibration.windows, [VERSION, recipe.to_json(), calibration.rounds, calibration.refit])


def hash_of(source: Weights, windows: Tensor, parts: Sequence[object]) -> str:
    """A hash of a model's files, of the windows of text, and of `parts`."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
    text = [torch.__version__, files, source.config.to_json(), windows.shape, *parts]
    seen = json.dumps(text, sort_keys=True, default=str).encode() + b"".join(map(_sample, source.files()))
    return hashlib.sha256(seen + windows.numpy().tobytes()).hexdigest()[:24]


def _sample(path: Path) -> bytes:
    """Pieces from all over a file: two fine-tunes of a model may have the same sizes and, if unpacked, the same times."""
    with path.open("rb") as file:
        starts = range(0, path.stat().st_size, max(1, path.stat().st_size // SAMPLES))
        return b"".join(file.read(SAMPLE_BYTES) for start in starts if file.seek(start) == start)


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. The system unlocks it when the process ends, however it ends.

    Raises:
        InputError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another export is calibrating the same model in {folder}; wait for it") from None
        yield


@dataclass
class _Streams:
    """How far the pass has come."""

    done: int  # layers finished
    quantized: Tensor  # (N, T, hidden) entering layer `done`, through quantized layers
    original: Tensor  # (N, T, hidden) the same through the original's
    reports: list[Report]  # one per finished layer
    ranges: KVRanges


@torch.no_grad()
def calibrate(
    source: Weights,
    recipe: Recipe,
    calibration: Calibration,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
    each: Each = in_turn,
) -> tuple[list[Report], KVScales]:
    """Quantize every layer into `folder`, going on where an earlier pass with the same inputs stopped.

    Args:
        source: float weights.
        recipe: methods and integers of every linear and of the table, whose rounding the first layer should see.
        calibration: the windows of text, and how much work is done.
        folder: a folder of this pass alone: see `key_of` and `only_here`.
        progress: called with 1 per finished layer, and at the start with the number of layers that an earlier pass finished.
        each: does the parts of a layer's work that do not depend on each other; the integers do not depend on it.

    Returns:
        how far each layer's output is from the original's, and the scales of an int8 KV cache.

    Raises:
        InputError: the weights or the activations are NaN or infinite.
    """
    layers = source.config.num_hidden_layers
    last = [folder / HEAD_FILE] if calibrates_head(source, recipe) else []
    streams = _load(folder, last) or _embedded(source, recipe, calibration.windows)
    progress(streams.done)
    for layer in range(streams.done, layers):
        block, integers = _quantize_layer(source, recipe, calibration, layer, streams, each)
        streams.reports.append(Report(layer, stream_error(streams.quantized, streams.original)))
        streams.done = layer + 1
        if streams.done == layers and calibrates_head(source, recipe):
            write_moment(source, streams.quantized, folder)
        if streams.done == layers:  # nothing goes on from here: this saves hundreds of MB on disk
            streams.quantized = streams.original = torch.empty(0)
        _write_layer(folder, source, recipe, layer, block, integers)
        _save(folder / STATE, streams)
        progress(1)
    return streams.reports, streams.ranges.scales()


def _quantize_layer(
    source: Weights, recipe: Recipe, calibration: Calibration, layer: int, streams: _Streams, each: Each
) -> tuple[DecoderLayer, dict[str, QuantizedTensor]]:
    """Quantize one layer, and move both streams to its output.

    Returns:
        the block as it will compute, and the integers of its linears by their name in the block.
    """
    block, run = source.load_layer(layer), runner(source, layer, calibration.windows.shape[1])
    advance(block, streams.original, run, each)
    original = copy.deepcopy(block) if calibration.refit else None
    topology = gemma_topology(source.config)
    try:
        moments = second_moments(block, streams.quantized, run, topology, each)
        choices = _choices(source, recipe, layer)
        integers = quantize_block(block, moments, topology, choices, rounds=calibration.rounds, each=each)
    except InputError as error:
        raise InputError(f"layer {layer}: {error.spelled(lambda name: f'`{name}`')}") from None
    _round_rest(block, source, recipe, layer, integers)
    if original is not None:
        refit_post_norms(block, original, streams.quantized, run, source.config.rms_norm_eps)
    advance_with_ranges(block, streams.quantized, run, streams.ranges, each)
    return block, integers


def token_rows(source: Weights, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The table's rows of the tokens that occur, (seen, hidden), and the index of its row for each token of (N, T): (N * T,)."""
    seen, place = torch.unique(windows.flatten(), return_inverse=True)
    return torch.cat([source.rows(TABLE, int(token), int(token) + 1) for token in seen]), place


def _embedded(source: Weights, recipe: Recipe, windows: Tensor) -> _Streams:
    """The streams before the first layer: rows of the original table, and rows of the table as its integers will give them."""
    rows, place = token_rows(source, windows)
    rule = recipe.rule_for(TABLE)
    config = recipe.config_for(TABLE, rows.shape[1])
    rounded = rows if config is None else quantize(rows, config, rule.method).dequantize()
    scale = source.config.hidden_size**0.5
    shape = (*windows.shape, -1)
    return _Streams(0, (rounded[place] * scale).view(shape), (rows[place] * scale).view(shape), [], KVRanges())


def _choices(source: Weights, recipe: Recipe, layer: int) -> dict[str, Choice]:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): Choice(recipe.config_for(name, columns), recipe.rule_for(name).method)
        for name, (_, columns) in linear_shapes(source.config, layer).items()
    }


def _round_rest(
    block: DecoderLayer, source: Weights, recipe: Recipe, layer: int, integers: Mapping[str, QuantizedTensor]
) -> None:
    """Round the linears that stay float to the type of their file: a fold may have given them values that it cannot represent."""
    prefix = f"model.layers.{layer}."
    for name in linear_shapes(source.config, layer):
        part = name.removeprefix(prefix)
        if part not in integers:
            weight = block.get_parameter(f"{part}.weight").data
            weight.copy_(weight.to(float_type(source, name, recipe.float_bits)))


def _write_layer(
    folder: Path,
    source: Weights,
    recipe: Recipe,
    layer: int,
    block: DecoderLayer,
    integers: Mapping[str, QuantizedTensor],
) -> None:
    dtype = partial(float_type, source, float_bits=recipe.float_bits)
    specs = block_specs(layer, block, integers, linear_shapes(source.config, layer), dtype)
    write_safetensors(layer_file(folder, layer), specs)


def missing_bytes(folder: Path, config: GemmaConfig, recipe: Recipe, calibration: Calibration) -> int:
    """The most bytes that a pass will add to its folder; 0 once its last layer is there."""
    if layer_file(folder, config.num_hidden_layers - 1).exists():
        return 0
    kept = sum(path.stat().st_size for path in folder.iterdir())
    return max(0, folder_bytes(config, recipe, calibration) - kept)


def folder_bytes(config: GemmaConfig, recipe: Recipe, calibration: Calibration) -> int:
    """The most bytes that a pass has in its folder: layers, a moment, and both streams, twice while the state is replaced."""
    total = 4 * 4 * calibration.windows.numel() * config.hidden_size + 4 * config.hidden_size**2 + HEADER_BYTES
    for layer in range(config.num_hidden_layers):
        total += 4 * sum(layer_norms(config).values()) + HEADER_BYTES
        for name, (rows, columns) in linear_shapes(config, layer).items():
            kind = recipe.config_for(name, columns)
            total += rows * (columns * kind.bits // 8 + 2 * kind.groups(columns)) if kind else 4 * rows * columns
    return total


def _save(path: Path, streams: _Streams) -> None:
    specs = [plain_spec("quantized", streams.quantized), plain_spec("original", streams.original)]
    for layer, (k, v) in streams.ranges.largest.items():
        specs += [plain_spec(f"k.{layer}", k), plain_spec(f"v.{layer}", v)]
    reports = json.dumps([asdict(report) for report in streams.reports])
    write_safetensors(path, specs, {"done": str(streams.done), "reports": reports})


def _load(folder: Path, last: Sequence[Path]) -> _Streams | None:
    """How far an earlier pass came; None: there was none, or one of its files is lost or damaged, and the pass begins again.

    Args:
        folder: the pass's.
        last: files that it writes once its last layer is finished, and the streams are no longer needed.
    """
    try:
        file = SafetensorsFile(folder / STATE)
        metadata, tensors = file.metadata, file.whole()
        reports = [Report(**report) for report in json.loads(metadata["reports"])]
        finished = [layer_file(folder, report.layer) for report in reports]
        for path in finished if tensors["quantized"].numel() else [*finished, *last]:
            SafetensorsFile(path)  # opens it
    except InputError:
        return None
    ranges = KVRanges(
        {report.layer: (tensors[f"k.{report.layer}"], tensors[f"v.{report.layer}"]) for report in reports}
    )
    return _Streams(int(metadata["done"]), tensors["quantized"], tensors["original"], reports, ranges)
