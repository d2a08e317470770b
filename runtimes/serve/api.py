"""The paths of the server: OpenAI's, counters, and the chat page. The form of requests and responses is openai.py's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gemma_edge.errors import InputError
from gemma_edge.runtimes.serve.engine import Engine, Job, Refused
from gemma_edge.runtimes.serve.openai import ParsedRequest, ResponseForm, error_body, finish_reason

MAX_BODY_BYTES = 1 << 20  # the longest request
PAGE_FILE = "page.html"
# The page fetches nothing from elsewhere.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@cache
def chat_page() -> str:
    """The chat page's HTML."""
    return (files(__package__) / PAGE_FILE).read_text(encoding="utf-8")


async def _pieces(request: Request, job: Job) -> AsyncIterator[str]:
    """The answer's text as it comes; ends the job if the client has gone."""
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
        Refused: the request is too long, or no JSON.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body)
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
        parsed = ParsedRequest.parse(
            await _body(request),
            chat=chat,
            defaults=engine.options,
            tokenizer=engine.tokenizer,
            template=engine.template,
        )
        has_schema = parsed.options.json_schema is not None
        grammar = await run_in_threadpool(engine.grammar, parsed) if has_schema else None
        job = engine.start(parsed, grammar)
        form = ResponseForm(engine.name, chat)
        if parsed.stream:
            return StreamingResponse(_events(request, job, form), media_type="text/event-stream")
        text = "".join([piece async for piece in _pieces(request, job)])
        return JSONResponse(form.whole(text, job.usage))

    async def models(self, request: Request) -> Response:
        """`/v1/models`."""
        model = {"id": self.engine.name, "object": "model", "created": self.engine.created, "owned_by": "gemma-edge"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """`/health`: whether the server runs."""
        return JSONResponse({"status": "ok", "waiting": self.engine.waiting})

    async def metrics(self, request: Request) -> Response:
        """`/metrics`: counters, as Prometheus reads them."""
        stats = self.engine.runtime.stats
        counts = {**self.engine.counts, "prefill_seconds": stats.prefill_s, "decode_seconds": stats.decode_s}
        lines = [f"# TYPE gemma_{name}_total counter\ngemma_{name}_total {count}" for name, count in counts.items()]
        lines.append(f"# TYPE gemma_waiting gauge\ngemma_waiting {self.engine.waiting}")
        return PlainTextResponse("\n".join(lines) + "\n")

    async def page(self, request: Request) -> Response:
        """`/`: the chat page."""
        return HTMLResponse(chat_page(), headers={"Content-Security-Policy": PAGE_POLICY})


async def _events(request: Request, job: Job, form: ResponseForm) -> AsyncIterator[str]:
    def event(data: Any) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        async for piece in _pieces(request, job):
            yield event(form.piece(piece, None))
    except InputError as error:
        yield event({"error": error_body(str(error))})
        return
    yield event(form.piece(None, finish_reason(job.usage)))
    if job.request.include_usage:
        yield event(form.usage(job.usage))
    yield "data: [DONE]\n\n"


def application(engine: Engine, hosts: list[str]) -> Starlette:
    """The server.

    Args:
        engine: what answers.
        hosts: the host names that requests may use, "*" for any.
    """
    api = Api(engine)

    async def refuse(request: Request, error: Exception) -> Response:
        engine.counts["refused"] += 1
        status = error.status if isinstance(error, Refused) else 400
        return JSONResponse({"error": error_body(str(error))}, status)

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
