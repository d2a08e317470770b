"""The calibration pass over a Gemma 2 checkpoint: layer by layer, kept on disk as it goes, so that a killed pass goes on.

Two streams of activations run through the layers: one through the quantized layers, which the next layer's integers are fitted
to, and the original's, which tells how far they have come apart. What happens inside a layer is calibrate.py's.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import NORMS, TABLE, Checkpoint, linear_shapes
from gemma_edge.model.config import Gemma2Config
from gemma_edge.model.gemma2 import DecoderLayer, inverse_frequencies, rotary_angles
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.quantize.calibration.awq import EXPONENTS, SAMPLED_ROWS
from gemma_edge.quantize.calibration.block import Choice, gemma2_topology, quantize_block, second_moments
from gemma_edge.quantize.calibration.refit import refit_post_norms
from gemma_edge.quantize.checkpoint.kv_scales import KVRanges, KVScales
from gemma_edge.quantize.checkpoint.safetensors_writer import Spec, replace_safetensors
from gemma_edge.quantize.checkpoint.store import float_type, integer_specs, plain_spec
from gemma_edge.quantize.integers import QuantizedTensor, quantize
from gemma_edge.quantize.recipe import Recipe

VERSION = 4  # of what this pass computes: another one does not go on with what an older one left
STATE = "state.safetensors"
SAMPLES, SAMPLE_BYTES = 256, 64  # of each file of the model, for the key
HEADER_BYTES = 8192  # of a layer's file, and what packing rounds up
# of `estimate_s`
PASSES, REFIT_PASSES = 3, 3  # forward passes of a layer
SEARCH = 5000.0  # work of a scale search per weight, as arithmetic of a matrix product that takes as long
OVERHEAD = 1.3  # of everything else, measured


@dataclass(frozen=True)
class Calibration:
    """What a pass looks at, and how hard it tries."""

    windows: Tensor  # (N, T) int64, BOS first
    rounds: int = 0  # of scales refitted and codes found again
    refit: bool = False  # of the post-norms


@dataclass(frozen=True)
class Report:
    """One finished layer."""

    layer: int
    relative_error: float  # of the residual stream after it, as `stream_error` has it


def stream_error(x: Tensor, original: Tensor) -> float:
    """How far a residual stream is from the original's: the mean over positions of |x - original| / |original|.

    Per position, because BOS carries activations so large that they would drown the rest.

    Args:
        x, original: (..., T, hidden).
    """
    return float(((x - original).norm(dim=-1) / original.norm(dim=-1)).mean())


def layer_file(folder: Path, layer: int) -> Path:
    """Where the pass leaves a finished layer: the tensors of its shard in the quantized checkpoint."""
    return folder / f"layer-{layer:03d}.safetensors"


def key_of(source: Checkpoint, recipe: Recipe, calibration: Calibration) -> str:
    """Hash of everything that a pass depends on."""
    return hash_of(source, calibration.windows, [VERSION, recipe.to_json(), calibration.rounds, calibration.refit])


def hash_of(source: Checkpoint, windows: Tensor, parts: Sequence[object]) -> str:
    """Hash of a model's files, of the windows that are looked at, and of whatever else counts."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
    text = [torch.__version__, files, source.config.to_json(), windows.shape, *parts]
    seen = json.dumps(text, sort_keys=True, default=str).encode() + b"".join(map(_sample, source.files()))
    return hashlib.sha256(seen + windows.numpy().tobytes()).hexdigest()[:24]


