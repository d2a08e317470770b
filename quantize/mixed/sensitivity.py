"""What rounding each weight costs the model's output, for all integers it could have: in nats per token, so that they add up.

There is one pass forward and one pass back through the float model, block by block; the blocks' inputs lie on disk meanwhile. The
pass back carries a random probe z of the logits with E[z z^T] = diag(p) - p p^T, the Hessian of KL(p || .). Let g be the gradient
that reaches a row's output at every position of a window, and e the errors there. Rounding the row then costs the window a KL of
about (g . e)^2 / 2: the errors of different positions add up or cancel. The errors of different rows are independent, so the
weight's KL is the sum over its rows; a sample of the rows estimates it, and averages over the probe. Weights are rounded by the
method that an export will use, because simpler methods rank them worse (docs/mixed-precision.md). What is done with the errors is
budget.py's.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.files import write_whole
from gemma_edge.model.checkpoint import FINAL_NORM, TABLE, Weights, row_slices, weight_shapes
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.model.soft_cap import soft_cap
from gemma_edge.quantize.calibration.block import WITH_INPUTS, gemma_topology, second_moments
from gemma_edge.quantize.calibration.gptq import Inputs
from gemma_edge.quantize.calibration.layerwise import hash_of, token_rows
from gemma_edge.quantize.calibration.windows import advance, runner
from gemma_edge.quantize.checkpoint.safetensors_writer import plain_spec, write_safetensors
from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.recipe import DATA_FREE, INT8_ROW, QuantConfig
from gemma_edge.reading import read_json

VERSION = 4  # version of what is measured
CANDIDATES = (QuantConfig(4, 0), QuantConfig(4, 128), QuantConfig(4, 64), QuantConfig(4, 32), QuantConfig(8, 0))
TABLE_METHODS = {QuantConfig(4, 32): "mse", INT8_ROW: "rtn"}  # candidates of the tied table, and their methods
SAMPLED_ROWS = 256  # rows of a linear whose errors are measured
JUDGED = 4  # one window in four, from the end, measures the errors; the rounding is fitted to the others

Errors = dict[str, dict[QuantConfig, float]]  # by weight
Methods = Callable[[QuantConfig], str]


def candidates(weight: str, columns: int) -> tuple[QuantConfig, ...]:
    """The integers that a matrix with rows of `columns` can become, the smallest first."""
    options = tuple(TABLE_METHODS) if weight == TABLE else CANDIDATES
    return tuple(dict.fromkeys(config.fit(columns) for config in options))


def steps(layers: int) -> int:
    """How often `measure` reports progress: once per layer and pass, and once for the head."""
    return 2 * layers + 1


@torch.no_grad()
def measure(
    source: Weights,
    windows: Tensor,
    methods: Methods,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> Errors:
    """The error of every candidate of every matrix.

    Args:
        source: float weights.
        windows: (N, T) int64, BOS first; see JUDGED.
        methods: gives the method by which the integers of each of CANDIDATES are found.
        folder: for the layers' inputs, 4 bytes per layer, token and channel; they are removed at the end.
        progress: called with 1 per step.

    Raises:
        InputError: the weights or the activations are NaN or infinite.
    """
    layers = source.config.num_hidden_layers
    rows, place = token_rows(source, windows)
    scale = source.config.hidden_size**0.5
    judged = max(1, len(windows) // JUDGED)
    x = (rows[place] * scale).view(*windows.shape, -1)  # (N, T, hidden)
    for layer in range(layers):
        _keep(folder, layer, x)
        advance(source.load_layer(layer), x, runner(source, layer, windows.shape[1]))
        progress(1)
    gradient, head = _head(source, x[-judged:])
    progress(1)
    errors: Errors = {}
    for layer in reversed(range(layers)):
        errors |= _layer(source, layer, _kept(folder, layer), gradient, methods)
        progress(1)
    errors[TABLE] = {}
    for config, kl in head.items():  # as the head, and as the embedding
        change = (quantize(rows, config, TABLE_METHODS[config]).dequantize() - rows)[place] * scale
        seen = change.view(*windows.shape, -1)[-judged:]  # (J, T, hidden)
        errors[TABLE][config] = kl + float((seen * gradient).sum(-1).square().mean()) / 2
    if not all(math.isfinite(error) for some in errors.values() for error in some.values()):
        raise InputError(f"{source.origin}: activations are NaN or infinite on the calibration text")
    return {weight: errors[weight] for weight in weight_shapes(source.config)}


def _keep(folder: Path, layer: int, x: Tensor) -> None:
    write_safetensors(folder / f"input-{layer:03d}.safetensors", [plain_spec("x", x)])


def _kept(folder: Path, layer: int) -> Tensor:
    """What `_keep` wrote. The file is removed."""
    path = folder / f"input-{layer:03d}.safetensors"
    x = SafetensorsFile(path).rows("x")
    path.unlink()
    return x


def _kl(inputs: Tensor, change: Tensor, gradient: Tensor) -> float:
    """KL per position, nats, of a change of rows (rows, in) at inputs (J, T, in), given the outputs' gradient (J, T, rows)."""
    along = (inputs @ change.T * gradient).sum(1)  # (J, rows)
    return float(along.square().sum()) / (2 * inputs.shape[0] * inputs.shape[1])


