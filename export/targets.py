"""What a user chooses by name, as data: targets, backends, how far the gate looks. No torch here, so that --help can list it.

Methods and bits are quantize/recipe.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
DEFAULT_CHUNK = 128  # most tokens in one forward call


@dataclass(frozen=True)
class Target:
    """A class of devices."""

    name: str
    ram_bytes: int  # that the app may take, not what the device has
    threads: int
    context: int  # tried first; halved until it fits
    kv_bits: int = 32  # of the KV cache where its scales are calibrated: a key of KV_DTYPES
    backend: str = "onnx"  # unless --backend says otherwise


TARGETS = {
    target.name: target
    for target in (
        Target("android", ram_bytes=4 * GIB, threads=4, context=2048, kv_bits=8),
        Target("raspberry-pi", ram_bytes=6 * GIB, threads=4, context=4096),
        Target("desktop", ram_bytes=16 * GIB, threads=8, context=8192),
    )
}
