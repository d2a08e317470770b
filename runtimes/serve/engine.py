"""The queue in front of the one runtime: one answer at a time, in the order of arrival.

The cache is kept between requests, so a conversation costs only its new turn. Requests are read and answered in two threads, so
that the server itself always answers. All methods of `Engine` belong to the thread of the event loop, unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from time import monotonic
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.memory import give_back
from gemma_edge.runtimes.engines.adapter import Adapter
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.constrain import Grammar
from gemma_edge.runtimes.generation.generate import GenerationOptions, GenerationState, Usage
from gemma_edge.runtimes.generation.sampling import Sampler
from gemma_edge.runtimes.generation.text_generator import TextGenerator
from gemma_edge.runtimes.guard import Guard, Violation, guarded
from gemma_edge.runtimes.serve.logprobs import Recorder
from gemma_edge.runtimes.serve.openai import Model, ParsedRequest
from gemma_edge.runtimes.serve.refused import Refused
from gemma_edge.runtimes.serve.responses import CONTENT_FILTER, Piece, Total, finish_reason
from gemma_edge.runtimes.serve.schemas import SPELLINGS
from gemma_edge.runtimes.tools.form import AnswerReader
from gemma_edge.runtimes.tools.forms import form_of
from gemma_edge.runtimes.tools.tool import CallPart
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_WAITING = 32  # requests in the queue
TIME_LIMIT_S = 600.0  # seconds that the answer to one request may take, from the start of its prompt


class Job:
    """One request on its way to an answer."""

    def __init__(self, body: dict[str, Any], *, chat: bool) -> None:
        """Make a job of the event loop that is running."""
        self.body, self.chat = body, chat
        self.total = Total()
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._request: asyncio.Future[ParsedRequest] = self._loop.create_future()
        self._pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()  # None is the end

    async def request(self) -> ParsedRequest:
        """The request, when it has been read.

        Raises:
            InputError, Refused: it gets no answer.
        """
        return await self._request

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes.

        Raises:
            InputError, Refused: it ends here.
        """
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the thread of the event loop. Any thread may do so."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def take(self, what: ParsedRequest | Piece | Exception | None) -> None:
        """Give something to the task that waits for the answer. Only the thread of the event loop may call this."""
        if self.cancelled.is_set():
            return
        if isinstance(what, ParsedRequest):
            self._request.set_result(what)
        elif isinstance(what, Exception) and not self._request.done():
            self._request.set_exception(what)
            self._request.exception()  # asyncio would report an error that nobody waits for
        else:
            self._pieces.put_nowait(what)


