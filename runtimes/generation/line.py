"""The next line of a chat: typed on a terminal, where it can be edited and pasted over several lines, or out of a pipe."""

from __future__ import annotations

import contextlib
import sys
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from gemma_edge.errors import InputError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

PROMPT = "> "


def read_line(help_text: str) -> str | None:
    """The user's next turn; None at the end of the input. On a terminal Ctrl-C shows `help_text` and gives an empty one."""
    interactive = sys.stdin.isatty()
    try:
        return _edited() if interactive else input()
    except EOFError:
        if interactive:
            click.echo(err=True)
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 ({error.reason}); give UTF-8 text") from None
    except KeyboardInterrupt:
        if not interactive:
            raise
        click.echo(f"\n{help_text}", err=True)
        return ""


def _edited() -> str:
    if find_spec("prompt_toolkit") is not None:
        return _session().prompt(PROMPT)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    # input() writes its prompt to stdout, which is for answers only unless both are the terminal
    if sys.stdout.isatty():
        return input(PROMPT)
    click.echo(PROMPT, nl=False, err=True)
    return input()


@cache
def _session() -> PromptSession[str]:
    from prompt_toolkit.output import create_output

    return make_session(output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr))


def make_session(**places: Any) -> PromptSession[str]:
    """A line that can be edited, with the earlier ones at hand. What is pasted keeps its line ends; Alt-Enter adds one.

    Args:
        places: prompt_toolkit's `input` and `output`.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(key_bindings=keys, **places)
