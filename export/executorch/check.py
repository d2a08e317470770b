"""Reads a finished `.pte` back and compares it with what it should hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from executorch.exir.schema import DelegateCall, ExecutionPlan
from executorch.exir.schema import Tensor as PlannedTensor

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.executorch.delegates import Kernel, kernel_of, linears
from gemma_edge.export.executorch.packing import SCALE, Constant, constants, pieces_of
from gemma_edge.export.executorch.pte import GATHERS, Pte, calls
from gemma_edge.export.executorch.templates import BACKEND as XNNPACK
from gemma_edge.model.checkpoint import weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.recipe import QuantConfig

WRITE = "llama::update_cache_with_indices"
# SMALL: what may stay outside the delegates: positions, rotary angles, masks, and views of the caches
SMALL = {
    "aten::_local_scalar_dense",
    "aten::_to_copy",
    "aten::add",
    "aten::arange",
    "aten::bitwise_and",
    "aten::bitwise_or",  # of what is pinned
    "aten::cat",
    "aten::clamp",
    "aten::clone",
    "aten::cos",
    "aten::div",
    "aten::expand_copy",
    "aten::ge",
    "aten::lt",
    "aten::mul",
    "aten::remainder",
    "aten::scalar_tensor",
    "aten::select_copy",
    "aten::sin",
    "aten::slice_copy",
    "aten::sub",
    "aten::sym_size",
    "aten::unsqueeze_copy",
    "aten::where",
    "executorch_prim::et_view",
    "executorch_prim::mul",
}


def check_pte(
    path: Path,
    config: GemmaConfig,
    configs: Mapping[str, QuantConfig | None],
    geometry: CacheGeometry,
    methods: Sequence[str],
) -> None:
    """Compare a finished file with the model.

    Args:
        path: the file.
        config, configs, geometry: the model, its integers, and its caches.
        methods: names of the methods that it should have.

    Raises:
        RuntimeError: names what is not as it should be.
    """
    pte = Pte.open(path)
    plans = {plan.name: plan for plan in pte.program.execution_plan}
    for name in methods:
        if name not in plans:
            raise RuntimeError(f"{path.name} has no method {name}")
        _check_operators(path, plans[name])
        _check_delegates(path, plans[name], config, XNNPACK)
        _check_kernels(path, pte, plans[name], config, configs)
        _check_caches(path, plans[name], geometry)
    _check_constants(path, pte, config, configs)


def check_ahead(
    path: Path, config: GemmaConfig, geometry: CacheGeometry, methods: Sequence[str], delegate: str
) -> None:
    """Compare a file that was lowered ahead of time with the model, as far as it can be read: see ahead.py.

    Args:
        path, config, geometry, methods: as in `check_pte`.
        delegate: id of the delegates that compute everything else than what is SMALL.

    Raises:
        RuntimeError: names what is not as it should be.
    """
    plans = {plan.name: plan for plan in Pte.open(path).program.execution_plan}
    for name in methods:
        _check_operators(path, plans[name])
        _check_delegates(path, plans[name], config, delegate)
        _check_caches(path, plans[name], geometry)


def _check_operators(path: Path, plan: ExecutionPlan) -> None:
    names = [plan.operators[call.op_index].name for call in calls(plan)]
    unknown = set(names) - SMALL - {WRITE, *GATHERS}
    if unknown:
        raise RuntimeError(f"{path.name}: {sorted(unknown)[0]} is computed outside the delegates")
    if sum(name in GATHERS for name in names) != 1:
        raise RuntimeError(f"{path.name}: the table is gathered {sum(name in GATHERS for name in names)} times")


def _check_delegates(path: Path, plan: ExecutionPlan, config: GemmaConfig, delegate: str) -> None:
    expected = 2 * config.num_hidden_layers + pieces_of(config.head, (config.vocab_size, config.hidden_size))
    backends = {each.id for each in plan.delegates}
    called = sum(isinstance(step.instr_args, DelegateCall) for chain in plan.chains for step in chain.instructions)
    if len(plan.delegates) != expected or called != expected or backends != {delegate}:
        raise RuntimeError(
            f"{path.name}: {plan.name} has {len(plan.delegates)} delegates of {sorted(backends)}, called {called} times;"
            f" expected {expected} of {delegate}"
        )


def _check_kernels(
    path: Path, pte: Pte, plan: ExecutionPlan, config: GemmaConfig, configs: Mapping[str, QuantConfig | None]
) -> None:
    """Every weight is multiplied once, with its own scales, by the kernel of its kind. All other linears are float: they are
    the means of squares, whose constants lie in the delegate.
    """
    shapes = weight_shapes(config)
    expected = {}
    for constant, _ in constants(config, configs):
        if constant.part != SCALE:
            weight, quant = constant.weight, configs[constant.weight]
            scale = Constant(weight, SCALE, constant.piece).key if quant else ""
            expected[constant.key] = (scale, kernel_of(quant, shapes[weight][1]))
    blobs = [pte.segment(delegate.processed.index) for delegate in plan.delegates]
    for linear in linears(blobs):
        actual = (linear.scale_key, linear.kernel)
        if linear.key in expected:
            if expected.pop(linear.key) != actual:
                raise RuntimeError(f"{path.name}: a linear of {plan.name} is computed by {linear.kernel}")
        elif linear.kernel != Kernel("fp32", "fp32"):
            raise RuntimeError(f"{path.name}: {plan.name} has a linear {linear.kernel} of no weight")
    if expected:
        raise RuntimeError(f"{path.name}: {len(expected)} weights are not multiplied in {plan.name}")


def _check_caches(path: Path, plan: ExecutionPlan, geometry: CacheGeometry) -> None:
    """Every cache has its layer's slots and memory of its own. It is written in place: a copy would have to be copied back by an
    operator that is not in SMALL.
    """
    shapes, spans = [], []
    for call in calls(plan):
        if plan.operators[call.op_index].name != WRITE:
            continue
        _, cache, *_ = call.args
        tensor = plan.values[cache].val
        assert isinstance(tensor, PlannedTensor) and tensor.allocation_info is not None
        shapes.append(tuple(tensor.sizes))
        place = tensor.allocation_info
        start = (place.memory_offset_high << 32) + place.memory_offset_low
        size = 4 * tensor.sizes[0] * tensor.sizes[1] * tensor.sizes[3]
        spans.append((place.memory_id, start, start + size))
    expected = [
        (geometry.kv_heads, layer.slots, 1, geometry.head_dim) for layer in geometry.layers for _ in ("key", "value")
    ]
    if shapes != expected:
        raise RuntimeError(f"{path.name}: caches of {plan.name} are {shapes[:2]}..., expected {expected[:2]}...")
    spans.sort()
    for (memory, _, end), (following, start, _) in zip(spans, spans[1:], strict=False):
        if memory == following and start < end:
            raise RuntimeError(f"{path.name}: two caches of {plan.name} share memory")


def _check_constants(path: Path, pte: Pte, config: GemmaConfig, configs: Mapping[str, QuantConfig | None]) -> None:
    """Every weight's constants are there in the size of its integers, and nothing else is as large as a weight."""
    sizes = {entry.key: pte.program.segments[entry.segment_index].size for entry in pte.program.named_data or []}
    for constant, expected in constants(config, configs):
        if sizes.pop(constant.key, None) != expected:
            raise RuntimeError(f"{path.name}: {constant.part} of {constant.weight} is not there with {expected} bytes")
    largest = max(sizes.values(), default=0)
    if largest > 4 * config.hidden_size:
        raise RuntimeError(f"{path.name}: a constant of {largest} bytes belongs to no weight")
