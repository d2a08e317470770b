"""What a sweep would take on so many nodes, before any work: from a calibration's own estimate, and from units done before."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from gemma_edge.model.config import GemmaConfig
from gemma_edge.progress import Progress, no_progress
from gemma_edge.quantize.calibration.estimate import estimate_s
from gemma_edge.quantize.calibration.layerwise import Calibration
from gemma_edge.quantize.calibration.text import WINDOW
from gemma_edge.quantize.recipe import DEFAULT_QUALITY, QUALITIES, Recipe
from gemma_edge.sweep.cluster.remote import open_store
from gemma_edge.sweep.cluster.store import Store
from gemma_edge.sweep.course import Course
from gemma_edge.sweep.options import SweepOptions
from gemma_edge.sweep.points import Planned, plan_points
from gemma_edge.sweep.units import BENCH, RAM, RECORD, Unit


@dataclass(frozen=True)
class Work:
    """All units of a kind that are not done yet."""

    kind: str
    count: int
    seconds: float | None  # of one of them on this machine, with the cores of a unit; None: none was done here before
    ram_bytes: int  # of the largest


@dataclass(frozen=True)
class Estimate:
    """What a sweep would take."""

    points: int
    work: list[Work]
    seconds: dict[int, float]  # number of nodes that each work on one unit at a time -> seconds at least


def estimate(options: SweepOptions, nodes: Sequence[int], progress: Progress = no_progress) -> Estimate:
    """Plan every point, and add up what is not done yet.

    Args:
        options: the sweep's.
        nodes: numbers of nodes.
        progress: shows how far measuring is, where a point is mixed precision.

    Raises:
        InputError: as `sweep`, before any work.
    """
    torch.set_num_threads(options.where.cores)
    planned = plan_points(options, progress)
    store = open_store(options.where.store, options.out)
    units = {unit.id: unit for unit in Course(options, planned).everything() if store.record(unit) is None}
    known, calibrations = _known(store), _calibrations(planned)
    each = _seconds(units, known, calibrations, 1)
    by_kind: dict[str, list[Unit]] = defaultdict(list)
    for unit in units.values():
        by_kind[unit.kind].append(unit)
    work = [_work(kind, same, each) for kind, same in by_kind.items()]
    total, least = sum(value or 0.0 for value in each.values()), {}
    for count in nodes:
        chained = _seconds(units, known, calibrations, count if options.where.split else 1)
        chains = (_chain(unit, chained) for unit in units.values())
        least[count] = max(total / count, max(chains, default=0.0))
    return Estimate(len(planned.points), work, least)


def _seconds(
    units: Mapping[str, Unit], known: Mapping[str, float], calibrations: Mapping[str, Calibrated], helping: int
) -> dict[str, float | None]:
    """Seconds of each unit, where so many nodes help with a calibration; None: nothing is known of its kind."""
    return {
        id_: calibrations[unit.key].seconds(helping) if unit.key in calibrations else known.get(unit.kind)
        for id_, unit in units.items()
    }


def _work(kind: str, units: Sequence[Unit], each: Mapping[str, float | None]) -> Work:
    seconds = [value for unit in units if (value := each[unit.id]) is not None]
    ram = max(int(unit.needs.get(RAM, 0)) for unit in units)
    return Work(kind, len(units), median(seconds) if seconds else None, ram)


def _chain(unit: Unit, each: Mapping[str, float | None]) -> float:
    before = max((_chain(other, each) for other in unit.after.values()), default=0.0)
    return before + (each.get(unit.id) or 0.0)


def _known(store: Store) -> dict[str, float]:
    """Seconds of the units that are done, by kind: processor time, and of a benchmark all of it, as nothing runs beside it."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in _records(store.root):
        figure = record["seconds" if record["kind"] == BENCH else "cpu_s"]
        found[str(record["kind"])].append(float(str(figure)))
    return {kind: median(values) for kind, values in found.items()}


def _records(root: Path) -> Iterable[Mapping[str, object]]:
    for path in sorted(root.glob(f"*/*/{RECORD}")):
        yield json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Calibrated:
    """The calibration of a quantization, which a node's helpers share."""

    config: GemmaConfig
    recipe: Recipe
    calibration: Calibration

    def seconds(self, nodes: int) -> float:
        """Seconds on so many machines like this one."""
        return estimate_s(self.config, self.recipe, self.calibration, nodes)


def _calibrations(planned: Planned) -> dict[str, Calibrated]:
    """Key of a quantization -> its calibration, where it has one."""
    found: dict[str, Calibrated] = {}
    for point in planned.points:
        if point.calibration_tokens:
            quality = QUALITIES[point.options.quantization.quality or DEFAULT_QUALITY]
            length = min(WINDOW, planned.config.max_position_embeddings)
            windows = torch.empty(max(1, point.calibration_tokens // length), length)
            calibration = Calibration(windows, quality.rounds, quality.refit)
            found[point.quantization] = Calibrated(planned.config, point.recipe, calibration)
    return found