def _sample(path: Path) -> bytes:
    """Pieces from all over a file: two fine-tunes of a model may have the same sizes, and, unpacked, the same times."""
    with path.open("rb") as file:
        starts = range(0, path.stat().st_size, max(1, path.stat().st_size // SAMPLES))
        return b"".join(file.read(SAMPLE_BYTES) for start in starts if file.seek(start) == start)


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets it go however the process ends.

    Raises:
        InputError: another process holds it.
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
    """Where the pass stands."""

    done: int  # layers finished
    quantized: Tensor  # (N, T, hidden) entering layer `done`, through quantized layers
    original: Tensor  # (N, T, hidden) the same through the original's
    reports: list[Report]
    ranges: KVRanges


@torch.no_grad()
def calibrate(
    source: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Report], KVScales]:
    """Quantize every layer into `folder`, going on where an earlier pass with the same inputs stopped.

    Args:
        source: float weights.
        recipe: methods and integers of every linear, and the table's, whose rounding the first layer should see.
        calibration: the windows.
        folder: belongs to this pass alone: see `key_of` and `only_here`.
        progress: called with 1 per finished layer, those of an earlier pass at once.

    Returns:
        how far each layer's output is from the original's, and the scales of an int8 KV cache.

    Raises:
        InputError: the weights or the activations are NaN or infinite.
    """
    config, topology = source.config, gemma2_topology(source.config)
    streams = _load(folder) or _embedded(source, recipe, calibration.windows)
    progress(streams.done)
    for layer in range(streams.done, config.num_hidden_layers):
        tokens = calibration.windows.shape[1]
        block, run = source.load_layer(layer), runner(source, layer, tokens)
        advance(block, streams.original, run)
        original = copy.deepcopy(block) if calibration.refit else None
        try:
            moments = second_moments(block, streams.quantized, run, topology)
            choices = _choices(source, recipe, layer)
            found = quantize_block(block, moments, topology, choices, rounds=calibration.rounds)
        except InputError as failed:
            raise InputError(f"layer {layer}: {failed}") from None
        _round_rest(block, source, recipe, layer, found)
        if original is not None:
            refit_post_norms(block, original, streams.quantized, run, config.rms_norm_eps)
        advance(block, streams.quantized, runner(source, layer, tokens, streams.ranges))
        streams.reports.append(Report(layer, stream_error(streams.quantized, streams.original)))
        streams.done = layer + 1
        if streams.done == config.num_hidden_layers:  # nobody goes on from here: hundreds of MB less are kept
            streams.quantized = streams.original = torch.empty(0)
        _write_layer(folder, source, recipe, layer, block, found)
        _save(folder / STATE, streams)
        progress(1)
    return streams.reports, streams.ranges.scales()


def runner(
    source: Checkpoint, layer: int, tokens: int, ranges: KVRanges | None = None
) -> Callable[[nn.Module, Tensor], Tensor]:
    """How a layer is applied to one window (1, T, hidden) from position 0 on; `ranges` sees the keys and values."""
    rope = rotary_angles(inverse_frequencies(source.config), torch.zeros(1, dtype=torch.int64), tokens)
    start = torch.zeros(1, dtype=torch.int64)

    def run(block: nn.Module, x: Tensor) -> Tensor:
        cache = RingCache(source.config, context=tokens, chunk=tokens, layers=[layer])
        out: Tensor = block(x, cache, rope, start)
        if ranges is not None:
            k, v = (cache.get_buffer(f"{kind}_{layer}")[:, :, :tokens] for kind in "kv")  # (1, K, T, D)
            ranges.add(layer, k, v)
        return out

    return run


def token_rows(source: Checkpoint, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The table's rows of the tokens that occur, (seen, hidden), and which of them each token of (N, T) has, (N * T,)."""
    seen, place = torch.unique(windows.flatten(), return_inverse=True)
    return torch.cat([source.rows(TABLE, int(token), int(token) + 1) for token in seen]), place


def _embedded(source: Checkpoint, recipe: Recipe, windows: Tensor) -> _Streams:
    """Rows of the table for every token, as the original has them and as its integers will give them."""
    rows, place = token_rows(source, windows)
    rule = recipe.rule_for(TABLE)
    config = recipe.config_for(TABLE, rows.shape[1])
    rounded = rows if config is None else quantize(rows, config, rule.method).dequantize()
    scale = source.config.hidden_size**0.5
    shape = (*windows.shape, -1)
    return _Streams(0, (rounded[place] * scale).view(shape), (rows[place] * scale).view(shape), [], KVRanges())


def _choices(source: Checkpoint, recipe: Recipe, layer: int) -> dict[str, Choice]:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): Choice(recipe.config_for(name, columns), recipe.rule_for(name).method)
        for name, (_, columns) in linear_shapes(source.config, layer).items()
    }


