"""`gemma-run BUNDLE --serve`: an HTTP server that OpenAI's clients take for theirs, and a page to chat with.

One generation at a time, in the order of arrival; the cache is kept between requests, so a conversation costs only its new turn.
What requests may ask is requests.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.constrain import Grammar, Vocabulary
from gemma_edge.runtimes.generation.generate import STOP, Usage, generate
from gemma_edge.runtimes.generation.sampling import SamplingParams
from gemma_edge.runtimes.generation.speculate import Speculation
from gemma_edge.runtimes.serve.openai import Asked, until_stop
from gemma_edge.runtimes.serve.page import PAGE
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BODY = 1 << 20  # bytes of a request
MOST_WAITING = 32  # requests in the queue
MOST_S = 600.0  # one answer may take, after its turn has come


class Refused(Exception):
    """A request that gets an error: the status, and what to say."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Job:
    """One answer on its way."""

    asked: Asked
    grammar: Grammar | None = None
    usage: Usage = field(default_factory=Usage)
    cancelled: threading.Event = field(default_factory=threading.Event)
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)  # None: the end


class Engine:
    """The one runtime, and who uses it when."""

    def __init__(self, runtime: Runtime, params: SamplingParams, speculation: Speculation | None) -> None:
        """Take over a runtime.

        Args:
            runtime: used by nobody else from now on.
            params: for what a request leaves open.
            speculation: of this runtime.

        Raises:
            InputError: a token-level bundle.
        """
        self.runtime, self.params, self.speculation = runtime, params, speculation
        self.tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
        self.template = ChatTemplate.from_bundle(runtime.bundle)
        self.name = runtime.manifest.model.name
        self.created = int(time.time())
        self.waiting = 0
        self.counts = dict.fromkeys(
            ("requests", "refused", "cancelled", "prompt_tokens", "cached_tokens", "new_tokens"), 0
        )
        self._vocabulary: Vocabulary | None = None  # made when it is needed first
        self._turn = asyncio.Lock()  # first come, first served
        self._working: set[asyncio.Task[None]] = set()

    def grammar(self, asked: Asked) -> Grammar | None:
        """What the answer must fit. Takes a second the first time, some milliseconds then.

        Raises:
            InputError: the schema cannot be followed, or not within the request's tokens.
        """
        if asked.schema is None:
            return None
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer, self.runtime.manifest.config.vocab_size)
        grammar = Grammar(self._vocabulary, asked.schema)
        grammar.begin(asked.max_tokens)
        return grammar

    def start(self, asked: Asked, grammar: Grammar | None = None) -> Job:
        """Put an answer into the queue.

        Raises:
            Refused: the queue is full.
        """
        if self.waiting >= MOST_WAITING:
            raise Refused(503, f"{self.waiting} requests are waiting already; try again later")
        job = Job(asked, grammar)
        self.waiting += 1
        task = asyncio.create_task(self._work(job))
        self._working.add(task)  # else nobody holds it
        task.add_done_callback(self._working.discard)
        return job

    async def _work(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with self._turn:
                self.waiting -= 1
                if not job.cancelled.is_set():
                    await run_in_threadpool(
                        self._answer, job, lambda p: loop.call_soon_threadsafe(job.pieces.put_nowait, p)
                    )
        except Exception as error:  # noqa: BLE001 (whoever waits for the answer is told)
            job.pieces.put_nowait(error)
        self.counts["cancelled"] += job.cancelled.is_set()
        for name in ("prompt_tokens", "cached_tokens", "new_tokens"):
            self.counts[name] += getattr(job.usage, name)
        job.pieces.put_nowait(None)

    def _answer(self, job: Job, tell: Callable[[str], object]) -> None:
        """In a thread of its own: the server answers others meanwhile."""
        asked, end = job.asked, monotonic() + MOST_S
        known = self.runtime.align(asked.ids)
        sampler = asked.sampler()
        sampler.observe(asked.ids[:known])
        tokens = generate(
            self.runtime,
            asked.ids[known:],
            sampler,
            max_tokens=asked.max_tokens,
            stop_ids=self.tokenizer.stop_ids,
            usage=job.usage,
            cancelled=lambda: job.cancelled.is_set() or monotonic() > end,
            speculation=self.speculation,
            grammar=job.grammar,
        )
        with contextlib.closing(tokens):  # type: ignore[type-var]
            text = self.tokenizer.stream(tokens)
            for piece, stopped in until_stop(text, asked.stop):
                if piece:
                    tell(piece)
                if stopped:
                    job.usage.finish = STOP
                    return


async def _pieces(request: Request, job: Job) -> AsyncIterator[str]:
    """Text as it comes; ends the job if the client has gone."""
    ended = False
    try:
        while True:
            try:
                piece = await asyncio.wait_for(job.pieces.get(), 1)
            except TimeoutError:
                if await request.is_disconnected():
                    return
                continue
            if piece is None:
                ended = True
                return
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        if not ended:
            job.cancelled.set()


async def _body(request: Request) -> Any:
    """The request's JSON.

    Raises:
        Refused: too long, or no JSON.
    """
    read = b""
    async for part in request.stream():
        read += part
        if len(read) > MOST_BODY:
            raise Refused(413, f"the request is longer than {MOST_BODY} bytes")
    try:
        return json.loads(read)
    except ValueError as error:
        raise Refused(400, f"the request is no JSON: {error}") from None


class Api:
    """The paths, as OpenAI documents them: platform.openai.com/docs/api-reference."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def answer(self, request: Request) -> Response:
        """`/v1/chat/completions` and `/v1/completions`."""
        engine, chat = self.engine, request.url.path.endswith("/chat/completions")
        engine.counts["requests"] += 1
        asked = Asked.of(
            await _body(request), chat=chat, params=engine.params, tokenizer=engine.tokenizer, template=engine.template
        )
        grammar = await run_in_threadpool(engine.grammar, asked) if asked.schema is not None else None
        job = engine.start(asked, grammar)
        shape = _Shape(engine.name, chat)
        if asked.stream:
            return StreamingResponse(_events(request, job, shape), media_type="text/event-stream")
        text = "".join([piece async for piece in _pieces(request, job)])
        return JSONResponse(shape.whole(text, job.usage))

    async def models(self, request: Request) -> Response:
        """`/v1/models`."""
        model = {"id": self.engine.name, "object": "model", "created": self.engine.created, "owned_by": "gemma-edge"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """Whether it runs."""
        return JSONResponse({"status": "ok", "waiting": self.engine.waiting})

    async def metrics(self, request: Request) -> Response:
        """Counters, as Prometheus reads them."""
        stats = self.engine.runtime.stats
        counts = {**self.engine.counts, "prefill_seconds": stats.prefill_s, "decode_seconds": stats.decode_s}
        lines = [f"# TYPE gemma_{name}_total counter\ngemma_{name}_total {count}" for name, count in counts.items()]
        lines.append(f"# TYPE gemma_waiting gauge\ngemma_waiting {self.engine.waiting}")
        return PlainTextResponse("\n".join(lines) + "\n")

    async def page(self, request: Request) -> Response:
        """The chat page."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": policy})


