"""Tensors without memory, for tracing a model whose weights are not read."""

from __future__ import annotations

import torch
from torch import Tensor


def hollow(value: Tensor) -> Tensor:
    """A CPU tensor of the same shape and type that takes no memory. A tracer needs a device, and nobody reads the values."""
    return torch.zeros(1, dtype=value.dtype).expand(value.shape)
