"""Codes in bytes and words, as compressed-tensors and ONNX Runtime read them.

Source: compressed-tensors, `pack_quantized/helpers.py`; ONNX Runtime's MatMulNBits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, in) int8 -> (rows, ceil(in * bits / 32)) int32: each code plus 2^(bits-1), the first in the lowest bits."""
    return _pad(pack_bytes(codes, bits), 4).contiguous().view(torch.int32)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """(rows, in) int8 -> (rows, ceil(in * bits / 8)) uint8: each code plus 2^(bits-1), the even column in the low nibble."""
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 8:
        return unsigned
    unsigned = _pad(unsigned, 2)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: (rows, columns) int8."""
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(1)
    return (unsigned[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _pad(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % multiple))
