"""A conversation on one runtime. The cache is kept between turns, so a turn costs only its own tokens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.bundle.codec import KeyProblem, convert
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.adapter import Adapter
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.runtimes.engines.state import read_state, write_state
from gemma_edge.runtimes.generation.generate import GenerationOptions, GenerationState, Usage
from gemma_edge.runtimes.generation.sampling import Sampler
from gemma_edge.runtimes.generation.text_generator import TextGenerator
from gemma_edge.runtimes.generation.turn import OTHER_WORDS, Turn, beginning, ids_after
from gemma_edge.runtimes.tools.form import AnswerReader, Message
from gemma_edge.runtimes.tools.forms import form_of
from gemma_edge.runtimes.tools.tool import Call, compact
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class _Saved:
    """The notes of a saved session."""

    said: tuple[Turn, ...]
    before: str


class Session:
    """A chat. `ids` is what the cache holds: always exactly the tokens fed since the last reset.

    Several sessions may share a runtime, as `fork` makes them. A session then feeds its own text again from the place where it
    differs from what the cache holds.

    Attributes:
        options: how answers are generated, unless a turn brings its own.
        prefix: the text in front of the first turn.
        adapter: computes the answers together with the bundle; None: the bundle alone does.
        pin_system: whether the beginning stays visible beyond the context.
        usage: the cost of the last answer.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        options: GenerationOptions | None = None,
        *,
        prefix: str = "",
        adapter: Adapter | None = None,
        pin_system: bool = True,
        notify: Callable[[str], None] = log.info,
    ) -> None:
        """Begin with an empty conversation, whatever the runtime has seen before.

        Args:
            runtime: used by one session at a time, in one thread at a time.
            tokenizer, template: those of the runtime's bundle.
            options: how to generate; None for `GenerationOptions()`.
            prefix: text in front of the first turn, because Gemma has no turn of the system's own.
            adapter: computes the answers together with the bundle; None takes the one that the runtime has now, if any.
                Sessions with different ones may share a runtime.
            pin_system: whether the model goes on seeing what stands before the user's own words, such as `prefix` and tools, when
                the conversation is longer than the context. The bundle must keep so many tokens.
            notify: called with one sentence when prompt lookup turns out to be of no use with this runtime.

        Raises:
            InputError: the schema in `options` cannot be followed, or the runtime cannot take the adapter.
        """
        self.adapter = adapter or runtime.adapter
        runtime.use_adapter(self.adapter)
        self.runtime, self.tokenizer, self.template = runtime, tokenizer, template
        self.options = options or GenerationOptions()
        self.prefix, self.pin_system = prefix, pin_system
        self.usage = Usage()
        self._form = form_of(template, tokenizer)
        self._generator = TextGenerator(runtime, tokenizer, notify, self._form)
        self._generator.prepare(self.options)
        self._generator.grammar(self.options)
        self._sampler = Sampler(self.options.sampling)
        self._turns = [Turn()]  # the conversation after each turn, the newest last
        self._answer_ids: list[int] = []
        self._answer: Generator[str, None, None] = _nothing()
        self._cancelled = threading.Event()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        options: GenerationOptions | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
        accelerator: str | None = None,
        adapter: str | Path | None = None,
        pin_system: bool = True,
    ) -> Session:
        """Open a bundle and start a conversation.

        Args:
            bundle: the bundle's folder.
            options: how to generate; None for `GenerationOptions()`.
            backend, threads, accelerator, adapter: as in `gemma_edge.load`.
            pin_system: as in `Session`.

        Raises:
            InputError: as `gemma_edge.load`; also for a bundle without a tokenizer.
        """
        runtime = open_runtime(bundle, backend=backend, threads=threads, accelerator=accelerator)
        tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
        opened = Adapter.open(adapter) if adapter is not None else None
        template = ChatTemplate.from_bundle(runtime.bundle)
        return cls(runtime, tokenizer, template, options, adapter=opened, pin_system=pin_system)

    @property
    def guesses_refused(self) -> bool:
        """Whether `options.speculate` is set and this runtime computes other bits for several tokens at once."""
        return self._generator.guesses_refused(self.options)

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens fed since the last reset; in a very long conversation only the last thousands."""
        return tuple(self.runtime.ids)

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Tokens of the last answer so far, without the stop token."""
        return tuple(self._answer_ids)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls in the last answer that is complete. Give their results to `reply`."""
        said = self._turns[-1].messages[-1:]
        return tuple(Call.of_json(call) for message in said for call in message.get("tool_calls", ()))

    @property
    def messages(self) -> Messages:
        """The conversation so far."""
        return tuple(dict(message) for message in self._turns[-1].messages)

    def reset(self) -> None:
        """Start a new conversation."""
        self._answer.close()
        self._turns = [Turn()]
        self._sampler.forget()
        self.runtime.use_adapter(self.adapter)
        self.runtime.reset()

    def rewind(self, turns: int = 1) -> None:
        """Take back the last turns, each a question and its answer.

        Raises:
            InputError: `turns` is below 0 or above the number of turns.
        """
        self._answer.close()
        if not 0 <= turns < len(self._turns):
            raise InputError(
                f"cannot take back {turns} turns: the conversation has {len(self._turns) - 1}",
                field="turns",
                value=turns,
            )
        del self._turns[len(self._turns) - turns :]

    def fork(self) -> Session:
        """A second conversation that goes on from here, on the same runtime; each then costs what the two do not share."""
        self._answer.close()
        other = copy(self)
        other.usage = Usage()
        other._sampler = deepcopy(self._sampler)
        other._turns = list(self._turns)
        other._answer_ids, other._answer = [], _nothing()
        other._cancelled = threading.Event()
        return other

    def cancel(self) -> None:
        """End the answer that is being computed, after the token or the part of the prompt in work. Any thread may call it."""
        self._cancelled.set()

    def save(self, path: str | Path) -> None:
        """Write the conversation and the cache to one file, for `restore`.

        Raises:
            InputError: the file cannot be written.
        """
        self._answer.close()
        self.runtime.use_adapter(self.adapter)
        turns: list[dict[str, Any]] = [
            {"messages": turn.messages, "ids": turn.ids, "texts": turn.texts} for turn in self._turns
        ]
        write_state(Path(path), self.runtime.snapshot(), {"said": turns, "before": self.prefix})

    def restore(self, path: str | Path) -> None:
        """Go on with a saved conversation; none of it is fed again.

        Raises:
            InputError: the file is missing, damaged, or of another bundle or backend; the conversation is then as before.
        """
        self._answer.close()
        state, notes = read_state(Path(path))
        try:
            saved = convert(notes, _Saved)
        except KeyProblem:
            raise InputError(f"{path} holds no conversation; make one with Session.save") from None
        turns, limit = list(saved.said), self.runtime.vocab_size
        if not turns or any(not 0 <= token < limit for turn in turns for token in turn.ids):
            raise InputError(f"{path} is damaged: its conversation does not belong to this bundle; make it again")
        self.runtime.use_adapter(self.adapter)
        self.runtime.restore(state)
        self._turns, self.prefix = turns, saved.before
        self._sampler.forget()
        self._sampler.observe(turns[-1].ids)

    def send(self, text: str, options: GenerationOptions | None = None) -> Iterator[str]:
        """Add the user's turn and return the answer, an iterator of pieces of text.

        Closing the iterator, `cancel`, or the next turn ends an answer early; the text up to there then stays in the
        conversation. Calls of `options.tools` are no part of the text: they are in `calls` when the answer is complete.

        Args:
            text: the user's turn.
            options: for this turn alone; None takes `self.options`. Another `sampling` begins its random numbers anew.

        Raises:
            InputError: at once, if the template or the options refuse the turn; the conversation is then as before.
        """
        self._answer.close()
        content = text if self._turns[-1].messages else self.prefix + text
        return self._go_on([{"role": "user", "content": content}], options)

    def reply(self, results: Sequence[Any], options: GenerationOptions | None = None) -> Iterator[str]:
        """Give the results of `calls` to the model and return its next answer, as `send` does.

        Args:
            results: one for each call, in their order: a text, or whatever JSON can hold.
            options: as in `send`.

        Raises:
            InputError: as `send`; also if there are more or fewer results than calls.
        """
        self._answer.close()
        calls = self.calls
        if not calls or len(results) != len(calls):
            raise InputError(
                f"the last answer holds {len(calls)} calls, and {len(results)} results were given",
                field="results",
                hint="give one result for each call",
            )
        texts = [result if isinstance(result, str) else compact(result) for result in results]
        pairs = zip(calls, texts, strict=True)
        return self._go_on([{"role": "tool", "name": call.name, "content": text} for call, text in pairs], options)

    def _go_on(self, new: Sequence[Message], options: GenerationOptions | None) -> Iterator[str]:
        """Add messages, and return the answer to them."""
        self._cancelled.clear()
        options = options or self.options
        last = self._turns[-1]
        messages = (*last.messages, *new)
        prompt = self._form.render(self.template, messages, options.tools)
        ids = ids_after(last, prompt, self.tokenizer.encode)
        if self._sampler.params != options.sampling:
            self._sampler = Sampler(options.sampling)
        self._sampler.forget()
        state = GenerationState(self._sampler, cancelled=self._cancelled.is_set)
        self.usage, self._answer_ids = state.usage, state.ids
        self.runtime.use_adapter(self.adapter)
        pieces = self._generator.answer(ids, options, state, pinned=self._beginning(ids, prompt, options))
        question = Turn(messages, tuple(ids), (prompt,))
        self._answer = self._run(question, pieces, self._form.reader(options), state.ids, cut=bool(options.stop))
        return self._answer

    def _run(
        self,
        question: Turn,
        pieces: Generator[str, None, None],
        reader: AnswerReader,
        answer_ids: list[int],
        *,
        cut: bool,
    ) -> Generator[str, None, None]:
        answer = text = ""
        # False while a token is being computed: if that is interrupted, the turn is forgotten
        settled = False
        try:
            for piece in pieces:
                answer += piece
                settled = True
                for part in reader.feed(piece):
                    if isinstance(part, str):
                        text += part
                        yield part
                settled = False
            settled = True
            rest = "".join(part for part in reader.end() if isinstance(part, str))
            text += rest
            if rest:
                yield rest
        finally:
            pieces.close()
            if settled:
                calls = [call.as_json() for call in reader.calls]
                said: Message = {"role": "assistant", "content": text if calls else answer}
                if calls:
                    said["tool_calls"] = calls
                self._turns.append(self._answered(question, said, answer, answer_ids, cut=cut))

    def _answered(self, question: Turn, said: Message, answer: str, answer_ids: list[int], *, cut: bool) -> Turn:
        """The conversation after the answer; `cut` says that a stop text may have shortened it."""
        messages = (*question.messages, said)
        if cut and "".join(self.tokenizer.stream(answer_ids)) != answer:
            return Turn(
                messages, question.ids, question.texts
            )  # the tokens of the stop text are not the conversation's
        (prompt,) = question.texts
        # Gemma's template trims an answer; the blanks around it stay in the cache, where the model wrote them
        return Turn(messages, (*question.ids, *answer_ids), (prompt + answer, prompt + answer.strip()))

    def _beginning(self, ids: Sequence[int], prompt: str, options: GenerationOptions) -> int:
        """How many tokens to pin."""
        if not (self.pin_system and self.runtime.cache.pinned):
            return 0
        said: Message = {"role": "user", "content": self.prefix + OTHER_WORDS}
        return beginning(ids, prompt, self._form.render(self.template, [said], options.tools), self.tokenizer.encode)


def _nothing() -> Generator[str, None, None]:
    yield from ()
