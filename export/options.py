"""What a user can choose of an export, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_edge.bundle.accelerators import CPU
from gemma_edge.model.hub import DEFAULT_MODEL
from gemma_edge.quantize.options import QuantizeOptions


@dataclass(frozen=True)
class ExportOptions:
    """What a user can choose. None = the default that fits model and target."""

    model: str = DEFAULT_MODEL
    out: Path | None = None
    target: str = "android"
    quantization: QuantizeOptions = QuantizeOptions()
    context: int | None = None
    prefill_chunk: int | None = None
    pinned: int | None = None
    kv_bits: int | None = None
    backend: str | None = None
    accelerator: str = CPU  # what will compute the bundle: one of ACCELERATORS
    lora: str | Path | None = None  # a folder, or a Hugging Face id
    vocab: str | None = None  # FILE or auto:FILE: a text whose tokens are kept; None: all tokens
    ram_gib: float | None = None
    verify: str = "quick"
    runtime_python: Path | None = None  # runs the gate of backends that this Python does not have
    keep_failed: bool = False
    save_checkpoint: Path | None = None
    force: bool = False
