"""A conversation on one runtime. The cache is kept between turns, so a turn costs only its own tokens."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.runtimes.engines.state import read_state, write_state
from gemma_edge.runtimes.generation.constrain import Grammar
from gemma_edge.runtimes.generation.generate import Usage, generate, note_tokens
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.speculate import Speculation
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class _Said:
    """The conversation at the end of a turn."""

    messages: Messages = ()
    ids: tuple[int, ...] = ()  # as the model read and wrote them; the last one may not be fed yet
    texts: tuple[str, ...] = ()  # of these ids, in the ways a template may write them


class Session:
    """A chat. `ids` is what the cache holds, always exactly the tokens fed since the last reset.

    Several sessions may share a runtime, as `fork` makes them: each takes up from where its own text and the cache's part.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        params: SamplingParams | None = None,
        *,
        strict: bool = False,
        prefix: str = "",
        speculation: Speculation | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        """Begin with an empty conversation, whatever the runtime saw before.

        Args:
            runtime: used by one session at a time, in one thread at a time.
            tokenizer, template: of the same bundle.
            params: None is greedy.
            strict: refuse a turn that does not fit in the context, instead of forgetting the oldest tokens.
            prefix: text in front of the first turn: Gemma 2 has no system message.
            speculation: of this runtime.
            grammar: what every answer must fit, of this bundle's vocabulary.
        """
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.template = template
        self.strict = strict
        self.prefix = prefix
        self.speculation = speculation
        self.grammar = grammar
        self.usage = Usage()  # of the last answer
        self._sampler = Sampler(params or SamplingParams())
        self._said = [_Said()]  # after each turn, the newest last
        self._answer_ids: list[int] = []
        self._answer: Generator[str, None, None] = _nothing()
        self._cancelled = threading.Event()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        params: SamplingParams | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
        strict: bool = False,
    ) -> Session:
        """Open a bundle and start a conversation; the arguments are those of `gemma_edge.load` and `Session`."""
        runtime = open_runtime(bundle, backend=backend, threads=threads)
        tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
        return cls(runtime, tokenizer, ChatTemplate.from_bundle(runtime.bundle), params, strict=strict)

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens fed since the last reset; in a very long conversation only the last thousands."""
        return tuple(self.runtime.ids)

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Tokens of the last answer, without the stop token."""
        return tuple(self._answer_ids)

    @property
    def messages(self) -> Messages:
        """The conversation so far."""
        return tuple(dict(message) for message in self._said[-1].messages)

    def reset(self) -> None:
        """Start a new conversation."""
        self._answer.close()
        self._said = [_Said()]
        self._sampler.forget()
        self.runtime.reset()

    def rewind(self, turns: int = 1) -> None:
        """Take back the last turns, each a question and its answer.

        Raises:
            InputError: fewer than none, or more than there are.
        """
        self._answer.close()
        if not 0 <= turns < len(self._said):
            raise InputError(f"cannot take back {turns} turns: the conversation has {len(self._said) - 1}")
        del self._said[len(self._said) - turns :]

    def fork(self) -> Session:
        """A second conversation that goes on from here, on the same runtime; both then cost what they do not share."""
        self._answer.close()
        other = Session(
            self.runtime,
            self.tokenizer,
            self.template,
            strict=self.strict,
            prefix=self.prefix,
            speculation=self.speculation,
            grammar=self.grammar,
        )
        other._sampler = deepcopy(self._sampler)
        other._said = list(self._said)
        return other

    def cancel(self) -> None:
        """End the answer that is being computed, from any thread: after the token, or the piece of the prompt, in work."""
        self._cancelled.set()

    def save(self, path: str | Path) -> None:
        """Write conversation and cache to one file, for `restore`.

        Raises:
            InputError: it cannot be written.
        """
        self._answer.close()
        said: list[dict[str, Any]] = [
            {"messages": turn.messages, "ids": turn.ids, "texts": turn.texts} for turn in self._said
        ]
        write_state(Path(path), self.runtime.snapshot(), {"said": said, "before": self.prefix})

    def restore(self, path: str | Path) -> None:
        """Take up a conversation where it was saved, nothing fed again.

        Raises:
            InputError: no such file, damaged, or of another bundle or backend; the conversation is then as before.
        """
        self._answer.close()
        state, notes = read_state(Path(path))
        try:
            turns = [_Said(tuple(turn["messages"]), tuple(turn["ids"]), tuple(turn["texts"])) for turn in notes["said"]]
            prefix = str(notes["before"])
        except (KeyError, TypeError):
            raise InputError(f"{path} holds no conversation; make one with Session.save") from None
        self.runtime.restore(state)
        self._said, self.prefix = turns, prefix
        self._sampler.forget()
        self._sampler.observe(turns[-1].ids)

    def send(self, text: str, *, max_tokens: int = 512) -> Iterator[str]:
        """Say something and return the answer, an iterator of pieces of text.

        Closing it, cancelling, or sending the next turn, ends an answer early; what was said so far then stands.

        Args:
            text: the user's turn.
            max_tokens: most tokens of the answer.

        Raises:
            InputError: at once, if the template or `strict` refuses the turn; the conversation is then as before.
        """
        self._answer.close()
        self._cancelled.clear()
        said = self._said[-1]
        content = text if said.messages else self.prefix + text
        asked = (*said.messages, {"role": "user", "content": content})
        prompt = self.template.render(asked)
        ids = self._ids_of(prompt, said)
        known = self.runtime.align(ids)
        self._sampler.forget()
        self._sampler.observe(ids[:known])
        self.usage = Usage()
        tokens = generate(
            self.runtime,
            ids[known:],
            self._sampler,
            max_tokens=max_tokens,
            stop_ids=self.tokenizer.stop_ids,
            strict=self.strict,
            usage=self.usage,
            cancelled=self._cancelled.is_set,
            speculation=self.speculation,
            grammar=self.grammar,
        )
        self._answer = self._run(asked, prompt, ids, tokens)
        return self._answer

    def _run(self, asked: Messages, prompt: str, ids: list[int], tokens: Iterator[int]) -> Generator[str, None, None]:
        self._answer_ids = []
        answer = ""
        # False where a token is being computed: a turn interrupted there is as if it had not been
        settled = False
        try:
            for piece in self.tokenizer.stream(note_tokens(tokens, self._answer_ids)):
                answer += piece
                settled = True
                yield piece
                settled = False
            settled = True
        finally:
            if settled:
                # Gemma's template trims an answer; the blanks around it stay in the cache, where the model wrote them
                texts = (prompt + answer, prompt + answer.strip())
                messages = (*asked, {"role": "assistant", "content": answer})
                self._said.append(_Said(messages, (*ids, *self._answer_ids), texts))

    def _ids_of(self, prompt: str, said: _Said) -> list[int]:
        """The whole conversation as tokens; what was said before as the model saw it."""
        for text in said.texts:
            if prompt.startswith(text):
                return [*said.ids, *self.tokenizer.encode(prompt.removeprefix(text), bos=False)]
        return self.tokenizer.encode(prompt)


def _nothing() -> Generator[str, None, None]:
    yield from ()