def _layer(source: Weights, layer: int, x: Tensor, gradient: Tensor, methods: Methods) -> Errors:
    """Errors of a layer's linears.

    Args:
        x: (N, T, hidden), its input.
        gradient: (J, T, hidden) at its output for the last J windows; it is replaced by the gradient at the layer's input.
    """
    block, run, topology = source.load_layer(layer), runner(source, layer, x.shape[1]), gemma_topology(source.config)
    moments = second_moments(block, x[: max(1, len(x) - len(gradient))], run, topology)
    inputs: dict[str, list[Tensor]] = defaultdict(list)  # (T, in), of each window
    gradients: dict[str, list[Tensor]] = defaultdict(list)  # (T, rows), of the sampled rows

    def observe(name: str, seen: Tensor, out: Tensor) -> None:
        if any(name == site[0] for site in topology.sites):
            inputs[name].append(seen.detach()[0])
        out.register_hook(lambda arriving: gradients[name].append(_sample(arriving[0].T).T.clone()))  # type: ignore[no-untyped-call]

    for name in (name for site in topology.sites for name in site):
        block.get_submodule(name).register_forward_hook(
            lambda _module, args, out, name=name: observe(name, args[0], out)
        )
    judged = x[-len(gradient) :]
    for i in range(len(judged)):
        with torch.enable_grad():
            window = judged[i : i + 1].clone().requires_grad_()
            (gradient[i : i + 1],) = torch.autograd.grad(run(block, window), window, gradient[i : i + 1])
    errors: Errors = {}
    for site in topology.sites:
        seen, fitted = torch.stack(inputs.pop(site[0])), Inputs.from_hessian(moments.pop(site[0]))  # seen: (J, T, in)
        for name in site:
            weight = block.get_parameter(f"{name}.weight").data
            rows, arriving = _sample(weight), torch.stack(gradients.pop(name))
            share = len(weight) / len(rows)
            errors[f"model.layers.{layer}.{name}"] = {
                config: share * _kl(seen, _rounded(rows, fitted, config, methods(config)) - rows, arriving)
                for config in candidates(name, weight.shape[1])
            }
    return errors


