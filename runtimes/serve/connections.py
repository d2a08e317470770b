"""uvicorn's server with limits for its connections: how many there are, and how long each may keep the server waiting."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

from h11 import IDLE
from starlette.applications import Starlette
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_edge.runtimes.serve.engine import Engine

log = logging.getLogger(__name__)

HEAD_S = 10.0  # seconds from the first byte of a connection, or from its opening, to the end of the request's head
STALLED_S = 30.0  # seconds that a client may go without reading what it was sent
GRACE_S = 5  # seconds that connections have to end when the server ends
MAX_CONNECTIONS = 512
# How many connections asyncio accepts at once. Up to four times as many are open before the first of them can be dropped.
ACCEPTED_AT_ONCE = 16
QUEUED = 512  # connections that the kernel holds until they are accepted
COMPLAINT_S = 60.0  # seconds between two lines about the same trouble
SPARE_FILES = 32  # files that the process may open besides its connections


def max_connections() -> int:
    """How many connections this process can hold and still open files."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/dev/fd"))
    left = allowed - open_now - SPARE_FILES - 4 * ACCEPTED_AT_ONCE
    return MAX_CONNECTIONS if allowed == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, left))


class Connection(H11Protocol):
    """One connection. A client that does not send its request, or does not read the response, is dropped."""

    limit = MAX_CONNECTIONS
    _timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0  # by the loop's clock

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_sending(self) -> bool:
        """Whether the client has not sent the whole body of its request yet."""
        return not self.idle and self.cycle.more_body

    def drop(self) -> None:
        """End the connection at once, without sending what is left."""
        self.connections.discard(self)  # asyncio calls connection_lost only later
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request. Where there are too many connections, the one that is idle longest makes room."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._expect_within(HEAD_S)
        if len(self.connections) > self.limit:
            own = [other for other in self.connections if isinstance(other, Connection) and other.idle]
            min(own, key=lambda other: other._idle_since).drop()

    def data_received(self, data: bytes) -> None:
        """Read the bytes; the rest of a request's head must come in time. body.py limits the time of the body."""
        super().data_received(data)
        if not self.idle:
            self._expect_within(None)
        elif self._timer is None:
            self._expect_within(HEAD_S)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, unless the answer to an earlier request is under way."""
        if self.conn.our_state is IDLE:
            super().send_400_response(msg)
        else:
            self.drop()

    def on_response_complete(self) -> None:
        """Wait for the next request, by uvicorn's own timer, or for the client to read the rest."""
        self._idle_since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_within(STALLED_S)

    def timeout_keep_alive_handler(self) -> None:
        """No next request has come: close the connection, and drop it if the client does not read the rest."""
        super().timeout_keep_alive_handler()
        self._expect_within(STALLED_S)

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes; it must read on in time."""
        super().pause_writing()
        self._expect_within(STALLED_S)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._expect_within(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        super().connection_lost(exc)
        self._expect_within(None)

    def _expect_within(self, seconds: float | None) -> None:
        """Drop the connection after that many seconds, unless this method is called again before. None: do not drop it."""
        if self._timer:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.drop)


def _nothing() -> None:
    """Do nothing: the default of `ready`."""


class LimitedServer(Server):
    """The server: its connections are limited, and when it ends, all answers end."""

    def __init__(
        self, app: Starlette, engine: Engine, *, log_requests: bool = False, ready: Callable[[], None] = _nothing
    ) -> None:
        """Configure uvicorn.

        Args:
            app, engine: an app around an engine.
            log_requests: whether a line is logged for each request.
            ready: called when connections are accepted.
        """
        protocol = type("LimitedConnection", (Connection,), {"limit": max_connections()})
        config = Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="info" if log_requests else "error",
            access_log=log_requests,
            proxy_headers=False,
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)
        self._engine, self._ready = engine, ready
        self._complained_s = -COMPLAINT_S

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        await super().startup(sockets=sockets)
        for listener in sockets or []:
            listener.listen(QUEUED)  # uvicorn's backlog is both: how many are accepted at once, and how many are held
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all answers, then all connections."""
        self._engine.close()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.is_sending:
                connection.drop()
        await super().shutdown(sockets=sockets)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log once a minute that connections cannot be accepted; asyncio would print a traceback for each of them."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - self._complained_s >= COMPLAINT_S:
            self._complained_s = loop.time()
            log.error("connections cannot be accepted: too many open files; raise ulimit -n")
