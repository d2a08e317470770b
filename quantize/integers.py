"""Float weights to symmetric integers by the rules that every backend keeps: docs/export/quantization.md says why.

There is no zero point. The scale is rounded to bfloat16 before the integers are found, and is never zero. Integers lie in -8..7
with 4 bits, and in -127..127 with 8 bits. The method q4_0 is the exception: it follows the rules of llama.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.quantized import QuantConfig
from gemma_edge.model.quantized import QuantizedTensor as QuantizedTensor

RANGE = {4: (-8, 7), 8: (-127, 127)}
# MIN_SCALE: the smallest float16 above zero. A backend that stores scales as float16 keeps it; such small weights do not matter.
MIN_SCALE = 2.0**-24
# SHRINKS: scales tried by `mse`, as parts of the scale that maps the largest weight to the largest code.
SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76)


def quantize(values: Tensor, config: QuantConfig, method: str) -> QuantizedTensor:
    """Round rows of a weight.

    Args:
        values: (rows, in) float32, finite; in is a multiple of the group size.
        config: bits and group.
        method: "rtn" takes the largest weight of a group as the end of the range; "mse" searches the scale that rounds
            the group with the least squared error; "q4_0" is llama.cpp's.
    """
    if method not in SCALES:
        return OTHERS[method](values, config)
    groups = values.reshape(-1, config.group_size or values.shape[1])  # (rows * groups, G)
    scale = SCALES[method](groups, config.bits)  # (rows * groups, 1)
    return round_to(values, scale.view(len(values), -1), config)


def scale_dtype(method: str) -> torch.dtype:
    """The type of the scales of a method, a calibrated one too."""
    return torch.float16 if method in OTHERS else torch.bfloat16


def round_to(values: Tensor, scale: Tensor, config: QuantConfig) -> QuantizedTensor:
    """The nearest codes of a matrix (rows, in) under given scales (rows, groups), bfloat16 values."""
    groups = values.reshape(*scale.shape, -1)  # (rows, groups, G)
    codes = to_codes(groups, scale.unsqueeze(-1), config.bits).to(torch.int8)
    return QuantizedTensor(codes.flatten(1), scale.to(torch.bfloat16), config)


def round_scale(scale: Tensor) -> Tensor:
    """The nearest value that a scale can have: a bfloat16 value, at least MIN_SCALE, as float32."""
    return scale.clamp_min(MIN_SCALE).to(torch.bfloat16).float()


def to_codes(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes of weights, as float32; the scales broadcast to the weights."""
    low, high = RANGE[bits]
    return (groups / scale).round_().clamp_(low, high)


def absmax_scale(groups: Tensor, bits: int) -> Tensor:
    """The scale that maps the largest magnitude of each group to the largest code: (N, G) -> (N, 1), bfloat16 values."""
    return round_scale(groups.abs().amax(dim=1, keepdim=True) / RANGE[bits][1])


def mse_scale(groups: Tensor, bits: int) -> Tensor:
    """The scale of least squared rounding error among SHRINKS of `absmax_scale`, each refitted to its codes once.

    For fixed codes q the best scale is <w, q> / <q, q>, and its error is |w|^2 - <w, q>^2 / <q, q>: the largest
    <w, q>^2 / <q, q> wins.
    """
    widest = groups.abs().amax(dim=1, keepdim=True) / RANGE[bits][1]  # (N, 1)
    best_gain = torch.full_like(widest, -1.0)
    best = widest.clone()
    for shrink in SHRINKS:
        codes = to_codes(groups, (widest * shrink).clamp_min_(MIN_SCALE), bits)
        dot = torch.linalg.vecdot(groups, codes).unsqueeze(1)  # (N, 1)
        norm = torch.linalg.vecdot(codes, codes).unsqueeze(1).clamp_min_(1.0)  # (N, 1)
        gain = dot.square() / norm
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, dot / norm, best)
    return round_scale(best)


WEIGHTED_SHRINKS = tuple(1.0 - 0.03 * i for i in range(17))


def searched_scale(groups: Tensor, bits: int, weights: Tensor) -> Tensor:
    """The scale of least weighted squared rounding error among WEIGHTED_SHRINKS, each refitted to its codes once.

    As `mse_scale`, but each column of a group counts by its weight. The weights come from activations, which makes clipping safe.

    Args:
        groups: (..., G) float32.
        weights: (..., G), broadcast to groups, positive.

    Returns:
        (..., 1), bfloat16 values.
    """
    widest = groups.abs().amax(dim=-1, keepdim=True) / RANGE[bits][1]
    weighted = groups * weights
    best_gain, best = torch.full_like(widest, -1.0), widest.clone()
    for shrink in WEIGHTED_SHRINKS:
        codes = to_codes(groups, (widest * shrink).clamp_min_(MIN_SCALE), bits)
        dot = (weighted * codes).sum(-1, keepdim=True)
        norm = (codes.square() * weights).sum(-1, keepdim=True)
        gain = torch.where(norm > 0, dot.square() / norm, 0.0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better & (norm > 0), dot / norm, best)
    return round_scale(best)


def q4_0(values: Tensor, config: QuantConfig) -> QuantizedTensor:
    """llama.cpp's Q4_0, bit for bit: the weight of largest magnitude becomes -8, so a scale has the sign that this needs.

    Weights that were trained for that type (Google's `q4_0-unquantized` folders) lose nothing more by it. Source: `Q4_0` in
    gguf/quants.py. Scales are stored as float16; the codes are found with the float32 scale before it is rounded.

    Raises:
        InputError: a weight is so large that its scale is infinite in float16.
    """
    groups = values.reshape(-1, config.group_size)  # (N, 32)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))  # (N, 1)
    scale = largest / -8
    codes = (groups * (1 / scale) + 8.5).trunc_().clamp_(0, 15) - 8
    codes = torch.where(scale.reciprocal().isfinite(), codes, 0.0)  # weights of nothing
    stored = scale.to(torch.float16).view(len(values), -1)
    if not stored.isfinite().all():
        raise InputError(
            f"a weight of {largest.abs().max().item():g} is too large for the scales of `method` q4_0, which are float16;"
            " use another `method`",
            field="method",
            value="q4_0",
        )
    return QuantizedTensor(codes.to(torch.int8).view(values.shape), stored, config)


SCALES = {"rtn": absmax_scale, "mse": mse_scale}  # methods that choose a scale and round to it
OTHERS = {"q4_0": q4_0}