def _sample(rows: Tensor) -> Tensor:
    """At least SAMPLED_ROWS rows of (rows, ...), evenly spread, or all of them."""
    return rows[:: max(1, len(rows) // SAMPLED_ROWS)]


def _rounded(rows: Tensor, inputs: Inputs, config: QuantConfig, method: str) -> Tensor:
    """Some rows rounded and dequantized, without folds and without rounds of refinement."""
    if method in DATA_FREE:
        return quantize(rows, config, method).dequantize()
    return WITH_INPUTS[method](rows, inputs, config, 0).dequantize()


def _signs(seed: int, like: Tensor) -> Tensor:
    """-1 or 1 for each element, the same in both passes."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, like.shape, generator=draw).to(like.dtype) * 2 - 1


def _head(source: Weights, x: Tensor) -> tuple[Tensor, dict[QuantConfig, float]]:
    """The probe's gradient at the last block's output `x` (J, T, hidden), and the KL of each of the table's candidates as head.

    With p the distribution of a position and signs s, z = sqrt(p) s - p (sqrt(p) . s). Two passes over slices of the table:
    one for sums over the vocabulary, one for what needs them.
    """
    config = source.config
    hidden = x.flatten(0, 1)  # (P, hidden)
    with torch.enable_grad():
        hidden.requires_grad_()
        weight = 1.0 + source.vector(FINAL_NORM)
        normed = torch.nn.functional.rms_norm(hidden, (config.hidden_size,), weight, config.rms_norm_eps)
    states = normed.detach()
    top, total, root = torch.full((len(states),), -torch.inf), torch.zeros(len(states)), torch.zeros(len(states))
    for start, stop in row_slices(weight_shapes(config)[TABLE]):
        logits = soft_cap(states @ source.rows(TABLE, start, stop).T, config.final_logit_softcapping)  # (P, slice)
        higher = torch.maximum(top, logits.max(-1).values)
        shifted, shrink = logits - higher[:, None], top - higher
        total = total * shrink.exp() + shifted.exp().sum(-1)
        root = root * (shrink / 2).exp() + ((shifted / 2).exp() * _signs(start, logits)).sum(-1)
        top = higher
    whole = top + total.log()  # log-sum-exp
    root /= total.sqrt()  # sqrt(p) . s
    back = torch.zeros_like(states)
    moved = dict.fromkeys(TABLE_METHODS, torch.zeros(len(states)))  # E_p[logit - its change]
    wholes = dict.fromkeys(TABLE_METHODS, torch.full((len(states),), -torch.inf))
    cap = config.final_logit_softcapping
    for start, stop in row_slices(weight_shapes(config)[TABLE]):
        rows = source.rows(TABLE, start, stop)
        logits = soft_cap(states @ rows.T, cap)
        p = (logits - whole[:, None]).exp()
        z = p.sqrt() * _signs(start, logits) - p * root[:, None]
        back += (z if cap is None else z * (1 - (logits / cap).square())) @ rows
        for option, method in TABLE_METHODS.items():
            changed = soft_cap(states @ quantize(rows, option, method).dequantize().T, cap)
            moved[option] = moved[option] + (p * (logits - changed)).sum(-1)
            wholes[option] = torch.logaddexp(wholes[option], changed.logsumexp(-1))
    (gradient,) = torch.autograd.grad(normed, hidden, back)
    kl = {option: float((moved[option] + wholes[option] - whole).mean()) for option in TABLE_METHODS}
    return gradient.view_as(x), kl


def key_of(source: Weights, windows: Tensor, methods: Methods) -> str:
    """A hash of everything that `measure` depends on."""
    by = [(config, methods(config).removeprefix("awq+")) for config in CANDIDATES]
    return hash_of(source, windows, [VERSION, by, list(TABLE_METHODS), SAMPLED_ROWS, JUDGED])


def save(errors: Errors, path: Path) -> None:
    """Write a measurement."""
    rows = {
        weight: [
            {"bits": config.bits, "group_size": config.group_size, "error": error} for config, error in some.items()
        ]
        for weight, some in errors.items()
    }
    write_whole(path, json.dumps(rows, indent=1))


def load(path: Path) -> Errors | None:
    """What `save` wrote; None if it is not there, or damaged."""
    try:
        rows = read_json(path)
        return {
            weight: {QuantConfig(row["bits"], row["group_size"]): row["error"] for row in rows[weight]}
            for weight in rows
        }
    except (InputError, KeyError, TypeError):
        return None
