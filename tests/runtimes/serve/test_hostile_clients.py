"""A server in its own process with clients that vanish, stall and flood, with signals, and with options that cannot be served."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving import COMMAND, COMPLETIONS, ENDLESS, Process, ask, in_a_thread, metric, open_files, send, until

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")

import gemma_edge
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.serve import body, connections
from gemma_edge.runtimes.serve.access import Access
from gemma_edge.runtimes.serve.api import application
from gemma_edge.runtimes.serve.engine import MAX_WAITING, Engine

HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(bundle, tmp_path_factory.mktemp("log") / "log")
    yield process
    process.stop()
    assert "Traceback" not in process.printed(), process.printed()


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(data)
    return connection


def request(**fields: object) -> bytes:
    import json

    data = json.dumps(fields).encode()
    return HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def ended(connection: socket.socket) -> bytes:
    """All that the server sends before it closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    connection.close()
    return b"".join(parts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answer_and_leaves_the_queue(stream: bool, server: Process) -> None:
    """Without streaming, the answer went on to its last token, and the queue was full of clients that had left."""
    cancelled = metric(server.port, "cancelled_total")
    running = connect(server.port, request(**ENDLESS, stream=stream))
    until(lambda: metric(server.port, "waiting") == 0 and metric(server.port, "requests_total") > 0)
    waiting = [connect(server.port, request(**ENDLESS, stream=stream)) for _ in range(MAX_WAITING)]
    until(lambda: metric(server.port, "waiting") == MAX_WAITING)
    assert send(server.port, COMPLETIONS, ENDLESS)[0] == 503
    for connection in waiting:
        connection.close()
    until(lambda: metric(server.port, "waiting") == 0)
    running.close()
    assert ask(server.port, COMPLETIONS, prompt="It", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert metric(server.port, "cancelled_total") == cancelled + 1 + MAX_WAITING


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_signal_ends_the_server_while_answers_run(signum: signal.Signals, bundle: Path, tmp_path: Path) -> None:
    """The server was still there 20 s later."""
    server = Process(bundle, tmp_path / "log")
    whole, streamed = (connect(server.port, request(**ENDLESS, stream=stream)) for stream in (False, True))
    half = connect(server.port, HEAD + b"Content-Length: 10\r\n\r\n{")
    until(lambda: metric(server.port, "requests_total") == 3 and metric(server.port, "waiting") == 1)
    server.process.send_signal(signum)
    assert server.process.wait(60) == (-signal.SIGTERM if signum == signal.SIGTERM else 130)
    assert b" 503 " in ended(whole) and b"shutting down" in ended(streamed)
    assert ended(half) == b"" and "Traceback" not in server.printed()


def test_a_port_that_is_taken_is_one_line(server: Process, bundle: Path) -> None:
    """The command ended with exit code 3 and three lines of uvicorn's."""
    done = subprocess.run([*COMMAND, bundle, "--port", str(server.port)], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: --port {server.port} of 127.0.0.1 is taken")
    done = subprocess.run([*COMMAND, bundle, "--host", "no.invalid"], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: --host 'no.invalid' is unknown")


def test_half_sent_requests_are_dropped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 half-sent bodies and 20 half-sent heads were still open after 45 s."""
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    monkeypatch.setattr(body, "BODY_S", 0.3)
    with in_a_thread(Engine(gemma_edge.load(bundle, threads=1), GenerationOptions())) as port:
        after_one = connect(port, request(prompt="It", max_tokens=1))
        response = b""
        while not response.endswith(b"}}}"):  # it may come in pieces
            part = after_one.recv(1 << 16)
            assert part, response
            response += part
        assert b" 200 " in response
        after_one.sendall(HEAD)
        silent, half_head = connect(port), connect(port, HEAD)
        half_body = connect(port, HEAD + b"Content-Length: 10\r\n\r\n{")
        assert ended(silent) == ended(half_head) == ended(after_one) == b""
        answer = ended(half_body)
        assert b" 408 " in answer and b"did not arrive within" in answer


def test_a_client_that_does_not_read_is_dropped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer went on, and the connection stayed, as long as the client wanted."""
    monkeypatch.setattr(connections, "STALLED_S", 0.3)
    engine = Engine(gemma_edge.load(bundle, threads=1), GenerationOptions())
    with in_a_thread(engine) as port:
        connect(port, request(**ENDLESS, stream=True, logprobs=20))  # its buffers are full soon
        until(lambda: engine.counts["cancelled"] == 1)


def test_idle_connections_make_room(bundle: Path, tmp_path: Path) -> None:
    """With 256 open files allowed, 400 connections made /health time out and wrote 25 MB of log in 3 s."""
    server = Process(bundle, tmp_path / "log", limits="ulimit -n 256")
    try:
        idle = [connect(server.port) for _ in range(400)]
        for _ in range(3):
            assert send(server.port, "/health", timeout=30)[0] == 200
        assert open_files(server.process.pid) < 256
        printed = server.printed()
        assert len(printed) < 2000 and "Traceback" not in printed, printed[-2000:]
        for connection in idle:
            connection.close()
    finally:
        server.stop()


def test_too_many_open_files_are_one_line(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio printed a traceback for each connection that it could not accept."""
    engine = Engine(gemma_edge.load(bundle, threads=1), GenerationOptions())
    server = connections.LimitedServer(application(engine, Access()), engine)
    loop = asyncio.new_event_loop()
    for _ in range(100):
        server._on_error(loop, {"message": "out of system resource", "exception": OSError(errno.EMFILE, "too many")})
    loop.close()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "connections cannot be accepted: too many open files; raise ulimit -n"
    ]


def test_the_server_answers_while_it_reads_a_large_request(server: Process) -> None:
    """100,000 messages or a text of 1 MB kept the server from everything else."""
    large = {"messages": [{"role": "user", "content": "a"}] * 30_000}
    status, text = send(server.port, "/v1/chat/completions", large)
    assert status == 400 and "too many" in text
    running = connect(server.port, request(**{**ENDLESS, "prompt": "a " * 100_000}))
    started = time.monotonic()
    for _ in range(20):
        assert send(server.port, "/health", timeout=30)[0] == 200
    assert time.monotonic() - started < 30
    running.close()


def test_garbage_is_answered_or_dropped(server: Process) -> None:
    for data in (
        b"\x00" * 1000,
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"A" * 100_000,
    ):
        assert ended(connect(server.port, data)).startswith((b"HTTP/1.1 4", b""))
    part = connect(server.port, request(**ENDLESS, stream=True))
    assert b" 200 " in part.recv(1 << 10)
    part.sendall(b"\x00not HTTP\r\n\r\n")  # behind a request that is being answered
    part.close()
    assert send(server.port, "/health")[0] == 200


def test_each_request_is_a_line_where_that_is_wanted(bundle: Path, tmp_path: Path) -> None:
    server = Process(bundle, tmp_path / "log", "--log")
    try:
        assert send(server.port, "/health?a=%0Aforged")[0] == 200
        until(lambda: "/health" in server.printed())
        (line,) = (line for line in server.printed().splitlines() if "/health" in line)
        assert line.endswith("200") and "forged" in line
    finally:
        server.stop()
