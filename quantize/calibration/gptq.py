"""Codes and scales of a matrix that keep its *outputs*, given the second moment H = X^T X / n of the inputs it will see.

GPTQ (Frantar et al., arXiv 2210.17323) rounds one column after the other and spreads the error of each over the columns that are
not rounded yet. It is computed here as Babai's nearest plane algorithm on the Cholesky factor of H (Chen et al., arXiv
2507.18553), which gives the same codes without inverting H. Columns are rounded in descending order of H's diagonal
(act-order). Groups stay where they are and their scales are fixed before (static groups), so no backend sees that order. What H
is measured on is block.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.quantize.integers import QuantizedTensor, round_scale, searched_scale, to_codes
from gemma_edge.quantize.recipe import QuantConfig

DAMP = 0.01  # part of the mean diagonal that is added to the diagonal, as in the paper
ATTEMPTS = (
    8  # attempts to factor H; the last one adds 10^5 times the mean diagonal, and n columns need less than n times
)
ACTIVE = 1e-5  # part of the mean diagonal above which a column counts as active
# FLOOR: the least that a column counts, as a part of the median active column. A column that counts less would be clipped in
# favour of the others, and it may become active later.
FLOOR = 0.1
INNER, OUTER = (
    32,
    512,
)  # columns whose errors are spread at once: within the CPU caches, then over the rest of the matrix
SLICE_ELEMENTS = 1 << 20  # elements of a matrix that are computed at once


@dataclass(frozen=True)
class Inputs:
    """The activations that some linears read, as far as rounding needs them."""

    hessian: Tensor  # (in, in) float32
    weights: Tensor  # (in,) how much each column counts: the diagonal divided by its mean
    order: Tensor  # (in,) int64, columns by rising diagonal
    factor: Tensor  # (in, in) R of the damped H[order][:, order] = R^T R, each row divided by its diagonal element

    @classmethod
    def from_hessian(cls, hessian: Tensor, damp: float = DAMP) -> Inputs:
        """Damp and factor H.

        H is singular if a column was never active, or if there were fewer tokens than columns. Damping makes it regular; where
        float32 needs more of it, the damping grows tenfold. Every column counts at least FLOOR.

        Raises:
            InputError: H holds NaN or infinite values, or is not a second moment.
        """
        diagonal = hessian.diagonal()
        mean = float(diagonal.mean())
        weights = torch.ones_like(diagonal)
        if mean > 0:
            weights = diagonal / mean
            weights = weights.clamp_min(FLOOR * float(weights[weights > ACTIVE].median()))
        order = diagonal.argsort()
        damped = hessian[order][:, order]
        for _ in range(ATTEMPTS):
            damped.diagonal().add_(damp * (mean or 1.0))
            factor, info = torch.linalg.cholesky_ex(damped, upper=True)
            if not info and factor.isfinite().all():
                factor /= factor.diagonal()[:, None].clone()
                return cls(hessian, weights, order, factor)
            damp *= 10
        raise InputError(
            "the second moments of the activations are NaN, infinite or contradict each other; the weights or the"
            " calibration text are damaged: check the model folder, or pass other text as `calibration_text`",
            field="calibration_text",
        )


def hscale(weight: Tensor, inputs: Inputs, config: QuantConfig) -> Tensor:
    """Scales that round a matrix (out, in) with the least error weighted by the diagonal of H: (out, groups) float32."""
    rows, columns = weight.shape
    group = config.group_size or columns
    weights = inputs.weights.view(-1, group)  # (groups, G)
    scale = torch.empty(rows, columns // group)
    step = max(1, SLICE_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].view(-1, columns // group, group)  # (rows, groups, G)
        scale[start : start + step] = searched_scale(part, config.bits, weights)[..., 0]
    return scale


def gptq(weight: Tensor, inputs: Inputs, scale: Tensor, config: QuantConfig) -> Tensor:
    """Codes for fixed scales.

    Args:
        weight: (out, in) float32.
        scale: (out, groups) float32, bfloat16 values.

    Returns:
        (out, in) int8.
    """
    order, factor = inputs.order, inputs.factor
    group_of = (order // (config.group_size or len(order))).tolist()
    by_group = scale.T.contiguous()  # (groups, out)
    original = weight.T[order]  # (in, out): a column of the matrix is contiguous
    target = (
        original.clone()
    )  # what each column is rounded from: corrected for the errors of the columns rounded before it
    codes = torch.empty(original.shape, dtype=torch.int8)
    errors = torch.empty(OUTER, original.shape[1])
    for stop in range(len(order), 0, -OUTER):
        start = max(0, stop - OUTER)
        for right in range(stop, start, -INNER):
            left = max(start, right - INNER)
            for j in range(right - 1, left - 1, -1):
                step = by_group[group_of[j]]
                code = to_codes(target[j], step, config.bits)
                codes[j] = code
                error = torch.addcmul(original[j], code, step, value=-1.0, out=errors[j - start])
                target[left:j].addr_(factor[left:j, j], error)
            target[start:left].addmm_(factor[start:left, left:right], errors[left - start : right - start])
        target[:start].addmm_(factor[:start, start:stop], errors[: stop - start])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return codes[back].T.contiguous()


def refit(weight: Tensor, inputs: Inputs, codes: Tensor, scale: Tensor, config: QuantConfig) -> Tensor:
    """The scales that are best for fixed codes: least squares of the outputs, one small system per row.

    With Q the row's codes spread over its groups, minimises (w - Q s)^T H (w - Q s).

    Args:
        weight: (out, in) float32.
        codes: (out, in) int8.
        scale: (out, groups) float32.

    Returns:
        (out, groups) float32, bfloat16 values, all positive. The old scale stays where the best one is far from it.
    """
    rows, columns = weight.shape
    group, hessian = config.group_size or columns, inputs.hessian
    groups = columns // group
    best = torch.empty_like(scale)
    step = max(1, 8 * SLICE_ELEMENTS // max(columns, groups * groups))
    for start in range(0, rows, step):
        w, q = weight[start : start + step], codes[start : start + step].float()
        old = scale[start : start + step]
        right = (q * (w @ hessian)).view(-1, groups, group).sum(-1)  # (rows, groups)
        left = torch.empty(len(w), groups, groups)
        for g in range(groups):
            inside = slice(g * group, (g + 1) * group)
            left[:, g] = (q * (q[:, inside] @ hessian[inside])).view(-1, groups, group).sum(-1)
        # pulled a little towards the old scale: else a group whose codes are all zero would make the system singular
        pull = 1e-3 * left.diagonal(dim1=1, dim2=2) + 1e-12  # (rows, groups)
        left.diagonal(dim1=1, dim2=2).add_(pull)
        fitted = torch.linalg.solve_ex(left, (right + pull * old).unsqueeze(-1))[0].squeeze(-1)
        usable = fitted.isfinite() & (fitted > 0.5 * old) & (fitted < 2.0 * old)
        best[start : start + step] = round_scale(torch.where(usable, fitted, old))
    return best


def output_error(weight: Tensor, inputs: Inputs, rounded: Tensor) -> Tensor:
    """Mean squared error of each output, (out,), when `rounded` (out, in) takes the place of a weight (out, in)."""
    difference = weight - rounded
    error: Tensor = torch.linalg.vecdot(difference @ inputs.hessian, difference)
    return error


def quantize_outputs(weight: Tensor, inputs: Inputs, config: QuantConfig, *, rounds: int = 0) -> QuantizedTensor:
    """GPTQ under searched scales; then the scales are refitted and the codes found again `rounds` times. Each row keeps its best.

    Args:
        weight: (out, in) float32, finite.
        config: bits and group.
    """
    scale = hscale(weight, inputs, config)
    codes = gptq(weight, inputs, scale, config)
    best = QuantizedTensor(codes, scale.to(torch.bfloat16), config)
    if rounds:
        error = output_error(weight, inputs, best.dequantize())
    for _ in range(rounds):
        scale = refit(weight, inputs, codes, scale, config)
        for candidate in (codes, gptq(weight, inputs, scale, config)):
            tried = QuantizedTensor(candidate, scale.to(torch.bfloat16), config)
            tried_error = output_error(weight, inputs, tried.dequantize())
            better = tried_error < error
            best.codes[better], best.scale[better] = tried.codes[better], tried.scale[better]
            error = torch.where(better, tried_error, error)
            codes = candidate
    return best
