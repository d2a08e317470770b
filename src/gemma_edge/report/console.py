"""What every command shows people in the same way: the two consoles, sizes, tables, and progress bars with an ETA."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gemma_edge.errors import printable

ERR = Console(stderr=True)
OUT = Console()
UNFOLDED = 500  # columns: wider than any table


def size(count: float) -> str:
    """Bytes for people: 1.67 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_table(heading: str, columns: Sequence[str], body: Sequence[Sequence[str]], *, names: Collection[str]) -> None:
    """A table on stdout; cells are texts of their own: a folder's name may hold what rich takes for markup.

    Args:
        names: columns of text, to the left. A narrow terminal folds them, never numbers.
    """
    table = Table(title=plain(heading), title_justify="left")
    for column in columns:
        text = column in names
        table.add_column(plain(column), justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in body:
        table.add_row(*map(plain, row))
    # a file or a pipe folds nothing, unless COLUMNS says how wide it is
    (OUT if OUT.is_terminal or "COLUMNS" in os.environ else Console(width=UNFOLDED)).print(table)


def plain(text: str) -> Text:
    """A text for a table: names in it neither are markup nor control the terminal."""
    return Text(printable(text))


def say(console: Console, line: str) -> None:
    """Print a line, not folded and not coloured; names in it neither are markup nor control the terminal."""
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(what: str, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
    """A bar with an ETA on stderr; in a log one line when the work starts and one when it is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if not ERR.is_terminal:
        ERR.print(f"{what} ...")
        yield lambda done: None
        return
    with Progress(*columns, console=ERR) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
