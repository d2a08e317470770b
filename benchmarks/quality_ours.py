"""Our contenders of quality.py: the package's own quantizer functions on a model that is not a Gemma."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from quality_judge import linears
from torch import Tensor
from transformers import PreTrainedModel

from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.recipe import QuantConfig


@dataclass(frozen=True)
class Bar:
    """What a contender has to reach: at most `limit` times the KL of the best peer."""

    limit: float
    data_free: bool = False  # of the best one that needs no data


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    run: Callable[[PreTrainedModel, Tensor], None]  # changes the model in place; calibration windows (N, T) int64
    group_size: int  # 0 = per channel
    calibrated: bool = False
    bar: Bar | None = None


def round_all(model: PreTrainedModel, windows: Tensor, *, group_size: int, method: str) -> None:
    """Every linear by itself, without data."""
    for weight in linears(model).values():
        config = QuantConfig(4, group_size).fit(weight.shape[1])
        weight.copy_(quantize(weight, config, method).dequantize())


def _data_free(method: str, group_size: int) -> Contender:
    return Contender(partial(round_all, group_size=group_size, method=method), group_size)


OURS = {
    "rtn g32": _data_free("rtn", 32),
    "mse g32": _data_free("mse", 32),
    "mse g128": _data_free("mse", 128),
    "rtn channel": _data_free("rtn", 0),
}


def weight_bits(model: PreTrainedModel, group_size: int) -> float:
    """Bits per weight with bfloat16 scales; a row that the group does not divide gets smaller groups."""
    bits = weights = 0.0
    for weight in linears(model).values():
        group = QuantConfig(4, group_size).fit(weight.shape[1]).group_size or weight.shape[1]
        bits += weight.numel() * (4 + 16 / group)
        weights += weight.numel()
    return bits / weights
