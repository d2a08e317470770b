"""A conversation on one runtime. The cache is kept between turns, so a turn costs only its own tokens."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

from gemma_edge.runtimes.base import Runtime, open_runtime
from gemma_edge.runtimes.chat import ChatTemplate
from gemma_edge.runtimes.generate import generate, note_tokens
from gemma_edge.runtimes.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.tokenizer import Tokenizer


class Session:
    """A chat. `ids` is what the cache holds, always exactly the tokens fed since the last reset."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        params: SamplingParams | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Begin with an empty conversation, whatever the runtime saw before.

        Args:
            runtime: used by this session alone until it is dropped.
            tokenizer, template: of the same bundle.
            params: None is greedy.
            strict: refuse a turn that does not fit in the context, instead of forgetting the oldest tokens.
        """
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.template = template
        self.strict = strict
        self._sampler = Sampler(params or SamplingParams())
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []  # in the cache
        self._pending: list[int] = []  # said, but not fed yet
        self._held: tuple[str, ...] = ()  # the text of both, in the ways a template may write it
        self._answer_ids: list[int] = []
        self._answer: Generator[str, None, None] = _nothing()

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
        """Tokens fed since the last reset."""
        return tuple(self._ids)

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Tokens of the last answer, without the stop token."""
        return tuple(self._answer_ids)

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The conversation so far."""
        return tuple(dict(message) for message in self._messages)

    def reset(self) -> None:
        """Start a new conversation."""
        self._answer.close()
        self._messages = []
        self._forget()

    def send(self, text: str, *, max_tokens: int = 512) -> Iterator[str]:
        """Say something and return the answer, an iterator of pieces of text.

        Closing it, or sending the next turn, ends an answer early; what was said so far then stands.

        Args:
            text: the user's turn.
            max_tokens: most tokens of the answer.

        Raises:
            InputError: at once, if the template or `strict` refuses the turn; the conversation is then as before.
        """
        self._answer.close()
        asked = [*self._messages, {"role": "user", "content": text}]
        prompt = self.template.render(asked)
        ids = self._to_feed(prompt)
        tokens = generate(
            self.runtime,
            ids,
            self._sampler,
            max_tokens=max_tokens,
            stop_ids=self.tokenizer.stop_ids,
            strict=self.strict,
        )
        self._answer = self._run(asked, prompt, ids, tokens)
        return self._answer

    def _run(
        self, asked: list[dict[str, str]], prompt: str, ids: list[int], tokens: Iterator[int]
    ) -> Generator[str, None, None]:
        start = self.runtime.position
        self._answer_ids = []
        answer = ""
        # True where the cache is known: not while a token is being computed
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
                turn = [*ids, *self._answer_ids]
                fed = self.runtime.position - start
                self._ids += turn[:fed]
                self._pending = turn[fed:]
                self._messages = [*asked, {"role": "assistant", "content": answer}]
                # Gemma's template trims an answer; the blanks around it stay in the cache, where the model wrote them
                self._held = (prompt + answer, prompt + answer.strip())
            else:
                self._forget()

    def _to_feed(self, prompt: str) -> list[int]:
        """The tokens of `prompt` that the cache does not hold yet."""
        for held in self._held:
            # another position: someone else used the runtime meanwhile
            if prompt.startswith(held) and self.runtime.position == len(self._ids):
                return [*self._pending, *self.tokenizer.encode(prompt.removeprefix(held), bos=False)]
        self._forget()
        return self.tokenizer.encode(prompt)

    def _forget(self) -> None:
        """Empty the cache; the conversation stays and is fed again with the next turn."""
        self.runtime.reset()
        self._sampler.forget()
        self._ids = []
        self._pending = []
        self._held = ()


def _nothing() -> Generator[str, None, None]:
    yield from ()
