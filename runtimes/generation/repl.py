"""A chat on the terminal, line by line. Conversations are session.py's, printing is console.py's."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import click

from gemma_edge.command import note
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.console import Output, note_overflow, show
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.runtimes.guard import Guard, Violation, guarded
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

HELP = "/undo takes the last turn back, /reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    runtime: Runtime,
    prompt: str | None,
    options: GenerationOptions,
    output: Output,
    *,
    prefix: str = "",
    guard: Guard | None = None,
) -> None:
    """Answer one turn, or the turns that stdin holds, one on each line.

    Args:
        runtime: computes the answers.
        prompt: the one turn; None reads stdin until it ends.
        options: how to generate.
        output: what to print beside an answer.
        prefix: text in front of the first turn.
        guard: judges turns and answers. What it refuses is not printed and leaves no trace in the conversation.

    Raises:
        InputError: a bundle without a tokenizer, a turn that cannot be taken, or input that is not UTF-8; with `prompt` also
            a text that the guard refuses.
    """
    tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
    template = ChatTemplate.from_bundle(runtime.bundle)
    session = Session(runtime, tokenizer, template, options, prefix=prefix, notify=note)
    if prompt is not None:
        _answer(session, prompt, output, guard=guard)
        return
    if sys.stdin.isatty():
        click.echo(HELP, err=True)
    while (line := _read_line()) is not None:
        text = line.strip()
        if text == "/quit":
            break
        if text == "/reset":
            session.reset()
            note("a new conversation")
        elif text == "/undo":
            session.rewind(1)
            note("the last turn is taken back")
        elif text:
            with _stop_on_interrupt() as interrupts:
                try:
                    _answer(session, text, output, interrupts, guard)
                except Violation as violation:
                    note(str(violation))


def _read_line() -> str | None:
    """The user's next line; None at the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    # input() writes its prompt to stdout, which is for answers only unless both are the terminal
    on_stdout = interactive and sys.stdout.isatty()
    if interactive and not on_stdout:
        click.echo("> ", nl=False, err=True)
    try:
        return input("> " if on_stdout else "")
    except EOFError:
        if interactive:
            click.echo(err=True)
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 ({error.reason}); give UTF-8 text") from None
    except KeyboardInterrupt:
        if not interactive:
            raise
        click.echo(f"\n{HELP}", err=True)
        return ""


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[list[bool]]:
    """Note the first Ctrl-C in the block in a list; the next one raises KeyboardInterrupt.

    A KeyboardInterrupt inside a forward pass would lose the cache; a note that is read between tokens does not.
    """
    interrupts: list[bool] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(True)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(
    session: Session, text: str, output: Output, interrupts: Sequence[bool] = (), guard: Guard | None = None
) -> None:
    runtime, before = session.runtime, session.runtime.position
    pieces = guarded(guard, text, _until_interrupted(interrupts, session.send(text)))
    try:
        show(runtime, pieces, lambda: session.answer_ids, lambda: session.guesses_refused, output)
    except Violation as violation:
        if violation.answer:
            session.rewind()
        raise
    if before <= runtime.cache.context < runtime.position:
        note_overflow(runtime.cache.context)


def _until_interrupted(interrupts: Sequence[bool], answer: Iterator[str]) -> Iterator[str]:
    for piece in answer:
        yield piece
        if interrupts:
            return
