"""The tables that gemma-eval shows in the terminal. Their rows are also html.py's."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.evaluate.result import Evaluation, Result
from gemma_edge.report.console import print_table, size

COLUMNS = ("model", "bits/weight", "size", "ppl", "change", "KL", "top-1")
MEMORIZATION_COLUMNS = ("model", "passages", "exact", "approximate")
# TEXT_COLUMNS: the columns that hold text; the others hold numbers.
TEXT_COLUMNS = ("model", "task", "metric")


def cells(result: Result) -> tuple[str, ...]:
    """The row of one model, with the cells of COLUMNS."""
    return (
        result.name,
        _or_dash(result.bits_per_weight, "{:.2f}"),
        size(result.size),
        f"{result.ppl:.3f}",
        _or_dash(result.ppl_change, "{:+.2%}"),
        _or_dash(result.kl, "{:.5f}"),
        _or_dash(result.top1, "{:.2%}"),
    )


def everyone(evaluation: Evaluation) -> list[tuple[str, Result]]:
    """The reference, if there is one, and the models, each with the name that tables show."""
    reference = evaluation.reference
    first = [] if reference is None else [(f"{reference.name} (original)", reference)]
    return [*first, *((result.name, result) for result in evaluation.results)]


def rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The row of the reference, if there is one, and the rows of the models."""
    return [(name, *cells(result)[1:]) for name, result in everyone(evaluation)]


def task_columns(evaluation: Evaluation) -> tuple[str, ...]:
    """The columns of `task_rows`."""
    return ("task", "metric", *(name for name, _ in everyone(evaluation)))


def memorization_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Rows of a model and what it has by heart, with the cells of MEMORIZATION_COLUMNS."""
    found = [(name, result.memorization) for name, result in everyone(evaluation)]
    return [
        (name, str(each.passages), _share(each.exact, each.passages), _share(each.approximate, each.passages))
        for name, each in found
        if each is not None
    ]


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.2%})"


def task_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Rows of task, metric and one score per model, with its standard error where it has one."""
    results = [result for _, result in everyone(evaluation)]
    pairs = dict.fromkeys(
        (task, metric) for result in results for task in result.tasks for metric in result.tasks[task]
    )
    return [
        (task, metric, *(_score(result.tasks.get(task, {}), metric) for result in results))
        for task, metric in pairs
        if "_stderr" not in metric
    ]


def _score(metrics: dict[str, float], metric: str) -> str:
    """A metric's value and standard error. lm-eval's filter may follow the metric's name: `exact_match (strict-match)`."""
    name, _, filtered = metric.partition(" ")
    error = metrics.get(f"{name}_stderr {filtered}".strip())
    return _or_dash(metrics.get(metric), "{:.4f}") + ("" if error is None else f" ±{error:.4f}")


def title(evaluation: Evaluation) -> str:
    """Which text was fed, and how it was cut and scored."""
    texts, tokens = ", ".join(Path(text).name for text in evaluation.texts), evaluation.results[0].tokens
    return f"{texts}: {tokens} tokens scored, protocol {evaluation.protocol}, windows of {evaluation.window}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def print_tables(evaluation: Evaluation) -> None:
    """Print the table of all models, and the table of tasks if there are any."""
    print_table(title(evaluation), COLUMNS, rows(evaluation), names=TEXT_COLUMNS)
    if scores := task_rows(evaluation):
        print_table("tasks", task_columns(evaluation), scores, names=TEXT_COLUMNS)
    if found := memorization_rows(evaluation):
        print_table("memorization", MEMORIZATION_COLUMNS, found, names=TEXT_COLUMNS)
