"""How every command fails: one line on stderr and exit 2 for what the user gave, exit 130 for Ctrl-C.

Use as `@click.command(cls=Command)` or `@click.group(cls=Group)`; nothing else is caught, so a bug keeps its traceback.
A closed pipe (`gemma-run ... | head`) is click's own business.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from gemma_edge.errors import InputError

INPUT_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 130  # 128 + SIGINT, as shells say it


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an InputError, a full disk and Ctrl-C inside the block into one line and an exit code.

    Raises:
        click.exceptions.Exit: instead of those three.
    """
    try:
        yield
    except InputError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise click.exceptions.Exit(INPUT_EXIT_CODE) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the disk that is written to"
        click.echo(f"error: no space left on {where}; free some, or write to another disk", err=True)
        raise click.exceptions.Exit(INPUT_EXIT_CODE) from None
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(INTERRUPT_EXIT_CODE) from None


class Command(click.Command):
    """A click command with `one_line_errors`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with one_line_errors():
            return super().invoke(ctx)


class Group(click.Group):
    """A click group with `one_line_errors` around every command in it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the group and the command in it."""
        with one_line_errors():
            return super().invoke(ctx)
