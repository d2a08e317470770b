"""The paths of the server: OpenAI's, counters, the chat page, and what that page runs. What a request may hold is openai.py's."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gemma_edge.bundle.manifest import confined
from gemma_edge.errors import InputError
from gemma_edge.runtimes.serve.access import FILES, Access, Checked
from gemma_edge.runtimes.serve.body import Gone, read_body
from gemma_edge.runtimes.serve.engine import Engine, Job
from gemma_edge.runtimes.serve.openai import ParsedRequest
from gemma_edge.runtimes.serve.refused import Refused, error_body, error_response, shown
from gemma_edge.runtimes.serve.responses import ResponseForm
from gemma_edge.runtimes.web.site import page_files

log = logging.getLogger(__name__)

PAGE_FILE = "page.html"
# The page and its workers fetch nothing from elsewhere, send nothing elsewhere, and cannot be put into a page of another
# site. They are isolated from other origins: only then WebAssembly has threads.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
NO_PAGE = "this bundle runs in no page; gemma-export MODEL --target web makes one that does"


@cache
def chat_page() -> str:
    """The chat page's HTML."""
    return (files(__package__) / PAGE_FILE).read_text(encoding="utf-8")


class Answers:
    """`/v1/chat/completions` or `/v1/completions`. The answer ends when the client goes away."""

    def __init__(self, engine: Engine, *, chat: bool) -> None:
        """Answer messages, or prompts."""
        self.engine, self.chat = engine, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            InputError, Refused: the request gets an error instead of an answer.
        """
        self.engine.counts["requests"] += 1
        try:
            body = await read_body(Request(scope, receive))
        except Gone:
            return
        job = self.engine.submit(body, chat=self.chat)
        answer = asyncio.create_task(self._answer(job, scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            self.engine.end(job)
            for task in (answer, gone):
                task.cancel()

    async def _answer(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        request = await job.request()
        form = ResponseForm(request.model, self.chat, request.logprobs is not None)
        if request.stream:
            await _stream(job, request, form, send)
            return
        pieces = [piece async for piece in job.pieces()]
        await JSONResponse(form.whole(pieces, job.total))(scope, receive, send)


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(job: Job, request: ParsedRequest, form: ResponseForm, send: Send) -> None:
    """Send the answer as server-sent events."""

    async def event(data: Any) -> None:
        text = f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await asyncio.sleep(0)  # other tasks run meanwhile, among them the one that notices when the client goes away

    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        for choice in range(request.choices if form.chat else 0):
            await event(form.role(choice))
        async for piece in job.pieces():
            await event(form.piece(piece))
    except (InputError, Refused) as error:
        await event({"error": error_body(error)})
    else:
        if request.include_usage:
            await event(form.usage(job.total))
        await event("[DONE]")
    await send({"type": "http.response.body", "body": b""})


class Api:
    """The other paths, as OpenAI documents them: platform.openai.com/docs/api-reference."""

    def __init__(self, engine: Engine, access: Access) -> None:
        self.engine, self.access = engine, access
        self.page_files, self.no_page = {}, NO_PAGE
        try:
            self.page_files = page_files(engine.runtime.bundle, engine.runtime.manifest)
        except InputError as error:  # the server itself runs none of it
            self.no_page = str(error)
            log.warning("%s", error)

    async def models(self, request: Request) -> Response:
        """`/v1/models`."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._names()]})

    async def one_model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        name = request.path_params["name"]
        if name not in self._names():
            there = ", ".join(map(repr, self._names()))
            raise Refused(404, f"there is no model {name!r}; this server has {there}", param="model")
        return JSONResponse(self._model(name))

    def _names(self) -> list[str]:
        return [self.engine.name, *self.engine.adapters]

    def _model(self, name: str) -> dict[str, Any]:
        page = {"page_files": FILES.lstrip("/")} if self.page_files and name == self.engine.name else {}
        return {"id": name, "object": "model", "created": self.engine.created, "owned_by": "gemma-edge", **page}

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
        return HTMLResponse(chat_page(), headers=PAGE_HEADERS)

    async def page_file(self, request: Request) -> Response:
        """`/web/NAME`: a file of the bundle, for the page that runs the model."""
        name = request.path_params["name"]
        if name not in self.page_files:
            raise Refused(404, f"the page fetches no file {shown(name)}" if self.page_files else self.no_page)
        file, kind = confined(self.engine.runtime.bundle, name), self.page_files[name]
        response = FileResponse(file, media_type=kind, headers={**PAGE_HEADERS, "Cache-Control": "private, no-cache"})
        self.access.give_cookie(request, response)
        return response


def application(engine: Engine, access: Access) -> Starlette:
    """The server.

    Args:
        engine: what answers.
        access: who may send requests.
    """
    api = Api(engine, access)

    def refused(error: Exception) -> Response:
        engine.counts["refused"] += 1
        return error_response(error)

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # Starlette's own: an unknown path, another method
            message = f"{request.method} {request.scope['path']}: {error.detail}"
            error = Refused(error.status_code, message, headers=error.headers)
        return refused(error)

    routes = [
        Route("/", api.page),
        Route(f"{FILES}{{name:path}}", api.page_file),
        Route("/v1/chat/completions", Answers(engine, chat=True), methods=["POST"]),
        Route("/v1/completions", Answers(engine, chat=False), methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
    ]
    methods, headers = ["GET", "POST"], ["*"]
    guards = [
        Middleware(Checked, check=access.check_place, refuse=refused),
        Middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=methods, allow_headers=headers),
        Middleware(Checked, check=access.check_key, refuse=refused),
    ]
    app = Starlette(
        routes=routes,
        middleware=guards if access.origins else [guards[0], guards[2]],
        exception_handlers={kind: refuse for kind in (Refused, InputError, HTTPException)},
    )
    app.router.redirect_slashes = False
    return app
