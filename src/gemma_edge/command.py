"""How every command fails: one line on stderr and exit 2 for what the user gave, exit 130 for Ctrl-C.

Use as `@click.command(cls=Command)` or `@click.group(cls=Group)`; nothing else is caught, so a bug keeps its traceback.
A closed pipe (`gemma-run ... | head`) is click's own business.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from gemma_edge.errors import InputError, printable

INPUT_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 130  # 128 + SIGINT, as shells say it


class _CtrlC:
    """Python's own handler of SIGINT, which remembers that it was called."""

    came = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt."""
        self.came = True
        signal.default_int_handler(signum, frame)


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt for an error that Ctrl-C became on its way.

    An extension may put an error of its own in its place: safetensors does, while it cuts a slice out of a tensor.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        handler = _CtrlC()
        signal.signal(signal.SIGINT, handler)
    elif isinstance(before, _CtrlC):
        handler = before  # of the group around a command
    else:  # ignored, or somebody else's
        yield
        return
    try:
        yield
    except (InputError, OSError, click.exceptions.Exit):
        raise
    except Exception as error:
        if handler.came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an InputError, a full disk and Ctrl-C inside the block into one line and an exit code.

    Raises:
        click.exceptions.Exit: instead of those three.
    """
    try:
        with _interrupts_kept():
            yield
    except InputError as error:
        click.echo(f"error: {printable(' '.join(error.spelled(_option).split()))}", err=True)
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


def given(context: click.Context) -> list[str]:
    """Names of the parameters that the user gave, on the command line or in the environment."""
    explicit = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    # click takes an absent argument of any number of values, (), for one that was typed
    return [
        name for name, value in context.params.items() if value != () and context.get_parameter_source(name) in explicit
    ]


def spelled(text: str) -> str:
    """A text with parameters between backticks, as the command that runs spells them."""
    return InputError(text).spelled(_option)


def _option(name: str) -> str:
    """How the command that runs spells a parameter: bits as --bits, bundle as BUNDLE; another name as it is."""
    context = click.get_current_context(silent=True)
    parameters = context.command.params if context else []
    for parameter in parameters:
        if parameter.name == name or f"--{name.replace('_', '-')}" in parameter.opts:
            return (
                max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.human_readable_name
            )
    return name


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


class DefaultGroup(Group):
    """A group with a command that may be left out: `gemma-export FOLDER` is `gemma-export make FOLDER`."""

    def __init__(self, *args: Any, default: str, **attrs: Any) -> None:
        """Make the group; `default` is the name of that command, all else is click's."""
        super().__init__(*args, **attrs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front, unless another command or the group's help is requested."""
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h", "--version")):
            args = [self.default, *args]
        return super().parse_args(ctx, args)
