"""How every command fails: one line on stderr and exit 2 for what the user gave, exit 130 for Ctrl-C.

Use as `@click.command(cls=Command)` or `@click.group(cls=Group)`; nothing else is caught, so a bug keeps its traceback.
A closed pipe (`gemma-run ... | head`) is click's own business.
"""

from __future__ import annotations

import errno
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from gemma_edge.errors import InputError, printable
from gemma_edge.memory import is_out_of_memory

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


# DISK_ERRORS: what the message says about the disk that is written to, by the error's number
DISK_ERRORS = {
    errno.ENOSPC: "no space left on {}; free some, or write to another disk",
    errno.EDQUOT: "no space left in your quota on {}; free some, or write to another disk",
    errno.EFBIG: "{}: the file is larger than the limit allows; raise the limit (ulimit -f), or write to another disk",
    errno.EROFS: "{} is on a read-only disk; write to another disk",
}


def _of_the_machine(error: Exception) -> str | None:
    """One line for an error that the machine causes and not our code; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return DISK_ERRORS[error.errno].format(error.filename or "the disk that is written to")
    if is_out_of_memory(error):
        return "not enough memory; close other programs, raise the limit (ulimit -v, or the container's), or choose smaller sizes"
    return None


def clean_up_when_ended() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, so that it cleans up: exit 143 and 129.

    A signal that is ignored stays ignored: `nohup` relies on it.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one

    def end(signum: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # the next signal must not interrupt the cleaning up
        raise SystemExit(128 + signum)

    for number in numbers:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an InputError, a full disk, full memory and Ctrl-C inside the block into one line and an exit code.

    Raises:
        click.exceptions.Exit: instead of those.
    """
    try:
        with _interrupts_kept():
            yield
    except InputError as error:
        click.echo(f"error: {printable(' '.join(error.spelled(_option).split()))}", err=True)
        raise click.exceptions.Exit(INPUT_EXIT_CODE) from None
    except Exception as error:
        if not (line := _of_the_machine(error)):
            raise
        click.echo(f"error: {line}", err=True)
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
    """A text for a terminal, with parameters between backticks as the command that runs spells them."""
    return printable(InputError(text).spelled(_option))


def note(text: str) -> None:
    """Print a note to stderr, with parameters between backticks as the command that runs spells them."""
    click.echo(f"note: {spelled(text)}", err=True)


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


class _Warnings(logging.Handler):
    """Prints the library's warnings to stderr, with parameters spelled as the command line does."""

    def emit(self, record: logging.LogRecord) -> None:
        """See Handler."""
        click.echo(f"warning: {spelled(record.getMessage())}", err=True)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Print warnings inside the block; a command inside a group does not print them twice."""
    library = logging.getLogger("gemma_edge")
    if any(isinstance(handler, _Warnings) for handler in library.handlers):
        yield
        return
    library.addHandler(handler := _Warnings(logging.WARNING))
    try:
        yield
    finally:
        library.removeHandler(handler)


class Command(click.Command):
    """A click command with `one_line_errors` whose warnings are lines on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with one_line_errors(), _warnings_shown():
            return super().invoke(ctx)


class Group(click.Group):
    """A click group with the same around every command in it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the group and the command in it."""
        with one_line_errors(), _warnings_shown():
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
