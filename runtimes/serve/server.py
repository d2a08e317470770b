"""The start of `gemma-run serve`: opens a bundle and answers until Ctrl-C. The paths are api.py's, the queue is engine.py's."""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from gemma_edge.command import note
from gemma_edge.errors import InputError
from gemma_edge.memory import limit_arenas
from gemma_edge.runtimes.engines.adapter import Adapter
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.guard import Guard

PORTS = 1 << 16
KEY_VARIABLE = "GEMMA_EDGE_API_KEY"
# ABSENT: errors for a family of addresses that this machine does not have; another address of the same name may work.
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, who may send requests, and how long an answer may take."""

    host: str = "127.0.0.1"  # an address or a name of this machine
    port: int = 8080  # 0 takes a free one
    api_key: str | None = None  # what requests must send; needed if `host` can be reached from outside
    no_auth: bool = False  # True lets in everybody who can reach `host`
    allow_host: tuple[str, ...] = ()  # more names of this machine that requests may use; "*" allows all
    cors: tuple[str, ...] = ()  # origins of other web pages that may send requests; "*" allows all
    time_limit: float = 600.0  # seconds that one answer may take
    log: bool = False  # whether each request is printed to stderr
    guard: str | Path | None = None  # a bundle of ShieldGemma that judges prompts and answers
    adapter: tuple[str | Path, ...] = ()  # folders of adapters that requests may name

    def __post_init__(self) -> None:
        """Raises InputError for a value that cannot be used."""
        if not 0 <= self.port < PORTS:
            raise InputError(f"`port` {self.port} is not between 0 and {PORTS - 1}", field="port", value=self.port)
        if not 0 < self.time_limit < math.inf:
            problem = f"`time_limit` {self.time_limit} is not a number of seconds above 0"
            raise InputError(problem, field="time_limit", value=self.time_limit)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise InputError("`api_key` is empty or holds other characters than printable ASCII", field="api_key")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise InputError("`api_key` begins or ends with a blank", field="api_key")
        if self.api_key is not None and self.no_auth:
            raise InputError("`no_auth` lets everybody in, `api_key` does not; leave one of them out", field="no_auth")
        for origin in self.cors:
            if origin != "*" and not _is_origin(origin):
                problem = f"`cors` {origin!r} is not an origin"
                raise InputError(
                    problem, field="cors", value=origin, hint="give an origin such as http://localhost:3000, or *"
                )


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and text == f"{parts.scheme}://{parts.netloc}"
    except ValueError:
        return False


def serve(
    bundle: str | Path,
    options: GenerationOptions,
    server: ServerOptions,
    *,
    backend: str | None = None,
    threads: int | None = None,
    accelerator: str | None = None,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Args:
        bundle: the bundle's folder.
        options: for what a request leaves open.
        server: where to listen, and for whom.
        backend, threads, accelerator: as in `gemma_edge.load`.

    Raises:
        InputError: a package is missing, the address or the bundle cannot be used, or the server would be open to everybody.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise InputError(f"the server needs {' and '.join(missing)}: pip install 'gemma-edge[serve]'")
    limit_arenas(2)
    listeners = listen_on(server)

    from gemma_edge.runtimes.serve.access import Access, names_of_this_machine
    from gemma_edge.runtimes.serve.api import application
    from gemma_edge.runtimes.serve.connections import LimitedServer
    from gemma_edge.runtimes.serve.engine import Engine

    runtime = open_runtime(bundle, backend=backend, threads=threads, accelerator=accelerator)
    adapters = [Adapter.open(folder) for folder in server.adapter]
    guard = Guard(server.guard, threads=threads) if server.guard is not None else None
    engine = Engine(runtime, options, note, time_limit_s=server.time_limit, guard=guard, adapters=adapters)
    hosts = {*names_of_this_machine(), server.host.lower(), *(name.lower() for name in server.allow_host)}
    access = Access(server.api_key, frozenset(hosts), server.cors)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each write to a client that has just gone
    url = _url(server.host, listeners[0].getsockname()[1])

    def ready() -> None:
        note(f"{engine.name} is running on {url} (Ctrl-C ends it)")

    app = application(engine, access)
    LimitedServer(app, engine, log_requests=server.log, ready=ready).run(sockets=listeners)


def listen_on(server: ServerOptions) -> list[socket.socket]:
    """Sockets that are bound to every address of the host; nobody can connect yet.

    Raises:
        InputError: the host is unknown or not this machine's, the port is taken, or the server would be open to everybody.
    """
    host, port = server.host, server.port
    try:
        results = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"`host` {host!r} is unknown: {reason}", field="host", value=host) from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in results))
    inside = all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for _, address in addresses)
    if not inside and server.api_key is None and not server.no_auth:
        raise InputError(
            f"`host` {host} can be reached from the network, and nothing keeps others out",
            field="host",
            value=host,
            hint=f"give `api_key` KEY (or ${KEY_VARIABLE}), or `no_auth` to let everybody in",
        )
    listeners: list[socket.socket] = []
    for family, address in addresses:
        try:
            listeners.append(_bound(family, address))
        except OSError as error:
            if error.errno not in ABSENT or (family, address) == addresses[-1] and not listeners:
                raise _refusal(host, port, error) from None
        if not port and listeners:
            break  # a port that is free in one family of addresses may be taken in another
    return listeners


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _refusal(host: str, port: int, error: OSError) -> InputError:
    if error.errno == errno.EADDRINUSE:
        hint = "end the program that uses it, or give another `port`; 0 takes a free one"
        return InputError(f"`port` {port} of {host} is taken", field="port", value=port, hint=hint)
    if error.errno == errno.EACCES:
        hint = "give a `port` of 1024 or above"
        return InputError(f"only the administrator may use `port` {port}", field="port", value=port, hint=hint)
    hint = "give an address of this machine, such as 127.0.0.1"
    return InputError(f"cannot listen on `host` {host}: {error.strerror}", field="host", value=host, hint=hint)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
