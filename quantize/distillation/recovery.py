"""Distillation of a quantized checkpoint on the logits of its original. The whole model is in memory, so this needs a small model
or a GPU. What is trained, and how, is distill.py's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import HEAD, Weights, linear_shapes, norm_names, weight_shapes
from gemma_edge.model.gemma import Embedding, Gemma, Layers, Linear
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.quantize.checkpoint.safetensors_writer import write_safetensors
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.checkpoint.writer import block_specs, shard_names
from gemma_edge.quantize.distillation.distill import CodedLinear, Schedule, distill

TRAINED = ("log_change", "layernorm.weight", "q_norm.weight", "k_norm.weight")  # ends of the parameters' names
BYTES_PER_WEIGHT = (
    4 + 1 + 2
)  # the original in float32, the codes, and activations with one dequantized weight at a time


@dataclass(frozen=True)
class Recovered:
    """The KL on windows that were not trained on, before and after distillation."""

    tokens: int  # tokens trained on, each counted once
    kl_before: float  # nats per token
    kl_after: float


def recover(
    source: Weights,
    quantized: QuantizedCheckpoint,
    windows: Tensor,
    schedule: Schedule,
    progress: Callable[[int], None] = lambda done: None,
) -> Recovered:
    """Train scales and norms of a quantized checkpoint, and write them into it if that helped on the windows held out.

    Args:
        windows: (N, T) int64, more than the schedule holds out.

    Raises:
        InputError: too little text, or too little memory.
    """
    if len(windows) <= schedule.held_out:
        raise InputError(
            f"`distill` on {windows.numel()} tokens: at least {(schedule.held_out + 1) * windows.shape[1]} are needed,"
            f" of which {schedule.held_out * windows.shape[1]} are only used to judge the result",
            field="distill",
            value=windows.numel(),
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        _check_memory(source)
    teacher, student = source.load().to(device), _student(quantized).to(device)
    trained = [p for name, p in student.named_parameters() if name.endswith(TRAINED)]
    for parameter in trained:
        parameter.requires_grad_(True)
    with torch.device(device):  # where positions and masks are made
        before, after = distill(
            partial(_logits, student), partial(_logits, teacher), trained, windows.to(device), schedule, progress
        )
    if after < before:
        _write(quantized, student.cpu())
    return Recovered((len(windows) - schedule.held_out) * windows.shape[1], before, after)


def _check_memory(source: Weights) -> None:
    need = BYTES_PER_WEIGHT * source.config.num_parameters
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free:
        raise InputError(
            f"`distill` holds the whole model: about {need / 2**30:.1f} GiB of RAM, {free / 2**30:.1f} GiB are free",
            field="distill",
            hint="leave it out, or use a machine with a GPU or more memory",
        )


def _logits(model: Gemma, window: Tensor) -> Tensor:
    tokens = window.shape[1]
    cache = RingCache(model.config, context=tokens, chunk=tokens).to(window.device)
    out: Tensor = model(window, torch.zeros(1, dtype=torch.int64, device=window.device), cache)
    return out


def _student(quantized: QuantizedCheckpoint) -> Gemma:
    shapes, config = weight_shapes(quantized.config), quantized.config

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        if name != HEAD and quantized.configs[name] is not None:
            return CodedLinear(quantized.quantized(name, 0, shapes[name][0]))
        kept = Linear(name, in_features, out_features)
        kept.weight.data = quantized.matrix(name)
        return kept

    def embedding(name: str, vocab_size: int, hidden_size: int) -> Embedding:
        table = Embedding(name, vocab_size, hidden_size)
        table.weight.data = quantized.matrix(name)
        return table

    model = Gemma(config, Layers(linear, embedding))
    for name in norm_names(config):
        model.get_parameter(name).data.copy_(quantized.vector(name))
    return model


def _write(quantized: QuantizedCheckpoint, student: Gemma) -> None:
    """Replace the layers' shards by the student's scales and norms; the first shard, with table, final norm and head, stays."""
    for layer, name in enumerate(shard_names(quantized.config)[1:]):
        block = student.get_submodule(f"model.layers.{layer}")
        linears = {part: module for part, module in block.named_modules() if isinstance(module, CodedLinear)}
        integers = {part: module.result() for part, module in linears.items()}
        shapes = linear_shapes(quantized.config, layer)
        write_safetensors(quantized.folder / name, block_specs(layer, block, integers, shapes, quantized.dtype))