def advance(block: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Apply a block to every window of (N, T, hidden), in place."""
    for i in range(len(x)):
        x[i] = run(block, x[i : i + 1])[0]


def _round_rest(
    block: DecoderLayer, source: Checkpoint, recipe: Recipe, layer: int, found: Mapping[str, QuantizedTensor]
) -> None:
    """Linears that stay float, as their file will have them: a fold may have given them values that their type does not have."""
    prefix = f"model.layers.{layer}."
    for name in linear_shapes(source.config, layer):
        part = name.removeprefix(prefix)
        if part not in found:
            weight = block.get_parameter(f"{part}.weight").data
            weight.copy_(weight.to(float_type(source, name, recipe.float_bits)))


def _write_layer(
    folder: Path,
    source: Checkpoint,
    recipe: Recipe,
    layer: int,
    block: DecoderLayer,
    found: dict[str, QuantizedTensor],
) -> None:
    prefix = f"model.layers.{layer}."
    specs: list[Spec] = []
    for name, (rows, columns) in linear_shapes(source.config, layer).items():
        part = name.removeprefix(prefix)
        if part in found:
            tensor = found[part]
            specs += integer_specs(name, (rows, columns), tensor.config, lambda tensor=tensor: iter([tensor]))  # type: ignore[misc]
        else:
            dtype = float_type(source, name, recipe.float_bits)
            specs.append(plain_spec(f"{name}.weight", block.get_parameter(f"{part}.weight").data.to(dtype)))
    specs += [plain_spec(f"{prefix}{norm}.weight", block.get_parameter(f"{norm}.weight").data) for norm in NORMS]
    replace_safetensors(layer_file(folder, layer), specs)


def missing_bytes(folder: Path, config: Gemma2Config, recipe: Recipe, calibration: Calibration) -> int:
    """What a pass will add to its folder at most; nothing, once its last layer is there."""
    if layer_file(folder, config.num_hidden_layers - 1).exists():
        return 0
    kept = sum(path.stat().st_size for path in folder.iterdir())
    return max(0, folder_bytes(config, recipe, calibration) - kept)


def folder_bytes(config: Gemma2Config, recipe: Recipe, calibration: Calibration) -> int:
    """What a pass has in its folder at most: the layers, and both streams, twice while the state is replaced."""
    total = 4 * 4 * calibration.windows.numel() * config.hidden_size
    for layer in range(config.num_hidden_layers):
        total += 4 * len(NORMS) * config.hidden_size + HEADER_BYTES
        for name, (rows, columns) in linear_shapes(config, layer).items():
            kind = recipe.config_for(name, columns)
            groups = columns // kind.group_size if kind and kind.group_size else 1
            total += rows * (columns * kind.bits // 8 + 2 * groups) if kind else 4 * rows * columns
    return total


def estimate_s(config: Gemma2Config, recipe: Recipe, calibration: Calibration) -> float:
    """Roughly how long a whole pass will take on this machine: its work, at the speed of a matrix product that is tried now."""
    shapes = {name.split(".", 3)[3]: shape for name, shape in linear_shapes(config, 0).items()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    tokens, rounds = calibration.windows.numel(), calibration.rounds
    inputs = [shapes[site[0]][1] for site in gemma2_topology(config).sites]
    flops = 2.0 * tokens * ((PASSES + REFIT_PASSES * calibration.refit) * weights + sum(n * n for n in inputs))
    flops += sum(n**3 / 3 for n in inputs) + SEARCH * weights
    flops += (1 + 4 * rounds) * sum(2.0 * rows * columns**2 for rows, columns in shapes.values())
    if recipe.folds:
        flops += len(EXPONENTS) * sum(n**3 / 3 + 4 * SAMPLED_ROWS * n**2 for n in inputs)
    x = torch.ones(1024, 2048)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        x @ x.T
        fastest = min(fastest, time.perf_counter() - start)
    return OVERHEAD * config.num_hidden_layers * flops * fastest / (2.0 * 1024 * 1024 * 2048)


def _save(path: Path, streams: _Streams) -> None:
    specs = [plain_spec("quantized", streams.quantized), plain_spec("original", streams.original)]
    for layer, (k, v) in streams.ranges.largest.items():
        specs += [plain_spec(f"k.{layer}", k), plain_spec(f"v.{layer}", v)]
    reports = json.dumps([asdict(report) for report in streams.reports])
    replace_safetensors(path, specs, {"done": str(streams.done), "reports": reports})


def _load(folder: Path) -> _Streams | None:
    """Where an earlier pass stopped; None: there was none, or a file of it is lost or damaged, and it must begin again."""
    try:
        file = SafetensorsFile(folder / STATE)
        metadata, tensors = file.metadata, file.whole()
        reports = [Report(**report) for report in json.loads(metadata["reports"])]
        for report in reports:
            SafetensorsFile(layer_file(folder, report.layer))  # opens it
    except InputError:
        return None
    ranges = KVRanges(
        {report.layer: (tensors[f"k.{report.layer}"], tensors[f"v.{report.layer}"]) for report in reports}
    )
    return _Streams(int(metadata["done"]), tensors["quantized"], tensors["original"], reports, ranges)
