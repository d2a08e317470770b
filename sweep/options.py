"""What a user can choose of a sweep, as data. No torch here, so that a command line can list its options quickly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_edge.bench.result import Settings
from gemma_edge.export.options import ExportOptions

PICKS = ("decode", "kl", "size")
EVERY_PHONE = "all"


def named_phones(requested: str) -> list[str] | None:
    """The serial numbers that `phones` names; None: every phone."""
    names = [name.strip() for name in requested.split(",") if name.strip()]
    return None if names == [EVERY_PHONE] else names


@dataclass(frozen=True)
class Limits:
    """What a point must keep to; None: anything goes."""

    max_size: int | None = None  # bytes of the bundle's weights
    max_ram: int | None = None  # bytes on the device while generating, as the plan predicts them
    max_kl: float | None = None  # nats per token, to the original
    min_decode: float | None = None  # tokens per second


@dataclass(frozen=True)
class Measuring:
    """On which text points are compared with the original, and how they are timed."""

    texts: tuple[Path, ...] = ()  # UTF-8 files; empty: the held-out texts
    tokens: int = 4096  # tokens of all texts together
    bench: Settings | None = None  # None: nothing is timed
    phones: str | None = None  # EVERY_PHONE, or serial numbers with commas: phones that time every bundle
    answer_s: float = 900.0  # seconds that a phone may take for one measurement
    cool_s: float = 600.0  # seconds that a phone may take to cool down before it


@dataclass(frozen=True)
class Where:
    """Where a sweep computes, and where it keeps what it has computed."""

    address: str | None = None  # of a Dask scheduler; None: this machine, for as long as the sweep lasts
    store: str | None = None  # a folder or URL that every node can reach; None: a folder in `out`
    cores: int = (
        1  # cores of one quantization, lowering or evaluation. Integers and KL may depend on it in the last bit.
    )
    retries: int = 2  # how often work is tried again after its node was lost or its process was killed
    split: bool = False  # whether idle nodes help with a calibration; its integers do not depend on that


@dataclass(frozen=True)
class SweepOptions:
    """A whole sweep."""

    base: ExportOptions  # the model, and what is the same for all points
    out: Path
    space: Mapping[str, tuple[Any, ...]]  # axis -> its values
    limits: Limits = Limits()
    pick: str | None = None  # one of PICKS: the bundle that is published; None: none
    budget: int | None = None  # how many points are tried, by successive halving; None: all, on all tokens
    measuring: Measuring = field(default_factory=Measuring)
    where: Where = field(default_factory=Where)
    verify: str = "quick"  # level of the gate that judges the picked bundle
