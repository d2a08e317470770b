"""What an export is asked for, and how it tells what it is doing: options, stages, progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_edge.model.hub import DEFAULT_MODEL
from gemma_edge.quantize.calibration.text import Source


@dataclass(frozen=True)
class ExportOptions:
    """What a user can choose. None = the default that fits model and target."""

    model: str = DEFAULT_MODEL
    out: Path | None = None
    target: str = "android"
    bits: int | None = None
    group_size: int | None = None
    table_bits: int | None = None
    size: str | None = None  # these three instead of bits, group size and table bits: see mixed.py
    bpw: float | None = None
    recipe: Path | None = None
    method: str | None = None
    quality: str | None = None
    text: Source = Source()
    distill: int = 0  # tokens; 0: not at all
    context: int | None = None
    prefill_chunk: int | None = None
    kv_bits: int | None = None
    backend: str | None = None
    lora: Path | None = None
    ram_gib: float | None = None
    verify: str = "quick"
    runtime_python: Path | None = None  # runs the gate of backends that this Python does not have
    keep_failed: bool = False
    save_checkpoint: Path | None = None
    force: bool = False
