"""What an export will weigh, before any work: file and cache bytes, RAM on the device and during the export.

The weights file and the cache are exact. RAM is an estimate whose terms were measured (docs/benchmarks.md); it picks the context
that fits a target and refuses what cannot.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma_edge.bundle.backends import INT8_CACHES, KV_DTYPES, UNWRAPPED_CACHES
from gemma_edge.bundle.geometry import CacheGeometry, LayerCache
from gemma_edge.errors import InputError
from gemma_edge.export.executorch import packing as executorch
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.onnx.weights import resident_bytes, weights_bytes
from gemma_edge.export.targets import DEFAULT_CHUNK, GIB, Target
from gemma_edge.export.tflite.packing import LITERT, TFLITE_RUNTIME
from gemma_edge.export.tflite.seams import PREFILL, signatures
from gemma_edge.model.checkpoint import SLICE_BYTES, Weights, linear_shapes, weight_shapes
from gemma_edge.model.config import Gemma2Config
from gemma_edge.model.kv_cache import slots_needed, windows
from gemma_edge.quantize.checkpoint.store import final_configs
from gemma_edge.quantize.recipe import QuantConfig, Recipe

MIB = 1 << 20
SMALLEST_CONTEXT = 256
# how all but onnx pack weights
PACKINGS: dict[str, Any] = {"executorch": executorch, "tflite": LITERT, "tflite-runtime": TFLITE_RUNTIME}
CONTEXT_STEP = 64  # of the largest context that fits, in the message of one that does not


@dataclass(frozen=True)
class Plan:
    """Predictions for one export."""

    target: str
    backend: str
    recipe: str
    context: int
    prefill_chunk: int
    kv_dtype: str  # of the cache's elements, a value of KV_DTYPES
    weights_bytes: int  # of the weights file, exact; what a backend writes beside it takes under 5 MB
    kv_bytes: int  # exact
    device_ram_bytes: int  # resident while generating
    device_ram_limit_bytes: int
    export_ram_bytes: int  # peak of the export, without the gate
    export_disk_bytes: int  # needed while exporting: bundle, quantized checkpoint, the gate's logits

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """The weights, in bytes."""

    file: int  # on disk
    resident: int  # in the runtime's memory


def geometry(
    config: Gemma2Config, context: int, prefill_chunk: int, dtype: str = "float32", *, backend: str = "onnx"
) -> CacheGeometry:
    """The cache of a context, as a backend allocates it: local layers keep their window, global layers the context.

    Args:
        dtype: a value of KV_DTYPES.
    """
    behind = prefill_chunk - 1 if backend in UNWRAPPED_CACHES else 0
    return CacheGeometry(
        context=context,
        prefill_chunk=prefill_chunk,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        layers=tuple(
            LayerCache(window, slots_needed(window, prefill_chunk) + behind) for window in windows(config, context)
        ),
    )


def make_plan(
    source: Weights,
    recipe: Recipe,
    target: Target,
    backend: str,
    *,
    context: int | None = None,
    prefill_chunk: int | None = None,
    kv_dtype: str = "float32",
    verify: str = "quick",
    calibration_tokens: int = 0,
) -> Plan:
    """Predict an export; without a context, take the largest of the target's halvings that fits its RAM.

    Args:
        verify: one of LEVELS: what the gate writes takes disk too.
        calibration_tokens: of the text that integers are fitted to; 0: none.

    Raises:
        InputError: a value out of range, or no context fits the target's RAM.
    """
    config = source.config
    chunk = DEFAULT_CHUNK if prefill_chunk is None else prefill_chunk
    _check_range("--prefill-chunk", chunk, 1, 4096)
    if context is not None:
        _check_range("--context", context, 1, config.max_position_embeddings)
    configs = final_configs(source, recipe)
    sizes = _sizes(source, configs, recipe, backend, int8_kv=kv_dtype == "int8")
    tried = context or min(target.context, config.max_position_embeddings)
    plan = _predict(source, recipe, target, backend, sizes, geometry(config, tried, chunk, kv_dtype, backend=backend))
    while plan.device_ram_bytes > target.ram_bytes and context is None and tried > SMALLEST_CONTEXT:
        tried //= 2
        plan = _predict(
            source, recipe, target, backend, sizes, geometry(config, tried, chunk, kv_dtype, backend=backend)
        )
    if plan.device_ram_bytes > target.ram_bytes:
        raise InputError(_too_large(plan, source, sizes, target))
    return replace(
        plan,
        export_ram_bytes=max(plan.export_ram_bytes, _calibration_ram(config, calibration_tokens)),
        export_disk_bytes=plan.export_disk_bytes + _gate_disk(config, plan.context, verify),
    )


def _sizes(
    source: Weights,
    configs: dict[str, QuantConfig | None],
    recipe: Recipe,
    backend: str,
    *,
    int8_kv: bool,
) -> Sizes:
    """The weights as a backend holds them.

    Raises:
        InputError: it cannot hold one of them.
    """
    if backend in PACKINGS:
        packing = PACKINGS[backend]
        packing.refuse_unsupported(source.config, configs, recipe.float_bits)
        size = packing.weights_bytes(source.config, configs)
        return Sizes(size, size)  # in memory as they are, or as XNNPACK packs them, which takes as much
    return Sizes(
        weights_bytes(source, configs, recipe.float_bits, int8_kv=int8_kv),
        resident_bytes(source, configs, recipe.float_bits, int8_kv=int8_kv),
    )


def choose_kv_dtype(asked: int | None, target: Target, backend: str, *, calibrated: bool, way_out: str) -> str:
    """The KV cache's elements: what was asked for; else the target's where scales are calibrated; else float32.

    Args:
        asked: `--kv-bits`.
        target: decides where nothing is asked for.
        backend: what will hold the cache.
        calibrated: there will be scales.
        way_out: how to come by scales where there are none.

    Raises:
        InputError: no such cache, or int8 without scales.
    """
    if asked is not None and asked not in KV_DTYPES:
        raise InputError(f"--kv-bits {asked}; supported: {', '.join(map(str, KV_DTYPES))}")
    if asked == 8 and backend not in INT8_CACHES:
        raise InputError(f"--kv-bits 8: the {backend} backend keeps its cache in float32; use --kv-bits 32")
    if asked == 8 and not calibrated:
        raise InputError(f"--kv-bits 8 needs calibration, which finds the cache's scales: {way_out}")
    if asked is None:
        asked = target.kv_bits if calibrated and backend in INT8_CACHES else 32
    return KV_DTYPES[asked]


def disk_bytes(plans: Iterable[Plan]) -> int:
    """Needed while exporting for several backends at once: each one's weights, and the rest only once."""
    found = list(plans)
    return max(plan.export_disk_bytes - plan.weights_bytes for plan in found) + sum(p.weights_bytes for p in found)


