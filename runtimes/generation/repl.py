"""A chat on the terminal, line by line. Conversations are session.py's, printing is console.py's."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import click

from gemma_edge.command import note
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.console import Output, note_overflow, show
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.history import History
from gemma_edge.runtimes.generation.line import read_line
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.runtimes.guard import Guard, Violation, guarded
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

HELP = (
    "/undo takes the last turn back, /reset starts over, /save NAME, /load NAME, /list and /delete NAME keep chats,"
    " /quit or Ctrl-D leaves, Ctrl-C stops an answer"
)


def chat(
    runtime: Runtime,
    prompt: str | None,
    options: GenerationOptions,
    output: Output,
    *,
    prefix: str = "",
    guard: Guard | None = None,
    resume: str | None = None,
) -> None:
    """Answer one turn, or the turns that stdin holds, one on each line.

    Args:
        runtime: computes the answers.
        prompt: the one turn; None reads stdin until it ends.
        options: how to generate.
        output: what to print beside an answer.
        prefix: text in front of the first turn.
        guard: judges turns and answers. What it refuses is not printed and leaves no trace in the conversation.
        resume: the name of a saved chat to go on with; empty takes the one that was saved last, None begins a new one.

    Raises:
        InputError: a bundle without a tokenizer, a turn that cannot be taken, or input that is not UTF-8; with `prompt` also
            a text that the guard refuses.
    """
    tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
    template = ChatTemplate.from_bundle(runtime.bundle)
    session = Session(runtime, tokenizer, template, options, prefix=prefix, notify=note)
    commands = _Commands(session)
    if resume is not None:
        commands.load(resume)
    if prompt is not None:
        _answer(session, prompt, output, guard=guard)
        return
    if sys.stdin.isatty():
        click.echo(HELP, err=True)
    while (line := read_line(HELP)) is not None:
        text = line.strip()
        if text == "/quit":
            break
        if not commands.run(text) and text:
            with _stop_on_interrupt() as interrupts:
                try:
                    _answer(session, text, output, interrupts, guard)
                except Violation as violation:
                    note(str(violation))


class _Commands:
    """What a line that begins with a slash does."""

    def __init__(self, session: Session) -> None:
        self._session, self._history, self._name = session, History(), ""

    def run(self, text: str) -> bool:
        """Run a command; False if the text is none of them."""
        word, _, name = text.partition(" ")
        plain: dict[str, Callable[[], None]] = {"/reset": self._reset, "/undo": self._undo, "/list": self._list}
        named: dict[str, Callable[[str], None]] = {"/save": self._save, "/load": self.load, "/delete": self._delete}
        if text in plain:
            plain[text]()
        elif word in named:
            try:
                named[word](name.strip())
            except InputError as error:  # the chat goes on
                note(str(error))
        else:
            return False
        return True

    def load(self, name: str) -> None:
        """Go on with a saved chat."""
        self._name = self._history.load(self._session, name)
        note(f"{self._name}: {len(self._session.messages)} messages")

    def _reset(self) -> None:
        self._session.reset()
        self._name = ""
        note("a new conversation")

    def _undo(self) -> None:
        self._session.rewind(1)
        note("the last turn is taken back")

    def _list(self) -> None:
        for chat in self._history.list():
            click.echo(str(chat), err=True)

    def _save(self, name: str) -> None:
        self._name = name or self._name
        self._history.save(self._session, self._name)
        note(f"saved as {self._name}")

    def _delete(self, name: str) -> None:
        self._history.delete(name)
        note(f"{name} is deleted")


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