class Engine:
    """The one runtime, and the queue of requests that wait for it."""

    def __init__(
        self,
        runtime: Runtime,
        options: GenerationOptions,
        notify: Callable[[str], None] = log.info,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        guard: Guard | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        """Take over a runtime.

        Args:
            runtime: must not be used by anything else from now on.
            options: for what a request leaves open.
            notify: called with one sentence when prompt lookup turns out to be of no use with this runtime.
            time_limit_s: how many seconds an answer may take.
            guard: judges prompts and answers; an answer is then sent when it is complete.
            adapters: requests choose one by the model's name, NAME:ADAPTER.

        Raises:
            InputError: a token-level bundle, an adapter that the runtime cannot take, or two of one name.
        """
        self.runtime, self.options, self.time_limit_s, self.guard = runtime, options, time_limit_s, guard
        tokenizer, template = Tokenizer(runtime.bundle, runtime.manifest), ChatTemplate.from_bundle(runtime.bundle)
        form = form_of(template, tokenizer)
        self.name = runtime.manifest.model.name
        self.adapters = {f"{self.name}:{adapter.manifest.name}": adapter for adapter in adapters}
        if len(self.adapters) < len(adapters):
            raise InputError(
                f"two adapters have the same name, among {', '.join(self.adapters)}",
                field="adapter",
                hint="make one of them again from a folder of another name",
            )
        for adapter in adapters:
            runtime.use_adapter(adapter)  # refuses one of another bundle before any request comes
        self.model = Model(
            tokenizer,
            template,
            form,
            runtime.vocab_size,
            runtime.cache.context,
            self.name,
            tuple(self.adapters),
            pins=runtime.cache.pinned > 0,
        )
        self.generator = TextGenerator(runtime, tokenizer, notify, form)
        self.generator.prepare(options)
        self.created = int(time.time())
        self.counts = dict.fromkeys(
            ("requests", "refused", "cancelled", "prompt_tokens", "cached_tokens", "new_tokens"), 0
        )
        self._jobs: set[Job] = set()  # all that have not ended
        self._waiting: set[Job] = set()
        self._closing = False
        # one thread each, first come, first served
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="answer")

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return len(self._waiting)

    def submit(self, body: dict[str, Any], *, chat: bool) -> Job:
        """Put a request into the queue.

        Args:
            body: its JSON.
            chat: whether it brings messages; else it brings a prompt.

        Raises:
            Refused: the queue is full, or the server is shutting down.
        """
        if self._closing:
            raise _shutting_down()
        if self.waiting >= MAX_WAITING:
            message = f"{self.waiting} requests are waiting already; try again later"
            raise Refused(503, message, headers={"Retry-After": "1"})
        job = Job(body, chat=chat)
        self._jobs.add(job)
        self._waiting.add(job)
        self._reader.submit(self._read, job)
        return job

    def end(self, job: Job) -> None:
        """Forget a job whose answer is complete, or whose client has gone."""
        job.cancelled.set()
        self._jobs.discard(job)
        self._waiting.discard(job)

    def close(self) -> None:
        """End all answers and take no more requests."""
        self._closing = True
        for job in list(self._jobs):
            job.take(_shutting_down())
            self.end(job)

    def _read(self, job: Job) -> None:
        """Read a request. It runs in the thread of the reader."""
        if job.cancelled.is_set():
            return
        try:
            request = ParsedRequest.parse(job.body, chat=job.chat, defaults=self.options, model=self.model)
            # the first grammar takes a second, the next ones some milliseconds
            grammar = self.generator.grammar(request.options)
            if grammar:
                grammar.begin(request.options.max_tokens)
        except Exception as error:  # noqa: BLE001 (the request that waits for the answer raises it)
            job.call(job.take, error)
        else:
            job.call(job.take, request)
            self._writer.submit(self._write, job, request, grammar)
        if any(name in job.body for name in (*SPELLINGS, "tools")):
            give_back()  # compiling a schema may have taken much memory

    def _write(self, job: Job, request: ParsedRequest, grammar: Grammar | None) -> None:
        """Answer a request. It runs in the thread of the writer."""
        if not job.cancelled.is_set():
            job.call(self._waiting.discard, job)
            try:
                self._answer(job, request, grammar)
            except Exception as error:  # noqa: BLE001 (the request that waits for the answer raises it)
                job.call(job.take, error)
        job.call(self._count, job)
        job.call(job.take, None)

    def _count(self, job: Job) -> None:
        self.counts["cancelled"] += job.cancelled.is_set()
        for name in ("prompt_tokens", "cached_tokens", "new_tokens"):
            self.counts[name] += getattr(job.total, name)

    def _answer(self, job: Job, request: ParsedRequest, grammar: Grammar | None) -> None:
        end = monotonic() + self.time_limit_s

        def cancelled() -> bool:
            return job.cancelled.is_set() or monotonic() > end

        self.runtime.use_adapter(self.adapters.get(request.model))
        state = GenerationState(Sampler(request.options.sampling), cancelled=cancelled, grammar=grammar)
        for index in range(request.choices):
            usage = Usage()
            for piece in self._choice(request, index, replace(state, usage=usage, ids=[])):
                job.call(job.take, piece)
            job.total.add(usage, self.model.context, again=index % request.n > 0)

    def _choice(self, request: ParsedRequest, index: int, state: GenerationState) -> Iterator[Piece]:
        """The pieces of one answer."""
        prompt = index // request.n
        ids, recorder = request.prompts[prompt], None
        state.sampler.forget()
        if request.logprobs is not None:
            recorder = Recorder(self.model.tokenizer, request.logprobs)
            state = replace(state, watch=recorder.add)
            if request.echo:
                recorder.add_prompt(self.runtime, ids, state.cancelled)
        if request.echo:
            yield Piece(index, request.echo[prompt], recorder.take() if recorder else ())
        reader = self.model.form.reader(request.options)
        answer: Iterator[str] = self.generator.answer(ids, request.options, state, pinned=request.pinned)
        try:
            for text, calls in _read(guarded(self.guard, request.judged[prompt], answer), reader):
                yield Piece(index, text, recorder.take() if recorder else (), calls=calls)
        except Violation:
            yield Piece(index, "", (), CONTENT_FILTER)
            return
        finish = finish_reason(state.usage, calls=bool(reader.calls))
        yield Piece(index, "", recorder.take() if recorder else (), finish)


def _read(answer: Iterator[str], reader: AnswerReader) -> Iterator[tuple[str, tuple[CallPart, ...]]]:
    """The text and the parts of calls of an answer, as they come."""
    for parts in chain((reader.feed(piece) for piece in answer), (reader.end() for _ in range(1))):
        if parts:
            text = "".join(part for part in parts if isinstance(part, str))
            yield text, tuple(part for part in parts if not isinstance(part, str))


def _shutting_down() -> Refused:
    return Refused(503, "the server is shutting down", headers={"Connection": "close"})
