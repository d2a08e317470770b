"""Thousands of requests to a real server: ordinary, fuzzed, many at once, slow or broken off, or from pages of other origins.

    PYTHONPATH=tests .venv/bin/python -m campaigns.server --tries 3000 --seed 7

Of the tries a fifth is fuzzed, a fifteenth comes at once, a thirtieth vanishes, a thirtieth is foreign, and a sixtieth is slow.
An answer is correct; an error in JSON, and a connection that ends where there is no HTTP, is refused. At the end the server must
still answer, have nobody waiting, hold as much memory as after the warm-up, have no traceback in its log, and end by SIGTERM.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from support.serving import COMPLETIONS, ENDLESS, Process, ask, metric, send
from support.toys import write_toy_bundle

from campaigns import server_requests as requests
from campaigns.campaign import Campaign, main

HANG_S = 30.0
TIME_LIMIT_S = 2.0  # of one answer
# The memory grows in a few steps, when a larger request comes than ever before, so the warm-up must have seen many.
WARM_UP = 0.5  # the part of the tries that comes before the memory is measured
LONG = 1000  # tries from which a run counts as long
MEMORY_LIMIT, SHORT_MEMORY_LIMIT = 1.02, 1.1  # how far it may grow afterwards, in a long run and in a short one
CLIENTS = 8  # threads that send ordinary and fuzzed requests
HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"

Outcome = tuple[str, str]  # of campaign.OUTCOMES, and what was tried
Try = Callable[[int], Outcome]  # gets the port


def outcome_of(status: int, text: str, what: str) -> Outcome:
    """What became of a request that got a whole response."""
    if status == 200:
        return ("correct" if "data: {" not in text or "data: [DONE]" in text else "left_over"), what
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "traceback", f"{what}: {status} {text[:200]!r}"
    refused = 400 <= status < 500 or status == 503
    return ("refused" if refused and message and "\n" not in message else "traceback"), f"{what}: {status} {message}"


def exchange(path: str, body: bytes | None, headers: dict[str, str], *, good: tuple[str, ...]) -> Try:
    """A request whose outcome must be one of `good`."""

    def attempt(port: int) -> Outcome:
        what = f"{path} {headers} {(body or b'')[:300]!r}"
        names: dict[str, Any] = {name.replace("-", "_"): value for name, value in headers.items()}
        try:
            outcome, what = outcome_of(*send(port, path, body, timeout=HANG_S, **names), what)
        except TimeoutError:
            return "hang", what
        except (OSError, http.client.HTTPException) as error:
            return "left_over", f"{what}: {error!r}"
        return (outcome if outcome in good or outcome not in ("correct", "refused") else "left_over"), what

    return attempt


def raw(data: bytes) -> Try:
    """Bytes on a connection; the server must answer or end it in time."""

    def attempt(port: int) -> Outcome:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
        except TimeoutError:
            return "hang", repr(data[:300])
        except OSError:
            pass
        return "refused", repr(data[:300])

    return attempt


def vanishing(stream: bool, after_s: float) -> Try:
    """A client of an endless answer that goes away."""
    body = json.dumps({**ENDLESS, "stream": stream})

    def attempt(port: int) -> Outcome:
        with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection:
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            time.sleep(after_s)
        return "correct", ""

    return attempt


def slow(data: bytes, trickle: bytes) -> Try:
    """A client that does not send its whole request; the server must end the connection in time."""

    def attempt(port: int) -> Outcome:
        start = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection:
                connection.sendall(data)
                connection.settimeout(0.5)
                while time.monotonic() - start < HANG_S:
                    with contextlib.suppress(TimeoutError):
                        if not connection.recv(1 << 16):
                            return "refused", ""
                    connection.sendall(trickle)
        except OSError:
            return "refused", ""  # it was ended
        return "hang", f"still open: {data!r}"

    return attempt


def tries_of(campaign: Campaign, tries: int) -> dict[str, list[Try]]:
    """All tries by their kind."""
    rng = campaign.random
    count = {"fuzzed": tries // 5, "at once": tries // 15, "vanishing": tries // 30, "foreign": tries // 30}
    count["slow"] = max(1, tries // 60)

    def ordinary(good: tuple[str, ...] = ("correct",)) -> Try:
        path, body = rng.choice(requests.ORDINARY)
        return exchange(path, None if body is None else json.dumps(body).encode(), {}, good=good)

    def fuzzed() -> Try:
        make = rng.choice((requests.mutated_body, requests.broken_json, requests.evil_schema, None))
        return exchange(*make(rng), {}, good=("correct", "refused")) if make else raw(requests.raw_http(rng))

    def foreign() -> Try:
        body = json.dumps(requests.ORDINARY[0][1]).encode()
        return exchange(COMPLETIONS, body, requests.foreign_headers(rng), good=("refused",))

    def half_sent() -> Try:
        heads = [(b"", b""), (HEAD.encode(), b""), (HEAD.encode(), b"X")]
        bodies = [(f"{HEAD}Content-Length: 99\r\n\r\n{{".encode(), trickle) for trickle in (b"", b" ")]
        return slow(*rng.choice(heads + (bodies if tries >= LONG else [])))  # a body may take longer

    return {
        "fuzzed": [fuzzed() for _ in range(count["fuzzed"])],
        "at once": [ordinary(("correct", "refused")) for _ in range(count["at once"])],
        "vanishing": [vanishing(rng.random() < 0.5, rng.uniform(0, 0.3)) for _ in range(count["vanishing"])],
        "foreign": [foreign() for _ in range(count["foreign"])],
        "slow": [half_sent() for _ in range(count["slow"])],
        "ordinary": [ordinary(("correct", "refused")) for _ in range(tries - sum(count.values()))],
    }


def send_all(campaign: Campaign, port: int, tries: list[Try], clients: int) -> None:
    """Send the tries from several threads, and count their outcomes."""
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(attempt, port) for attempt in tries]:
            campaign.tried(*future.result())


def run(campaign: Campaign, tries: int) -> None:
    """Send that many requests to one server."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_toy_bundle(Path(folder) / "bundle")
        server = Process(bundle, Path(folder) / "log", "--time-limit", str(TIME_LIMIT_S))
        try:
            _run(campaign, tries, server)
        finally:
            server.stop()


