"""Servers for tests: in a thread of the test, with a client's view of it; or as a process of their own, as users start them."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_edge.memory import memory_mib
from gemma_edge.runtimes.serve.access import Access
from gemma_edge.runtimes.serve.api import application
from gemma_edge.runtimes.serve.connections import LimitedServer
from gemma_edge.runtimes.serve.engine import Engine
from gemma_edge.runtimes.serve.server import ServerOptions, listen_on

COMMAND = [sys.executable, "-c", "from gemma_edge.runtimes.cli import main; main()", "serve"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"prompt": "It", "max_tokens": 1 << 20}


@contextmanager
def in_a_thread(engine: Engine, access: Access | None = None) -> Iterator[int]:
    """A server in a thread; its port."""
    listeners = listen_on(ServerOptions(port=0))
    port: int = listeners[0].getsockname()[1]
    server = LimitedServer(application(engine, access or Access()), engine)
    thread = threading.Thread(target=server.run, args=(listeners,))
    thread.start()
    until(lambda: server.started)
    yield port
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


class Process:
    """`gemma-run serve` on a free port; stderr goes to `log`."""

    def __init__(self, bundle: Path, log: Path, *args: str, limits: str = "") -> None:
        """Start it, in a shell with `limits` such as "ulimit -n 256"."""
        self.log = log
        line = f'{limits or "true"} && exec "$@"'
        command = ["bash", "-c", line, "bash", *COMMAND, str(bundle), "--port", "0", "--threads", "1", *args]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdout=stderr, stderr=stderr)
        until(lambda: self.process.poll() is not None or "running on" in self.printed())
        url = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.printed())
        assert url, self.printed()
        self.port = int(url[1])

    def printed(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def resident_mib(self) -> float:
        """Its resident memory."""
        return memory_mib(self.process.pid)["rss"]

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what must come, however busy the machine is."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def send(port: int, path: str, body: object = None, *, timeout: float = 60, **headers: str) -> tuple[int, str]:
    """One request on a connection of its own: bytes as they are, other bodies as JSON; without a body it is a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is None:
        connection.request("GET", path, None, headers)
    else:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def ask(port: int, path: str, **body: Any) -> Any:
    """The answer to a request that must get one."""
    status, text = send(port, path, body)
    assert status == 200, text
    return json.loads(text)


def metric(port: int, name: str) -> float:
    """One number of /metrics."""
    found = re.search(rf"^gemma_{name} (\S+)$", send(port, "/metrics")[1], re.MULTILINE)
    assert found, name
    return float(found[1])


def open_files(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
