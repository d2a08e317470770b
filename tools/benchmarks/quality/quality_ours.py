"""Our contenders of quality.py: the package's own quantizer functions on a model that is not a Gemma."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from quality_judge import Made, linears
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gemma_edge.quantize.calibration.block import Choice, Topology, decoder_topology, quantize_block, second_moments
from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.recipe import QUALITIES, QuantConfig


@dataclass(frozen=True)
class Bar:
    """What a contender has to reach: at most `limit` times the KL of the best peer."""

    limit: float
    data_free: bool = False  # True: of the best peer that needs no data


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    run: Callable[[PreTrainedModel, Tensor], Made]  # changes the model in place; calibration windows (N, T) int64
    calibrated: bool = False
    bar: Bar | None = None
    peer: bool = False


def round_all(model: PreTrainedModel, windows: Tensor, *, group_size: int, method: str) -> Made:
    """Round every linear by itself, without data."""
    start = time.process_time()
    for weight in linears(model).values():
        config = QuantConfig(4, group_size).fit(weight.shape[1])
        weight.copy_(quantize(weight, config, method).dequantize())
    return Made(time.process_time() - start, weight_bits(model, group_size))


def llama_topology(config: PretrainedConfig) -> Topology:
    """The topology of a Llama block: its norms multiply by w, and it has no post-norms."""
    return decoder_topology(
        "input_layernorm",
        "post_attention_layernorm",
        plus_one=False,
        heads_per_kv=config.num_attention_heads // config.num_key_value_heads,
        head_dim=config.head_dim,
    )


class _Reached(Exception):
    """Stops the model when it reaches its first block."""


def first_inputs(model: PreTrainedModel, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The input of the first block, (N, T, hidden), and the other arguments that every block is given."""
    inputs: list[Tensor] = []
    besides: dict[str, Any] = {}

    def stop(_block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0].clone())
        besides.update({name: value for name, value in kwargs.items() if not name.startswith("past")})
        raise _Reached

    hook = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for window in windows:
        try:
            model.model(window[None], use_cache=False)
        except _Reached:
            continue
    hook.remove()
    return torch.cat(inputs), besides


def calibrate_all(model: PreTrainedModel, windows: Tensor, *, group_size: int, method: str, rounds: int) -> Made:
    """Calibrate a Llama as layerwise.py does a Gemma: each block is fed by the quantized blocks before it."""
    start = time.process_time()
    x, besides = first_inputs(model, windows)
    topology = llama_topology(model.config)

    def run(block: nn.Module, window: Tensor) -> Tensor:
        out: Tensor = block(window, **besides)
        return out

    for block in model.model.layers:
        choices = {
            name: Choice(QuantConfig(4, group_size).fit(block.get_parameter(f"{name}.weight").shape[1]), method)
            for site in topology.sites
            for name in site
        }
        moments = second_moments(block, x, run, topology)
        quantize_block(block, moments, topology, choices, rounds=rounds)
        for i in range(len(x)):
            x[i] = run(block, x[i : i + 1])[0]
    return Made(time.process_time() - start, weight_bits(model, group_size))


def _data_free(method: str, group_size: int) -> Contender:
    return Contender(partial(round_all, group_size=group_size, method=method))


def _calibrated(quality: str, group_size: int, bar: Bar | None = None, method: str | None = None) -> Contender:
    """What `--quality` means for the linears. A Llama has no post-norms to refit. All contenders see the same windows."""
    chosen = QUALITIES[quality]
    run = partial(
        calibrate_all, group_size=group_size, method=method or chosen.method(group_size), rounds=chosen.rounds
    )
    return Contender(run, calibrated=True, bar=bar)


OURS = {
    "rtn g32": _data_free("rtn", 32),
    "mse g32": _data_free("mse", 32),
    "mse g128": _data_free("mse", 128),
    "rtn channel": _data_free("rtn", 0),
    "hscale g32": _calibrated("balanced", 32, method="hscale"),
    "balanced g32": _calibrated("balanced", 32),
    "balanced g128": _calibrated("balanced", 128, Bar(1.0)),
    "best g32": _calibrated("best", 32, Bar(0.55)),
    "best g128": _calibrated("best", 128, Bar(1.0)),
    "best channel": _calibrated("best", 0, Bar(1.0, data_free=True)),
}


def weight_bits(model: PreTrainedModel, group_size: int) -> float:
    """Bits per weight with bfloat16 scales; a row that the group does not divide gets smaller groups."""
    bits = weights = 0.0
    for weight in linears(model).values():
        group = QuantConfig(4, group_size).fit(weight.shape[1]).group_size or weight.shape[1]
        bits += weight.numel() * (4 + 16 / group)
        weights += weight.numel()
    return bits / weights
