"""What a sweep finds: a row for each point, the Pareto front, and the point that is picked."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.sweep.options import Limits

MEASURED, LEFT_OUT, PRUNED, FAILED = "measured", "left out", "pruned", "failed"
# OBJECTIVES: figure -> whether more of it is better. A point is on the front unless another one is as good in all of them and
# better in one.
OBJECTIVES = {"bytes": False, "kl": False, "decode_tokens_per_s": True}
# PICKED_BY: value of `pick` -> the figure that decides
PICKED_BY = {"decode": "decode_tokens_per_s", "kl": "kl", "size": "bytes"}
# BOUNDS: field of Limits -> the figure that it bounds; `max_` bounds it above
BOUNDS = {
    "max_size": "weights_bytes",
    "max_ram": "device_ram_bytes",
    "max_kl": "kl",
    "min_decode": "decode_tokens_per_s",
}


@dataclass
class Row:
    """One point. A figure is None where it was not measured."""

    number: int
    name: str
    choice: Mapping[str, Any]
    state: str = MEASURED
    reason: str = ""  # why it was not measured
    recipe: str = ""
    bytes: int | None = None  # of the bundle
    weights_bytes: int | None = None
    device_ram_bytes: int | None = None  # predicted
    kl: float | None = None  # nats per token, to the original
    top1: float | None = None  # share of positions with the same most likely token
    ppl: float | None = None
    ppl_change: float | None = None
    tokens: int | None = None  # that these were measured on
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    rss_peak_mib: float | None = None
    others_cores: float | None = None  # cores that other programs kept busy while it was timed
    export_cpu_s: float | None = None  # of quantization and lowering
    nodes: dict[str, str] = field(default_factory=dict)  # kind of unit -> the node that did it
    phones: dict[str, dict[str, Any]] = field(default_factory=dict)  # serial number -> medians, or a failure
    front: bool = False
    picked: bool = False


@dataclass
class SweepResult:
    """A finished sweep."""

    model: str
    rows: list[Row]
    units: dict[str, dict[str, int]]  # kind -> how many were computed and how many were found in the store
    attempts_repeated: int
    nodes: list[str]
    bundle: str | None = None  # the picked one, published

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def mark_front(rows: Sequence[Row]) -> None:
    """Mark the rows that no other row beats. An objective that no row has is left out."""
    measured = [row for row in rows if row.state == MEASURED]
    compared = {
        name: more for name, more in OBJECTIVES.items() if any(getattr(row, name) is not None for row in measured)
    }
    complete = [row for row in measured if all(getattr(row, name) is not None for name in compared)]
    for row in complete:
        row.front = not any(_beats(other, row, compared) for other in complete)


def _beats(one: Row, other: Row, objectives: Mapping[str, bool]) -> bool:
    signs = [(1 if more else -1) * (getattr(one, name) - getattr(other, name)) for name, more in objectives.items()]
    return all(sign >= 0 for sign in signs) and any(sign > 0 for sign in signs)


def keeps(row: Row, limits: Limits) -> bool:
    """Whether a measured row keeps to all limits."""
    return row.state == MEASURED and all(_within(row, field, getattr(limits, field)) for field in BOUNDS)


def _within(row: Row, field: str, bound: float | None) -> bool:
    value = getattr(row, BOUNDS[field])
    if bound is None:
        return True
    return value is not None and (value <= bound if field.startswith("max_") else value >= bound)


def candidates(rows: Iterable[Row], limits: Limits, pick: str) -> list[Row]:
    """The rows that keep to the limits, the best first.

    Raises:
        InputError: there are none; it names the nearest one.
    """
    measured = [row for row in rows if row.state == MEASURED]
    name = PICKED_BY[pick]
    more = OBJECTIVES[name]
    kept = [row for row in measured if keeps(row, limits) and getattr(row, name) is not None]
    if kept:
        return sorted(kept, key=lambda row: (-1 if more else 1) * getattr(row, name))
    raise _nearest(measured, limits)


def _nearest(measured: Sequence[Row], limits: Limits) -> InputError:
    """The refusal for limits that no row keeps to."""
    if not measured:
        return InputError("no point could be measured; the table says why for each")
    broken = {name: bound for name in BOUNDS if (bound := getattr(limits, name)) is not None}

    def excess(row: Row) -> float:
        """How far a row is from the limits: the largest ratio by which it breaks one."""
        ratios = [1.0]
        for name, bound in broken.items():
            value = getattr(row, BOUNDS[name])
            if value is None:
                return float("inf")
            ratios.append(value / bound if name.startswith("max_") else bound / max(value, 1e-9))
        return max(ratios)

    nearest = min(measured, key=excess)
    figures = ", ".join(f"{BOUNDS[name]} {_short(getattr(nearest, BOUNDS[name]))}" for name in broken)
    asked = " and ".join(f"`{name}` {bound:g}" for name, bound in broken.items())
    return InputError(f"no point keeps to {asked}", hint=f"the nearest is {nearest.name}: {figures}")


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"


def to_csv(rows: Sequence[Row], axes: Sequence[str]) -> str:
    """One line per row: its values, then its figures."""
    figures = [name for name in Row.__dataclass_fields__ if name not in ("choice", "nodes", "phones")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(f"option_{name}" for name in axes), *figures])
    for row in rows:
        writer.writerow(
            [*(row.choice.get(name, "") for name in axes), *(_cell(getattr(row, name)) for name in figures)]
        )
    return text.getvalue()


def _cell(value: object) -> object:
    return "" if value is None else value


def to_json(result: SweepResult) -> str:
    """The JSON document."""
    return json.dumps(result.to_json(), indent=1, default=str) + "\n"
