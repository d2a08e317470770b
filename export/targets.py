"""The classes of devices that a user chooses by name. Imports no torch, so that a quick --help can list them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
DEFAULT_CHUNK = 128  # tokens in the largest forward call
DEFAULT_PINNED = 256  # tokens that a text's beginning may keep beyond the context


@dataclass(frozen=True)
class Target:
    """A class of devices."""

    name: str
    ram_bytes: int  # RAM for the app, less than the device has
    threads: int  # for the matrix products
    context: int  # tokens, tried first; halved until it fits
    kv_bits: int = 32  # bits of a KV cache whose scales are calibrated: a key of KV_DTYPES
    backend: str = "onnx"  # default of `backend`
    pinned: int = DEFAULT_PINNED  # tokens that a text's beginning may keep; less where the context is short


TARGETS = {
    target.name: target
    for target in (
        Target("android", ram_bytes=4 * GIB, threads=4, context=2048, kv_bits=8),
        Target("raspberry-pi", ram_bytes=6 * GIB, threads=4, context=4096),
        Target("desktop", ram_bytes=16 * GIB, threads=8, context=8192),
        # a page's WebAssembly has 4 GiB of memory at most
        Target("web", ram_bytes=4 * GIB, threads=4, context=2048, backend="web"),
    )
}