@dataclass(frozen=True)
class _Shape:
    """How an answer is written, whole and in pieces."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, usage: Usage) -> dict[str, Any]:
        """The one object of an answer that is not streamed."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._object("", [{"index": 0, **said, "finish_reason": _reason(usage), "logprobs": None}], _used(usage))

    def piece(self, text: str | None, finish: str | None) -> dict[str, Any]:
        """One event of a stream."""
        said: dict[str, Any] = {"text": text or ""}
        if self.chat:
            said = {"delta": {"role": "assistant", "content": text} if text is not None else {}}
        return self._object(".chunk", [{"index": 0, **said, "finish_reason": finish, "logprobs": None}], None)

    def used(self, usage: Usage) -> dict[str, Any]:
        """The event that a client may ask for at the end."""
        return self._object(".chunk", [], _used(usage))

    def _object(self, suffix: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        head = {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created}
        return {**head, "model": self.model, "choices": choices, "usage": usage}


def _reason(usage: Usage) -> str:
    return "stop" if usage.finish == STOP else "length"  # the API has no name for what ran out of time


def _used(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.new_tokens,
        "total_tokens": usage.prompt_tokens + usage.new_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


async def _events(request: Request, job: Job, shape: _Shape) -> AsyncIterator[str]:
    def event(data: Any) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        async for piece in _pieces(request, job):
            yield event(shape.piece(piece, None))
    except InputError as error:
        yield event({"error": _error(str(error))})
        return
    yield event(shape.piece(None, _reason(job.usage)))
    if job.asked.include_usage:
        yield event(shape.used(job.usage))
    yield "data: [DONE]\n\n"


def _error(message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def application(engine: Engine, hosts: list[str]) -> Starlette:
    """The server; `hosts` are the names it answers to, so that no web page elsewhere can make a browser talk to it."""
    api = Api(engine)

    async def refuse(request: Request, error: Exception) -> Response:
        engine.counts["refused"] += 1
        status = error.status if isinstance(error, Refused) else 400
        return JSONResponse({"error": _error(str(error))}, status)

    kinds: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {Refused: refuse, InputError: refuse}
    routes = [
        Route("/", api.page),
        Route("/v1/chat/completions", api.answer, methods=["POST"]),
        Route("/v1/completions", api.answer, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
    ]
    guard = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, middleware=guard, exception_handlers=kinds)


def serve(engine: Engine, host: str, port: int) -> None:
    """Answer until Ctrl-C.

    Args:
        engine: what answers.
        host: an address; one that is not this machine's own lets everybody on the network in, who may then use any name for it.
        port: 0 takes a free one.
    """
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    config = uvicorn.Config(application(engine, hosts), host=host, port=port, log_level="info", access_log=False)
    uvicorn.Server(config).run()
