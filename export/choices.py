"""What a user chooses by name, as data: targets, backends, how far the gate looks. No torch here, so that --help can list it.

Methods and bits are quantize/recipe.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
DEFAULT_CHUNK = 128  # most tokens in one forward call
KV_DTYPES = {8: "int8", 32: "float32"}  # numpy's name of the KV cache's elements, by their bits

# backend -> the module whose `lower` makes its files, imported when it is needed
BACKENDS = {
    "onnx": "gemma_edge.export.onnx.backend",
    "executorch": "gemma_edge.export.executorch.backend",
    "tflite": "gemma_edge.export.tflite.backend",
    "tflite-runtime": "gemma_edge.export.tflite.tflite_runtime",
}
ALL = "all"  # for --backend: these
ALL_BACKENDS = ("onnx", "executorch", "tflite")
MADE_WITH = {"tflite-runtime": "tflite"}  # backends that are made with another one's package, and run somewhere else
INT8_CACHES = ("onnx",)  # backends that can keep the KV cache in int8
# these write a chunk in one piece, for which a ring has as many slots behind its end as a chunk has tokens, less one
UNWRAPPED_CACHES = ("tflite", "tflite-runtime")


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

PAST_WRAP = 64  # tokens fed beyond the point where the first key has left every window
LOWERING_TEXT = 128  # positions compared with the same integers
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Level:
    """How far the gate looks."""

    least_tokens: int  # fed, however short the context
    most_tokens: int
    text: int  # positions compared from the start; then those past the end of the context

    def tokens(self, context: int) -> int:
        """How many tokens are fed."""
        return min(max(context + PAST_WRAP, self.least_tokens), self.most_tokens)

    def positions(self, context: int) -> list[int]:
        """Which positions are compared with the original; the last token has no successor to judge by."""
        return [p for p in range(self.tokens(context) - 1) if p < self.text or p >= context]

    def saved_logits(self, context: int) -> int:
        """How many positions' logits are on disk meanwhile: of the original, and of the same integers in torch."""
        positions = self.positions(context)
        return len(positions) + sum(p < LOWERING_TEXT for p in positions)


LEVELS: dict[str, Level | None] = {
    "quick": Level(least_tokens=0, most_tokens=2304, text=512),
    "full": Level(least_tokens=1024, most_tokens=NO_LIMIT, text=NO_LIMIT),
    "none": None,
}


def bits_of(kv_dtype: str) -> int:
    """Inverse of KV_DTYPES."""
    return next(bits for bits, dtype in KV_DTYPES.items() if dtype == kv_dtype)
