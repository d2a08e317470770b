"""A sweep from its options to a table and a bundle: plan the points, run their units, mark the front, publish the picked one.

PyTorch, Dask and Optuna are imported after what needs none of them is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_edge.bundle.staging import BUNDLE, staged
from gemma_edge.errors import InputError
from gemma_edge.files import write_whole
from gemma_edge.progress import Progress, no_progress
from gemma_edge.sweep.cluster.remote import open_store
from gemma_edge.sweep.cluster.store import UNITS, Store, write_probe
from gemma_edge.sweep.options import PICKS, SweepOptions
from gemma_edge.sweep.result import SweepResult, candidates, mark_front, to_csv, to_json
from gemma_edge.sweep.shelf import connected
from gemma_edge.sweep.units import GPU

if TYPE_CHECKING:
    from gemma_edge.sweep.cluster.nodes import Nodes
    from gemma_edge.sweep.cluster.schedule import Runner
    from gemma_edge.sweep.course import Course

JSON, CSV, PICKED, LOG = "sweep.json", "sweep.csv", "bundle", "failures.log"
OURS = {JSON, CSV, PICKED, LOG, UNITS, "sweep.html"}


def sweep(options: SweepOptions, progress: Progress = no_progress) -> SweepResult:
    """Measure every point of a space, and publish the one that is picked.

    Writes the table as JSON and CSV into `options.out`, and the picked bundle beside them.

    Raises:
        InputError: something that was given cannot be used, or no point keeps to the limits; what was measured stays.
    """
    _refuse(options)
    store = open_store(options.where.store, options.out)
    store.check()

    from gemma_edge.sweep import points as planning
    from gemma_edge.sweep.cluster.nodes import nodes
    from gemma_edge.sweep.cluster.schedule import Runner
    from gemma_edge.sweep.course import Course

    planned = planning.plan_points(options, progress)
    limits = options.limits
    planning.refuse_impossible(planned.points, {"max_size": limits.max_size, "max_ram": limits.max_ram})
    where, requested = options.where, options.measuring.phones
    phones = connected(requested) if requested and where.address is None else []
    with nodes(where.address, store, where.retries, phones) as running:
        if requested and where.address is not None:
            phones = running.phones(requested)
        if where.address is not None:
            named = store.shared if where.store is not None else []
            texts = [path.absolute() for path in options.measuring.texts]
            read = [path for point in planned.points for path in planning.local_paths(point.options)]
            _refuse_blind(running, list(dict.fromkeys([*named, *texts, *read])))
            running.carries = any(running.blind(path) for path in store.shared)
        options.out.mkdir(parents=True, exist_ok=True)
        runner = Runner(running, store, where.retries)
        gpu = any(GPU in node.resources for node in running.now())
        course = Course(options, planned, running.machines(), phones, gpu=gpu)
        try:
            with progress("sweep", course.expected, False) as advance:
                runner.run(course.first(), course.follow(runner, advance))
            result = course.result(runner, [node.name for node in running.now()])
            mark_front(result.rows)
            _write(result, options, runner)
            if options.pick is not None:
                result.bundle = _publish(result, options, course, runner, store)
        finally:
            running.stop()
    _write(result, options, runner)
    return result


def _refuse(options: SweepOptions) -> None:
    """Refuse what cannot be used, before any work."""
    if options.pick is not None and options.pick not in PICKS:
        raise InputError(field="pick", value=options.pick, allowed=PICKS)
    timed = options.measuring.bench is not None
    if not timed and (options.pick == "decode" or options.limits.min_decode is not None):
        field = "min_decode" if options.limits.min_decode is not None else "pick"
        raise InputError(f"`{field}` needs benchmarks; leave out `no_bench`", field=field)
    where = options.where
    for field, value, least in (
        ("budget", options.budget, 1),
        ("cores", where.cores, 1),
        ("retries", where.retries, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"`{field}` {value} is below {least}", field=field, value=value)
    if where.split and where.address is None:
        raise InputError("`split` needs the nodes of a cluster; give its `address`, or leave it out", field="split")
    out = options.out
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or OURS & {path.name for path in out.iterdir()})):
        raise InputError(
            f"{out} exists and is not the folder of a sweep",
            field="out",
            value=out,
            hint="pass another folder as `out`",
        )
    try:
        write_probe(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}", field="out", value=out) from None


def _refuse_blind(running: Nodes, paths: Sequence[Path]) -> None:
    for path in paths:
        if blind := running.blind(path):
            raise InputError(
                f"{path} is not seen by {len(blind)} of the nodes, {blind[0]} among them; give a path that all nodes share"
            )


def _publish(result: SweepResult, options: SweepOptions, course: Course, runner: Runner, store: Store) -> str:
    """Judge the best point, and publish it; where it fails the gate, the next one.

    Raises:
        InputError: no point keeps to the limits, or none passes the gate.
    """
    assert options.pick is not None
    fitting = candidates(result.rows, options.limits, options.pick)
    for row in fitting:
        unit = course.judging(row.number)
        runner.run([unit], lambda outcome: [])
        outcome = runner.outcomes[unit.id]
        if outcome.record is None:
            row.reason = f"the gate: {outcome.failure}"
            continue
        store.fetch(unit)
        out = options.out / PICKED
        with staged(out, force=True) as work:
            shutil.copytree(store.place(unit) / BUNDLE.folder, work / BUNDLE.folder, dirs_exist_ok=True)
        row.picked = True
        return str(out)
    best = fitting[0]
    raise InputError(f"no point that keeps to the limits could be published; the best, {best.name}: {best.reason}")


def _write(result: SweepResult, options: SweepOptions, runner: Runner) -> None:
    write_whole(options.out / JSON, to_json(result))
    write_whole(options.out / CSV, to_csv(result.rows, list(options.space)))
    logs = [f"{one.unit.what}: {one.failure}\n{one.log}" for one in runner.outcomes.values() if one.log]
    (options.out / LOG).unlink(missing_ok=True)
    if logs:
        write_whole(options.out / LOG, "\n\n".join(logs))
