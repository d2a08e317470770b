"""The queue in front of the one runtime: one answer at a time, in the order of arrival.

The cache is kept between requests, so a conversation costs only its new turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from starlette.concurrency import run_in_threadpool

from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.constrain import Grammar
from gemma_edge.runtimes.generation.generate import GenerationOptions, GenerationState, Usage
from gemma_edge.runtimes.generation.sampling import Sampler
from gemma_edge.runtimes.generation.text_generator import TextGenerator
from gemma_edge.runtimes.serve.openai import ParsedRequest
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_WAITING = 32  # requests in the queue
MAX_ANSWER_S = 600.0  # seconds that one answer may take, from the start of its prompt


class Refused(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status  # HTTP's


@dataclass
class Job:
    """One answer on its way."""

    request: ParsedRequest
    grammar: Grammar | None = None
    usage: Usage = field(default_factory=Usage)
    cancelled: threading.Event = field(default_factory=threading.Event)
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)  # None is the end


class Engine:
    """The one runtime, and the queue of answers that wait for it."""

    def __init__(self, runtime: Runtime, options: GenerationOptions, notify: Callable[[str], None] = log.info) -> None:
        """Take over a runtime.

        Args:
            runtime: must not be used by anything else from now on.
            options: for what a request leaves open.
            notify: called with one sentence when prompt lookup turns out to be of no use with this runtime.

        Raises:
            InputError: a token-level bundle.
        """
        self.runtime, self.options = runtime, options
        self.tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
        self.template = ChatTemplate.from_bundle(runtime.bundle)
        self.generator = TextGenerator(runtime, self.tokenizer, notify)
        self.generator.prepare(options)
        self.name = runtime.manifest.model.name
        self.created = int(time.time())
        self.waiting = 0
        self.counts = dict.fromkeys(
            ("requests", "refused", "cancelled", "prompt_tokens", "cached_tokens", "new_tokens"), 0
        )
        self._turn = asyncio.Lock()  # first come, first served
        self._tasks: set[asyncio.Task[None]] = set()

    def grammar(self, request: ParsedRequest) -> Grammar | None:
        """The grammar that the answer must fit. The first one takes a second, the next ones some milliseconds.

        Raises:
            InputError: the schema cannot be followed, or not within the request's tokens.
        """
        grammar = self.generator.grammar(request.options)
        if grammar:
            grammar.begin(request.options.max_tokens)
        return grammar

    def start(self, request: ParsedRequest, grammar: Grammar | None = None) -> Job:
        """Put an answer into the queue.

        Raises:
            Refused: the queue is full.
        """
        if self.waiting >= MAX_WAITING:
            raise Refused(503, f"{self.waiting} requests are waiting already; try again later")
        job = Job(request, grammar)
        self.waiting += 1
        task = asyncio.create_task(self._work(job))
        self._tasks.add(task)  # asyncio itself keeps no reference to it
        task.add_done_callback(self._tasks.discard)
        return job

    async def _work(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with self._turn:
                self.waiting -= 1
                if not job.cancelled.is_set():
                    await run_in_threadpool(
                        self._answer, job, lambda piece: loop.call_soon_threadsafe(job.pieces.put_nowait, piece)
                    )
        except Exception as error:  # noqa: BLE001 (the request that waits for the answer raises it)
            job.pieces.put_nowait(error)
        self.counts["cancelled"] += job.cancelled.is_set()
        for name in ("prompt_tokens", "cached_tokens", "new_tokens"):
            self.counts[name] += getattr(job.usage, name)
        job.pieces.put_nowait(None)

    def _answer(self, job: Job, send: Callable[[str], object]) -> None:
        """Generate one answer. It runs in a thread of its own, so that the server answers other requests meanwhile."""
        end = monotonic() + MAX_ANSWER_S
        options = job.request.options
        state = GenerationState(
            Sampler(options.sampling),
            usage=job.usage,
            cancelled=lambda: job.cancelled.is_set() or monotonic() > end,
            grammar=job.grammar,
        )
        for piece in self.generator.answer(job.request.ids, options, state):
            send(piece)