def _run(campaign: Campaign, tries: int, server: Process) -> None:
    kinds = tries_of(campaign, tries)
    mixed = kinds["fuzzed"] + kinds["vanishing"] + kinds["foreign"] + kinds["ordinary"]
    campaign.random.shuffle(mixed)
    at_once, warm = kinds["at once"], int(WARM_UP * len(mixed))
    with ThreadPoolExecutor(len(kinds["slow"])) as pool:
        waiting = [pool.submit(attempt, server.port) for attempt in kinds["slow"]]
        half = len(at_once) // 2
        send_all(campaign, server.port, at_once[:half], max(1, half))
        send_all(campaign, server.port, mixed[:warm], CLIENTS)
        before = settled_mib(server)
        click.echo(f"server: resident memory {before:.1f} MiB after the warm-up")
        send_all(campaign, server.port, mixed[warm:], CLIENTS)
        send_all(campaign, server.port, at_once[half:], max(1, len(at_once) - half))
        for future in waiting:
            campaign.tried(*future.result())
    for problem in problems(server, before * (MEMORY_LIMIT if tries >= LONG else SHORT_MEMORY_LIMIT)):
        campaign.tried(*problem)


def settled_mib(server: Process) -> float:
    """The server's memory when nothing waits, and free memory was given back, as it is after each request with a schema."""
    deadline = time.monotonic() + HANG_S
    while metric(server.port, "waiting") and time.monotonic() < deadline:
        time.sleep(0.1)
    measured = []
    for _ in range(5):
        ask(server.port, COMPLETIONS, prompt="It", max_tokens=40, guided_json=requests.SCHEMA)
        measured.append(server.resident_mib())
    return min(measured)


def problems(server: Process, max_mib: float) -> Iterator[Outcome]:
    """What is wrong with the server at the end, for instance more memory than it may have."""
    if server.process.poll() is not None:
        yield "signal", f"the server has ended: {server.process.returncode}, {server.printed()[-1000:]}"
        return
    after_mib = settled_mib(server)
    click.echo(f"server: resident memory {after_mib:.1f} MiB at the end, {max_mib:.1f} MiB are allowed")
    if after_mib > max_mib:
        yield "left_over", f"resident memory grew to {after_mib:.1f} MiB, {max_mib:.1f} MiB are allowed"
    if waiting := metric(server.port, "waiting"):
        yield "left_over", f"{waiting:.0f} requests wait that nobody has sent"
    if send(server.port, "/health", timeout=HANG_S)[0] != 200:
        yield "left_over", "the server does not answer"
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(HANG_S)
    except subprocess.TimeoutExpired:
        yield "hang", "the server does not end"
    printed = server.printed()
    if "Traceback" in printed or "Exception" in printed:
        yield "traceback", printed[-3000:]


if __name__ == "__main__":
    main("server", run, tries=3000)