def _check_range(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"{flag} {value}; this model allows {low} to {high}")


def _predict(
    source: Weights,
    recipe: Recipe,
    target: Target,
    backend: str,
    sizes: Sizes,
    cache: CacheGeometry,
) -> Plan:
    config = source.config
    return Plan(
        target=target.name,
        backend=backend,
        recipe=recipe.name,
        context=cache.context,
        prefill_chunk=cache.prefill_chunk,
        weights_bytes=sizes.file,
        kv_dtype=cache.dtype,
        kv_bytes=cache.bytes,
        device_ram_bytes=_device_ram(config, sizes, cache, backend),
        device_ram_limit_bytes=target.ram_bytes,
        export_ram_bytes=_export_ram(config),
        # the checkpoint is no larger than the bundle's file, but for a table that stays there in float beside its integers
        export_disk_bytes=2 * sizes.file + 4 * config.vocab_size * config.hidden_size,
    )


RUNTIME_BASE = 68 * MIB  # interpreter, onnxruntime and numpy, without a model
GRAPH_PER_ROW = (
    20  # bytes of each signature of a .tflite, for every row of a weight: scales and zero points, more than once
)
EXPORT_BASE = 750 * MIB  # interpreter, torch, onnx and the exporter
TRACE_PER_LAYER = 3 * MIB // 2
CALIBRATION_BASE = 480 * MIB  # interpreter and torch
MOMENT_COPIES = 5  # of the widest second moment at once: itself, sorted, its factor, and what they leave
SLICE_COPIES = 12  # float32 temporaries of one slice


def _device_ram(config: Gemma2Config, sizes: Sizes, cache: CacheGeometry, backend: str) -> int:
    """The runtime with weights, a full cache, one chunk's widest activations and the logits."""
    widest = 3 * config.intermediate_size + 4 * config.hidden_size
    activations = 4 * (cache.prefill_chunk * widest + 2 * config.vocab_size)
    own = _signatures_ram(config, cache) if backend in UNWRAPPED_CACHES else 0
    return RUNTIME_BASE + sizes.resident + cache.bytes + activations + own


def _signatures_ram(config: Gemma2Config, cache: CacheGeometry) -> int:
    """What a .tflite's signatures have each for itself: their graphs, and what goes from layer to layer around the caches."""
    passed = config.hidden_size + (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    found = signatures(cache)
    tokens = sum(each.tokens for each in found if each.role == PREFILL)
    rows = sum(rows for rows, _ in weight_shapes(config).values())
    return len(found) * GRAPH_PER_ROW * rows + 4 * tokens * passed * config.num_hidden_layers


def _export_ram(config: Gemma2Config) -> int:
    """Weights are streamed in slices, so that only the traced graph grows with the layers, and the scales with the table."""
    table = min(config.vocab_size * config.hidden_size * 4, SLICE_BYTES)
    return EXPORT_BASE + TRACE_PER_LAYER * config.num_hidden_layers + SLICE_COPIES * table + 64 * config.vocab_size


def _calibration_ram(config: Gemma2Config, tokens: int) -> int:
    """One layer in float32, the two streams of activations, and the largest second moment with its factor and copies."""
    if not tokens:
        return 0
    linears = linear_shapes(config, 0).values()
    layer = sum(rows * columns for rows, columns in linears)
    widest = max(columns for _, columns in linears)
    return CALIBRATION_BASE + 4 * (layer + 2 * tokens * config.hidden_size + MOMENT_COPIES * widest**2)


def _gate_disk(config: Gemma2Config, context: int, verify: str) -> int:
    """Logits that the gate saves, float32: 2 GB per 2,000 positions of 256,000."""
    level = LEVELS[verify]
    return 4 * config.vocab_size * level.saved_logits(context) if level else 0


def _too_large(plan: Plan, source: Weights, sizes: Sizes, target: Target) -> str:
    need = f"needs {plan.device_ram_bytes / GIB:.2f} GiB of RAM at context {plan.context}"
    limit = f"target {target.name} has {target.ram_bytes / GIB:.2f} GiB for the app"
    head = f"{source.folder.name} as {plan.recipe} {need}; {limit}"
    smaller = range(CONTEXT_STEP, plan.context, CONTEXT_STEP)

    def ram(context: int) -> int:
        cache = geometry(source.config, context, plan.prefill_chunk, plan.kv_dtype, backend=plan.backend)
        return _device_ram(source.config, sizes, cache, plan.backend)

    fitting = bisect_right(smaller, target.ram_bytes, key=ram)  # RAM only grows with the context
    if fitting:
        return f"{head}: --context {smaller[fitting - 1]} fits"
    return f"{head}: fewer --bits, a smaller model, or --ram GIB if the device allows more"
