"""What an export will weigh, before any work: file and cache bytes, RAM on the device and during the export.

The weights file and the cache are exact. RAM is an estimate whose terms were measured (docs/benchmarks.md); it picks the context
that fits a target and refuses what cannot.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma_edge.bundle.accelerators import CPU
from gemma_edge.bundle.backends import KV_DTYPES, registered
from gemma_edge.bundle.geometry import CacheGeometry, LayerCache, slots_needed
from gemma_edge.bundle.ranges import MAX_PINNED
from gemma_edge.errors import InputError
from gemma_edge.export.backend import Backend, StoredWeights, exporter
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.targets import DEFAULT_CHUNK, GIB, Target
from gemma_edge.model.checkpoint import SLICE_BYTES, TABLE, Weights, linear_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.kv_cache import windows
from gemma_edge.quantize.checkpoint.store import final_configs
from gemma_edge.quantize.recipe import Recipe

MIB = 1 << 20
SMALLEST_CONTEXT = 256  # a context that was not requested is not halved below it
CONTEXT_STEP = 64  # the context that a refusal names is a multiple of it
PINNED_SHARE = 4  # without `pinned`, at most the context divided by it is kept
MAX_CHUNK = 4096  # tokens in one prefill call


@dataclass(frozen=True)
class Requested:
    """What a plan must keep to."""

    context: int | None = None  # tokens; None: the largest of the target's halvings that fits its RAM
    prefill_chunk: int | None = None  # tokens; None: DEFAULT_CHUNK
    pinned: int | None = None  # that a text's beginning may keep beyond the context; None: the target's, or less
    kv_dtype: str = "float32"  # element type of the KV cache, a value of KV_DTYPES
    accelerator: str = CPU  # one of the backend's `runs_on`
    verify: str = "quick"  # level of the gate, one of LEVELS: its logits take disk
    calibration_tokens: int = 0  # length of the text that integers are fitted to; 0: none


@dataclass(frozen=True)
class Plan:
    """Predictions for one export to one backend."""

    target: str
    backend: str
    recipe: str
    context: int  # tokens
    prefill_chunk: int  # tokens
    kv_dtype: str  # element type of the KV cache, a value of KV_DTYPES
    weights_bytes: int  # weights file, exact; a backend's other files take under 5 MB
    token_bytes: int  # of the weights file that a decoded token reads: all of it but a table that is only looked up in
    kv_bytes: int  # KV cache, exact
    device_ram_bytes: int  # resident while generating
    device_ram_limit_bytes: int  # the target's
    export_ram_bytes: int  # peak of the export, without the gate
    export_disk_bytes: int  # bundle, quantized checkpoint and the gate's logits
    accelerator: str = CPU  # what will compute it
    pinned: int = 0  # tokens that a text's beginning may keep beyond the context

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def geometry(
    config: GemmaConfig,
    context: int,
    prefill_chunk: int,
    dtype: str = "float32",
    *,
    pinned: int = 0,
    backend: str = "onnx",
    accelerator: str = CPU,
) -> CacheGeometry:
    """The cache of a context, as a backend allocates it: local layers keep their window, global layers the context.

    Args:
        config: the model's.
        context, prefill_chunk: in tokens.
        dtype: a value of KV_DTYPES.
        pinned: tokens that a text's beginning may keep in the global layers.
        backend, accelerator: the name of a registered backend, and one of those that it `runs_on`.
    """
    half = exporter(backend, accelerator)
    behind, multiple = half.slots_behind(prefill_chunk), half.slot_multiple

    def layer_cache(window: int, pinned: int) -> LayerCache:
        slots = slots_needed(window, prefill_chunk, pinned) + behind
        return LayerCache(window, -(-slots // multiple) * multiple, pinned)

    return CacheGeometry(
        context=context,
        prefill_chunk=prefill_chunk,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        layers=tuple(
            layer_cache(window, 0 if config.is_local(layer) else pinned)
            for layer, window in enumerate(windows(config, context))
        ),
    )


def make_plan(
    source: Weights,
    recipe: Recipe,
    target: Target,
    backend: str,
    requested: Requested = Requested(),
) -> Plan:
    """Predict an export.

    Args:
        source, recipe: the model, and what its weights become.
        target: the class of devices.
        backend: the name of a registered backend.
        requested: what the plan must keep to.

    Raises:
        InputError: a value out of range, a weight that the backend cannot hold, or no context fits the target's RAM.
    """
    config, context = source.config, requested.context
    chunk = DEFAULT_CHUNK if requested.prefill_chunk is None else requested.prefill_chunk
    _check_range("prefill_chunk", chunk, 1, MAX_CHUNK)
    if context is not None:
        _check_range("context", context, 1, config.max_position_embeddings)
    half = exporter(backend, requested.accelerator)
    prediction = _Prediction.of(source, recipe, target, half, requested)
    if requested.pinned is not None:
        _check_range("pinned", requested.pinned, 0, MAX_PINNED)
        if requested.pinned and not half.pins:
            raise InputError(
                f"`pinned` {requested.pinned}: the {backend} backend for {requested.accelerator} keeps no beginning of a text;"
                " use `pinned` 0, or leave this backend out",
                field="pinned",
                value=requested.pinned,
            )
    tried = context or min(target.context, config.max_position_embeddings)
    while context is None and tried > SMALLEST_CONTEXT and not prediction.fits(tried, chunk):
        tried //= 2
    if not prediction.fits(tried, chunk):
        raise InputError(prediction.too_large(tried, chunk))
    plan = prediction.plan(tried, chunk)
    return replace(
        plan,
        export_ram_bytes=max(plan.export_ram_bytes, _calibration_ram(config, requested.calibration_tokens)),
        export_disk_bytes=plan.export_disk_bytes + _gate_disk(config, plan.context, requested.verify),
    )


def choose_kv_dtype(
    requested: int | None,
    target: Target,
    backend: str,
    *,
    head_dim: int,
    calibrated: bool,
    hint: str,
    accelerator: str = CPU,
) -> str:
    """The element type of the KV cache: the requested one, else the target's where it can be had, else float32.

    Args:
        requested: `kv_bits`.
        target: decides where nothing is requested.
        backend: the name of the backend that will hold the cache.
        head_dim: the model's.
        calibrated: there will be scales.
        hint: how to get scales where there are none.
        accelerator: that the backend is made for.

    Raises:
        InputError: there is no such cache, not for this model, or an int8 cache has no scales.
    """
    if requested is not None and requested not in KV_DTYPES:
        raise InputError(field="kv_bits", value=requested, allowed=KV_DTYPES)
    info = registered()[backend]
    made_for = exporter(backend, accelerator)
    int8, fits = "int8" in info.kv_dtypes and made_for.int8_kv, head_dim % info.int8_kv_multiple == 0
    if requested == 8 and not int8:
        place = "" if accelerator == CPU else f" for {accelerator}"
        raise InputError(
            f"`kv_bits` 8: the {backend} backend{place} keeps its cache in float32; use `kv_bits` 32",
            field="kv_bits",
            value=8,
        )
    if requested == 8 and not fits:
        raise InputError(
            f"`kv_bits` 8: the model's head_dim is {head_dim}, and an int8 cache of the {backend} backend needs a multiple of"
            f" {info.int8_kv_multiple}; use `kv_bits` 32",
            field="kv_bits",
            value=8,
        )
    if requested == 8 and not calibrated:
        raise InputError(
            f"`kv_bits` 8 needs calibration, which finds the cache's scales: {hint}", field="kv_bits", value=8
        )
    if requested is None:
        requested = target.kv_bits if calibrated and int8 and fits else 32
    return KV_DTYPES[requested]


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"`{field}` {value}; this model allows {low} to {high}", field=field, value=value)


RUNTIME_BASE = 73 * MIB  # interpreter, onnxruntime, numpy and msgspec, without a model
EXPORT_BASE = 750 * MIB  # interpreter, torch, onnx and the exporter
TRACE_PER_LAYER = 3 * MIB // 2  # traced graph of a layer
CALIBRATION_BASE = 480 * MIB  # interpreter and torch
MOMENT_COPIES = 5  # largest second moment, sorted, its factor, and their temporaries: copies at once
SLICE_COPIES = 12  # float32 temporaries of one slice


@dataclass(frozen=True)
class _Prediction:
    """What does not depend on the context, and the plan of each context."""

    source: Weights
    recipe: Recipe
    target: Target
    exporter: Backend
    requested: Requested
    file_bytes: int  # weights on disk
    resident_bytes: int  # weights in the engine's memory
    looked_up_bytes: int  # of the weights on disk: a table that is only looked up in
    export_ram: int  # that the backend's own exporter needs

    @classmethod
    def of(cls, source: Weights, recipe: Recipe, target: Target, half: Backend, requested: Requested) -> _Prediction:
        """Measure the weights as a backend holds them.

        Raises:
            InputError: it cannot hold one of them.
        """
        configs = final_configs(source, recipe)
        half.refuse_recipe(recipe, source)
        half.refuse_unsupported(source.config, configs, recipe.float_bits)
        weights = StoredWeights(source, configs, recipe.float_bits, requested.kv_dtype)
        return cls(
            source,
            recipe,
            target,
            half,
            requested,
            file_bytes=half.weights_bytes(weights),
            resident_bytes=half.resident_bytes(weights),
            looked_up_bytes=half.looked_up_bytes(weights),
            export_ram=half.export_ram(weights),
        )

    def cache(self, context: int, chunk: int) -> CacheGeometry:
        """Geometry of the KV cache of a context."""
        wanted = self.requested
        default = min(self.target.pinned, context // PINNED_SHARE) if self.exporter.pins else 0
        return geometry(
            self.source.config,
            context,
            chunk,
            wanted.kv_dtype,
            pinned=default if wanted.pinned is None else wanted.pinned,
            backend=self.exporter.name,
            accelerator=wanted.accelerator,
        )

    def device_ram(self, cache: CacheGeometry) -> int:
        """The engine with weights, a full cache, one chunk's widest activations and the logits."""
        config = self.source.config
        widest = 3 * config.intermediate_size + 4 * config.hidden_size
        activations = 4 * (cache.prefill_chunk * widest + 2 * config.vocab_size)
        own = self.exporter.own_ram(config, cache)
        return RUNTIME_BASE + self.resident_bytes + cache.bytes + activations + own

    def fits(self, context: int, chunk: int) -> bool:
        """Whether a context fits the target's RAM."""
        return self.device_ram(self.cache(context, chunk)) <= self.target.ram_bytes

    def plan(self, context: int, chunk: int) -> Plan:
        """The plan of a context, without calibration and gate."""
        config, cache = self.source.config, self.cache(context, chunk)
        tables = len({TABLE, config.head})
        return Plan(
            target=self.target.name,
            backend=self.exporter.name,
            recipe=self.recipe.name,
            context=context,
            prefill_chunk=chunk,
            weights_bytes=self.file_bytes,
            token_bytes=self.file_bytes - self.looked_up_bytes + self.looked_up_bytes // config.vocab_size,
            kv_dtype=cache.dtype,
            kv_bytes=cache.bytes,
            device_ram_bytes=self.device_ram(cache),
            device_ram_limit_bytes=self.target.ram_bytes,
            export_ram_bytes=_export_ram(config) + self.export_ram,
            # The checkpoint is no larger than the bundle's file, unless it also keeps table and head in float.
            export_disk_bytes=2 * self.file_bytes + 4 * tables * config.vocab_size * config.hidden_size,
            accelerator=self.requested.accelerator,
            pinned=cache.pinned,
        )

    def too_large(self, context: int, chunk: int) -> str:
        """The message for a context that does not fit."""
        need = f"needs {self.device_ram(self.cache(context, chunk)) / GIB:.2f} GiB of RAM at context {context}"
        limit = f"target {self.target.name} has {self.target.ram_bytes / GIB:.2f} GiB for the app"
        head = f"{self.source.origin.name} as {self.recipe.name} {need}; {limit}"
        smaller = range(CONTEXT_STEP, context, CONTEXT_STEP)
        # RAM only grows with the context
        fitting = bisect_right(
            smaller, self.target.ram_bytes, key=lambda each: self.device_ram(self.cache(each, chunk))
        )
        if fitting:
            return f"{head}: `context` {smaller[fitting - 1]} fits"
        return f"{head}: fewer `bits`, a smaller model, or `ram_gib` GIB if the device allows more"


def _export_ram(config: GemmaConfig) -> int:
    """Weights are streamed in slices, so that only the traced graph grows with the layers, and the scales with the table."""
    table = min(config.vocab_size * config.hidden_size * 4, SLICE_BYTES)
    return EXPORT_BASE + TRACE_PER_LAYER * config.num_hidden_layers + SLICE_COPIES * table + 64 * config.vocab_size


def _calibration_ram(config: GemmaConfig, tokens: int) -> int:
    """One layer in float32, the two streams of activations, and the largest second moment with its factor and copies."""
    if not tokens:
        return 0
    linears = linear_shapes(config, 0).values()
    layer = sum(rows * columns for rows, columns in linears)
    widest = max(columns for _, columns in linears)
    return CALIBRATION_BASE + 4 * (layer + 2 * tokens * config.hidden_size + MOMENT_COPIES * widest**2)


def _gate_disk(config: GemmaConfig, context: int, verify: str) -> int:
    """Logits that the gate saves, float32: 2 GB per 2,000 positions of 256,000."""
    level = LEVELS[verify]
    return 4 * config.vocab_size * level.saved_logits(context) if level else 0
