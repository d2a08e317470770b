"""The course of a sweep: which units a point needs, in rounds under a budget, and the row that they become."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import gemma_edge
from gemma_edge.sweep.cluster.schedule import Outcome, Runner
from gemma_edge.sweep.halving import Halving, rungs
from gemma_edge.sweep.options import SweepOptions
from gemma_edge.sweep.points import Planned, Point, files_key, known
from gemma_edge.sweep.result import FAILED, LEFT_OUT, PRUNED, Row, SweepResult
from gemma_edge.sweep.units import (
    BENCH,
    CORES,
    EVALUATE,
    GPU,
    JUDGE,
    LOWER,
    MERGE,
    PHONE,
    QUANTIZE,
    QUIET,
    RAM,
    REFERENCE,
    Job,
    Unit,
    key_of,
    phone_resource,
)

DEFAULT_WINDOW = 512  # tokens of an evaluation's windows, unless a context is smaller
FIGURES = {
    EVALUATE: ("kl", "top1", "ppl", "ppl_change", "tokens"),
    BENCH: ("prefill_tokens_per_s", "decode_tokens_per_s", "rss_peak_mib"),
}
TOO_FAR = 1e9  # added to what is minimized where a point breaks a limit


class Course:
    """Knows the units of every point, and what follows from each result."""

    def __init__(
        self,
        options: SweepOptions,
        planned: Planned,
        machines: Sequence[str] = (),
        phones: Sequence[str] = (),
        *,
        gpu: bool = False,
    ) -> None:
        """Nothing runs yet.

        Args:
            options: the sweep's.
            planned: its points.
            machines: processors that time things: a figure of another one is not taken from the store.
            phones: serial numbers.
            gpu: whether a node offers a GPU: what can use one goes there.
        """
        self._gpu = gpu
        self._options, self._planned, self._machines, self._phones = options, planned, machines, phones
        self.rows = {point.number: _row(point) for point in planned.points}
        for one in planned.left_out:
            self.rows[one.number] = Row(one.number, one.name, one.choice, LEFT_OUT, one.why)
        fitting = [point for point in planned.points if self._fits(point)]
        self._window = min(DEFAULT_WINDOW, planned.smallest_context)
        self._texts = files_key(options.measuring.texts)
        tokens, budget = options.measuring.tokens, options.budget
        self._rungs, self._halving = [tokens], None
        self._tried = fitting
        if budget is not None:
            self._rungs = rungs(tokens, min(budget, len(fitting)))
            self._halving = Halving(len(fitting), budget, self._rungs[0])
            self._tried = [fitting[index] for index in sorted(self._halving.chosen)]
            for point in fitting:
                if point not in self._tried:
                    self._end(point, PRUNED, "not among those that the budget tries")
        self._index = {point.number: index for index, point in enumerate(fitting)}
        self._round: dict[int, dict[int, float]] = defaultdict(dict)  # rung -> point -> what is minimized
        self._live = {point.number for point in self._tried}
        self._of_unit = self._points_by_unit()

    @property
    def expected(self) -> int:
        """How many units there are at most."""
        return len(self._of_unit)

    def _fits(self, point: Point) -> bool:
        """Whether a point keeps to what is known before any work; if not, its row says so."""
        for field in ("max_size", "max_ram"):
            most = getattr(self._options.limits, field)
            if most is not None and known(point, field) > most:
                self._end(point, LEFT_OUT, f"{known(point, field)} bytes are over {field.replace('_', ' ')}")
                return False
        return True

    def _end(self, point: Point, state: str, reason: str) -> None:
        row = self.rows[point.number]
        row.state, row.reason = state, reason

    # units

    def quantizing(self, point: Point) -> Unit:
        """The unit that makes a point's integers."""
        needs = self._exporting(point)
        if self._gpu and point.options.quantization.distill:
            needs[GPU] = 1.0
        job = Job(point.options, split=self._options.where.split and point.calibration_tokens > 0)
        return Unit(QUANTIZE, point.quantization, f"quantize {point.name}", job, needs=needs)

    def _exporting(self, point: Point) -> dict[str, float]:
        return {CORES: self._options.where.cores, RAM: point.plan.export_ram_bytes}

    def _merging(self, point: Point) -> dict[str, Unit]:
        """The unit that makes a point's original, where that is not the model's folder."""
        if not point.merged:
            return {}
        key, job = key_of(MERGE, gemma_edge.__version__, point.model), Job(point.options)
        return {MERGE: Unit(MERGE, key, f"original of {point.name}", job, needs=self._exporting(point))}

    def lowering(self, point: Point) -> Unit:
        """The unit that makes a point's bundle."""
        before = self.quantizing(point)
        job, needs = Job(point.options), self._exporting(point)
        return Unit(LOWER, point.lowering, f"lower {point.name}", job, {QUANTIZE: before}, needs)

    def _job(self, point: Point, tokens: int) -> Job:
        threads, texts = self._options.where.cores, tuple(path.absolute() for path in self._options.measuring.texts)
        return Job(point.options, texts, tokens, self._window, threads)

    def _evaluating(self, point: Point, tokens: int) -> Unit:
        cores, texts = self._options.where.cores, (self._texts, self._window, tokens)
        job = self._job(point, tokens)
        key, merged = key_of(REFERENCE, point.model, texts, cores), self._merging(point)
        reference = Unit(REFERENCE, key, f"reference on {tokens} tokens", job, merged, needs=self._exporting(point))
        lowered = self.lowering(point)
        return Unit(
            EVALUATE,
            key_of(EVALUATE, point.lowering, texts, cores),
            f"evaluate {point.name} on {tokens} tokens",
            job,
            {LOWER: lowered, REFERENCE: reference, **merged},
            {CORES: cores, RAM: point.plan.device_ram_bytes},
        )

    def _timing(self, point: Point) -> list[Unit]:
        """The units that time a point, here and on phones."""
        measuring, job, before = self._options.measuring, self._job(point, 0), {LOWER: self.lowering(point)}
        units = []
        if measuring.bench is not None:
            key = key_of(BENCH, point.lowering, vars(measuring.bench), self._machines)
            needs = {QUIET: 1.0, RAM: float(point.plan.device_ram_bytes)}
            units.append(Unit(BENCH, key, f"time {point.name}", replace(job, settings=measuring.bench), before, needs))
        for serial in self._phones:
            key = key_of(PHONE, point.lowering, vars(self.phone_settings), serial)
            told = replace(
                job,
                settings=self.phone_settings,
                phone=serial,
                answer_s=measuring.answer_s,
                cool_s=measuring.cool_s,
            )
            units.append(
                Unit(PHONE, key, f"time {point.name} on {serial}", told, before, {phone_resource(serial): 1.0})
            )
        return units

    @property
    def phone_settings(self) -> Any:
        """How phones are timed: as this machine is."""
        from gemma_edge.bench.result import Settings

        return self._options.measuring.bench or Settings(threads=4, prefill=128, decode=64)

    def judging(self, number: int) -> Unit:
        """The unit that judges a point's bundle as an export would."""
        point = next(point for point in self._planned.points if point.number == number)
        job = Job(replace(point.options, verify=self._options.verify))
        lowered = self.lowering(point)
        after = {QUANTIZE: self.quantizing(point), LOWER: lowered}
        key = key_of(JUDGE, point.lowering, self._options.verify)
        return Unit(JUDGE, key, f"judge {point.name}", job, after, lowered.needs)

    # what follows from what

    def everything(self) -> list[Unit]:
        """Every unit that may run, once."""
        return list({unit.id: unit for point in self._tried for unit in self._of_point(point)}.values())

    def _of_point(self, point: Point) -> list[Unit]:
        """Every unit of a point, if it goes all the way."""
        last = [*(self._evaluating(point, tokens) for tokens in self._rungs), *self._timing(point)]
        return [each for unit in last for each in _with_needs(unit)]

    def first(self) -> list[Unit]:
        """The units to begin with; they bring along those that they need."""
        return [self._evaluating(point, self._rungs[0]) for point in self._tried]

    def _points_by_unit(self) -> dict[str, list[Point]]:
        """Every unit that may run, by its id, with the points that it is for."""
        found: dict[str, list[Point]] = defaultdict(list)
        for point in self._tried:
            for unit in self._of_point(point):
                if point not in found[unit.id]:
                    found[unit.id].append(point)
        return found

    def follow(self, runner: Runner, advance: Callable[[int], None]) -> Callable[[Outcome], Sequence[Unit]]:
        """What to call for each outcome."""

        def then(outcome: Outcome) -> Sequence[Unit]:
            advance(1)
            unit, points = outcome.unit, self._of_unit.get(outcome.unit.id, [])
            if outcome.record is None:
                for point in points:
                    self._fail(point, outcome)
            else:
                for point in points:
                    self._fill(self.rows[point.number], outcome)
            if unit.kind != EVALUATE:
                return self._next_round() if outcome.record is None else []
            for point in points:
                if point.number in self._live:
                    rung = self._rungs.index(unit.job.tokens)
                    self._round[rung][point.number] = self._minimized(point, outcome.result["kl"])
            return self._next_round() if self._halving else self._timed(points, outcome)

        return then

    def _timed(self, points: Iterable[Point], outcome: Outcome) -> list[Unit]:
        """The benchmarks of points that were evaluated on all tokens, unless they are too far from the original."""
        most = self._options.limits.max_kl
        if outcome.record is None or (most is not None and outcome.result["kl"] > most):
            return []
        return [unit for point in points for unit in self._timing(point)]

    def _next_round(self) -> list[Unit]:
        """The units of the next round, when the last point of this one is known."""
        if self._halving is None:
            return []
        for rung, tokens in enumerate(self._rungs):
            values = {number: value for number, value in self._round[rung].items() if number in self._live}
            if not self._live or set(values) != self._live:
                return []
            if rung + 1 == len(self._rungs):
                by_number = {point.number: point for point in self._tried}
                done, self._live = self._live, set()
                most = self._options.limits.max_kl
                kept = [by_number[n] for n in sorted(done) if most is None or (self.rows[n].kl or 0.0) <= most]
                return [unit for point in kept for unit in self._timing(point)]
            if self._round.get(rung + 1):
                continue
            survivors = self._halving.survivors({self._index[number]: v for number, v in values.items()}, tokens)
            on = [point for point in self._tried if self._index[point.number] in survivors]
            for point in self._tried:
                if point.number in self._live and point not in on:
                    self._end(point, PRUNED, f"others were better on {tokens} tokens")
            self._live = {point.number for point in on}
            return [self._evaluating(point, self._rungs[rung + 1]) for point in on]
        return []

    def _minimized(self, point: Point, kl: float) -> float:
        """What a round minimizes: what will be picked by, as far as it is known; and limits that are broken come last."""
        most = self._options.limits.max_kl
        excess = 0.0 if most is None or kl <= most else TOO_FAR + kl
        by = {"size": float(point.plan.weights_bytes), "decode": float(point.plan.token_bytes)}
        return excess or by.get(self._options.pick or "kl", kl)

    # rows

    def _fail(self, point: Point, outcome: Outcome) -> None:
        row, unit = self.rows[point.number], outcome.unit
        if unit.kind == PHONE:
            row.phones[unit.job.phone] = {"failure": outcome.failure}
            return
        if not row.reason:
            row.reason = f"{unit.what.partition(' ')[0]}: {outcome.failure}"
        if unit.kind != BENCH:
            row.state = FAILED
            self._live.discard(point.number)

    def _fill(self, row: Row, outcome: Outcome) -> None:
        unit, result, record = outcome.unit, outcome.result, outcome.record
        assert record is not None, "it did not fail"
        row.nodes[unit.kind] = str(record["node"])
        if unit.kind in (QUANTIZE, LOWER):
            row.export_cpu_s = (row.export_cpu_s or 0.0) + float(record["cpu_s"])
        if unit.kind == LOWER:
            row.bytes = result["bytes"]
        figures = result["summary"] if unit.kind in (BENCH, PHONE) else result
        if unit.kind == PHONE:
            row.phones[unit.job.phone] = {**figures, "throttled": result["throttled"]}
        if unit.kind == BENCH:
            row.others_cores = result.get("result", {}).get("others_cores")
        for name in FIGURES.get(unit.kind, ()):
            setattr(row, name, figures[name])

    def result(self, runner: Runner, nodes: list[str]) -> SweepResult:
        """The rows, and what it took."""
        kinds = sorted({*runner.computed, *runner.reused})
        units = {kind: {"computed": runner.computed[kind], "reused": runner.reused[kind]} for kind in kinds}
        rows = [row for _, row in sorted(self.rows.items())]
        return SweepResult(self._options.base.model, rows, units, runner.repeated, nodes)


def _row(point: Point) -> Row:
    plan = point.plan
    return Row(
        point.number,
        point.name,
        point.choice,
        recipe=plan.recipe,
        weights_bytes=plan.weights_bytes,
        device_ram_bytes=plan.device_ram_bytes,
    )


def _with_needs(unit: Unit) -> list[Unit]:
    return [unit, *(each for other in unit.after.values() for each in _with_needs(other))]
