"""What gemma-eval shows people: tables in the terminal. The page with plots is eval_html.py's."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.evaluate.evaluate import Evaluation, Result
from gemma_edge.report.console import print_table, size

COLUMNS = ("model", "bits/weight", "size", "ppl", "change", "KL", "top-1")  # what is the same for all is the title's
NAMES = ("model", "task", "metric")  # columns of text


def cells(result: Result) -> tuple[str, ...]:
    """A row under COLUMNS."""
    return (
        result.name,
        _or_dash(result.bits_per_weight, "{:.2f}"),
        size(result.size),
        f"{result.ppl:.3f}",
        _or_dash(result.ppl_change, "{:+.2%}"),
        _or_dash(result.kl, "{:.5f}"),
        _or_dash(result.top1, "{:.2%}"),
    )


def rows(done: Evaluation) -> list[tuple[str, ...]]:
    """The reference's row, if there is one, then the models'."""
    first = [] if done.reference is None else [(f"{done.reference.name} (original)", *cells(done.reference)[1:])]
    return [*first, *(cells(result) for result in done.results)]


def task_rows(done: Evaluation) -> list[tuple[str, ...]]:
    """(task, metric, value per model), with standard errors where there are any."""
    found = {(task, metric): None for result in done.results for task in result.tasks for metric in result.tasks[task]}
    return [
        (task, metric, *(_score(result.tasks.get(task, {}), metric) for result in done.results))
        for task, metric in found
        if "_stderr" not in metric
    ]


def _score(metrics: dict[str, float], metric: str) -> str:
    name, _, filtered = metric.partition(" ")
    error = metrics.get(f"{name}_stderr {filtered}".strip())
    return _or_dash(metrics.get(metric), "{:.4f}") + _or_nothing(error, " ±{:.4f}")


def title(done: Evaluation) -> str:
    """What was fed and how it was counted."""
    texts = ", ".join(Path(text).name for text in done.texts)
    return f"{texts}: {done.results[0].tokens} tokens scored, protocol {done.protocol}, windows of {done.window}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def print_tables(done: Evaluation) -> None:
    """The end of `gemma-eval`."""
    print_table(title(done), COLUMNS, rows(done), names=NAMES)
    if scores := task_rows(done):
        print_table("tasks", ("task", "metric", *(result.name for result in done.results)), scores, names=NAMES)
