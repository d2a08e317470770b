"""The tables that gemma-sweep shows in the terminal. Their rows are also html.py's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_edge.bench.report import BUSY_CORES
from gemma_edge.report.console import OUT, print_table, say, size
from gemma_edge.sweep.result import MEASURED, Row, SweepResult

if TYPE_CHECKING:
    from gemma_edge.sweep.estimate import Estimate

COLUMNS = (
    "",
    "point",
    "size",
    "RAM",
    "KL",
    "top-1",
    "ppl",
    "prefill, tok/s",
    "decode, tok/s",
    "RSS, MiB",
    "export, CPU-s",
)
PHONE_COLUMNS = ("point", "phone", "prefill, tok/s", "decode, tok/s", "RSS, MiB", "throttling", "failure")
# TEXT_COLUMNS: the columns that hold text; the others hold numbers.
TEXT_COLUMNS = ("", "point", "phone", "state", "why", "throttling", "failure")
FRONT, PICK = "front", "PICK"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The measured rows by size, then by distance from the original."""
    measured = [row for row in rows if row.state == MEASURED]
    return sorted(measured, key=lambda row: (row.bytes or 0, row.kl or 0.0))


def cells(row: Row) -> tuple[str, ...]:
    """A measured row, with the cells of COLUMNS."""
    return (
        PICK if row.picked else FRONT if row.front else "",
        row.name,
        _sized(row.bytes),
        _sized(row.device_ram_bytes),
        _number(row.kl, "{:.5f}"),
        _number(row.top1, "{:.2%}"),
        _number(row.ppl, "{:.3f}"),
        _number(row.prefill_tokens_per_s, "{:.1f}"),
        _number(row.decode_tokens_per_s, "{:.2f}"),
        _number(row.rss_peak_mib, "{:.0f}"),
        _number(row.export_cpu_s, "{:.1f}"),
    )


def phone_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Phones x bundles, with the cells of PHONE_COLUMNS."""
    return [
        (
            row.name,
            serial,
            *(_number(found.get(name), "{:.2f}") for name in ("prefill_tokens_per_s", "decode_tokens_per_s")),
            _number(found.get("rss_peak_mib"), "{:.0f}"),
            _throttling(found),
            str(found.get("failure", "")),
        )
        for row in ordered(rows)
        for serial, found in row.phones.items()
    ]


def _throttling(found: dict[str, object]) -> str:
    if found.get("failure"):
        return ""
    return "throttled" if found.get("throttled") else "no"


def unmeasured(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Points without figures: name, state and why."""
    return [(row.name, row.state, row.reason) for row in rows if row.state != MEASURED]


def notes(result: SweepResult) -> list[str]:
    """What was done, in lines."""
    counted = ", ".join(
        f"{kind} {counts['computed']} done and {counts['reused']} taken over" for kind, counts in result.units.items()
    )
    lines = [f"Units of work: {counted}." if counted else "No unit of work was needed."]
    if result.attempts_repeated:
        lines.append(f"{result.attempts_repeated} attempts were repeated on other nodes.")
    if (busy := max((row.others_cores or 0.0 for row in result.rows), default=0.0)) > BUSY_CORES:
        lines.append(
            f"Other programs kept up to {busy:.1f} cores busy while points were timed: do not quote the speeds."
        )
    lines += [f"{row.name}: {row.reason}" for row in result.rows if row.state == MEASURED and row.reason]
    if result.bundle is not None:
        lines.append(f"The picked bundle is in {result.bundle}.")
    return lines


def print_tables(result: SweepResult) -> None:
    """Print the table of all points, those without figures, phones, and what was done."""
    print_table("points", COLUMNS, [cells(row) for row in ordered(result.rows)], names=TEXT_COLUMNS)
    if rows := phone_rows(result.rows):
        print_table("phones", PHONE_COLUMNS, rows, names=TEXT_COLUMNS)
    if others := unmeasured(result.rows):
        print_table("points without figures", ("point", "state", "why"), others, names=TEXT_COLUMNS)
    for line in notes(result):
        say(OUT, line)


def print_estimate(found: Estimate) -> None:
    """Print what a sweep would take."""
    rows = [
        (
            work.kind,
            str(work.count),
            _number(work.seconds, "{:.1f}"),
            _number(None if work.seconds is None else work.count * work.seconds / 3600, "{:.2f}"),
            _sized(work.ram_bytes),
        )
        for work in found.work
    ]
    columns = ("unit", "not done", "s each", "hours together", "RAM of the largest")
    print_table(f"{found.points} points", columns, rows, names=("unit",))
    for nodes, seconds in found.seconds.items():
        say(OUT, f"{nodes} node{'s' * (nodes > 1)}: at least {_time(seconds)}")
    if unknown := [work.kind for work in found.work if work.seconds is None]:
        say(OUT, f"Not counted, because none was done here before: {', '.join(unknown)}.")


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2f} hours"


def _sized(count: int | None) -> str:
    return "-" if count is None else size(count)


def _number(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else "-"
