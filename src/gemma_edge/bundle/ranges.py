"""What a number or a text in a manifest may be. Ranges are checked when a manifest is read, and stand in its JSON Schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

# MAX_TOKENS: more than any model looks back on; keeps what is computed from a manifest's numbers small.
MAX_TOKENS = 1 << 24
MAX_CHUNK = 4096
MAX_PINNED = 1 << 16
MAX_LAYERS = 1024
MAX_BYTES = 1 << 62
MAX_NAME = 1024

Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, lt=MAX_TOKENS)]
Pinned = Annotated[int, Meta(ge=0, le=MAX_PINNED)]
Chunk = Annotated[int, Meta(ge=1, le=MAX_CHUNK)]
Width = Annotated[int, Meta(ge=1, le=1 << 20)]
Heads = Annotated[int, Meta(ge=1, le=1024)]
HeadDim = Annotated[int, Meta(ge=1, le=4096)]
Layers = Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
Threads = Annotated[int, Meta(ge=1, le=1024)]
Count = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
Bytes = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
Positive = Annotated[float, Meta(gt=0)]
# Scale: a number that a model multiplies or divides by. float32 computes with these without overflow.
Scale = Annotated[float, Meta(ge=1e-12, le=1e12)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", min_length=64, max_length=64)]
Version = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=32)]

# Figure, Magnitude, Share: measured numbers. JSON has no NaN and no infinity; the file holds null in their place, read as NaN.
# Dtype, Role: names that the rest of the code keeps as plain text.
if TYPE_CHECKING:
    Figure = float
    Magnitude = float
    Share = float
    Dtype = str
    Role = str
else:
    Figure = float | None
    Magnitude = Annotated[float, Meta(ge=0)] | None
    Share = Annotated[float, Meta(ge=0, le=1)] | None
    Dtype = Literal["float32", "float16", "int8"]  # numpy's names
    Role = Literal["prefill", "score", "decode"]
