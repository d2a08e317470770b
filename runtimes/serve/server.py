"""The start of `gemma-run serve`: opens a bundle and answers until Ctrl-C. The paths are api.py's, the queue is engine.py's."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.runtimes.generation.generate import GenerationOptions

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORTS = 1 << 16


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = (
        "127.0.0.1"  # any other address than LOOPBACK lets everybody on the network in, by any name for this machine
    )
    port: int = 8080  # 0 takes a free one

    @property
    def names(self) -> list[str]:
        """The host names that requests may use, so that a web page elsewhere cannot make a browser send requests here."""
        return [*LOOPBACK, "[::1]"] if self.host in LOOPBACK else ["*"]


def serve(
    bundle: str | Path,
    options: GenerationOptions,
    address: Address,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> None:
    """Answer requests until Ctrl-C.

    Args:
        bundle: the bundle's folder.
        options: for what a request leaves open.
        address: where to listen.
        backend, threads: as in `gemma_edge.load`.

    Raises:
        InputError: a package is missing, or the port or the bundle cannot be used.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise InputError(f"the server needs {' and '.join(missing)}: pip install 'gemma-edge[serve]'")
    if not 0 <= address.port < PORTS:
        raise InputError(f"`port` {address.port} is not between 0 and {PORTS - 1}", field="port", value=address.port)
    import uvicorn

    from gemma_edge.runtimes.generation.console import note
    from gemma_edge.runtimes.serve.api import application
    from gemma_edge.runtimes.serve.engine import Engine

    engine = Engine(open_runtime(bundle, backend=backend, threads=threads), options, note)
    config = uvicorn.Config(
        application(engine, address.names), host=address.host, port=address.port, log_level="info", access_log=False
    )
    uvicorn.Server(config).run()
