"""Who may send requests: no pages of other origins, only under this machine's names, and from the network with a key."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import CHAT, COMPLETIONS, in_a_thread, send
from support.toys import write_toy_bundle

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.serve.access import Access, names_of_this_machine
from gemma_edge.runtimes.serve.engine import Engine
from gemma_edge.runtimes.serve.server import ServerOptions, listen_on

BODY = {"prompt": "It", "max_tokens": 1}
KEY, APP = "a secret", "http://localhost:3000"


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Access], int]]:
    """Servers around one bundle; each ends with the module."""
    bundle = write_toy_bundle(tmp_path_factory.mktemp("access") / "bundle")
    open_: list[Any] = []

    def start(access: Access) -> int:
        server = in_a_thread(Engine(gemma_edge.load(bundle, threads=1), GenerationOptions()), access)
        port = server.__enter__()
        open_.append(server)
        return port

    yield start
    for server in open_:
        server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def plain(serve: Callable[[Access], int]) -> int:
    return serve(Access(hosts=frozenset({"localhost", "gemma"})))


@pytest.fixture(scope="module")
def locked(serve: Callable[[Access], int]) -> int:
    return serve(Access(key=KEY, origins=(APP,)))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_a_request(kind: str, plain: int) -> None:
    """A browser sends other types to any server without asking it first: text/plain was answered."""
    status, text = send(plain, COMPLETIONS, BODY, Content_Type=kind)
    assert status == 415 and "application/json" in text
    assert send(plain, COMPLETIONS, BODY, Content_Type="Application/JSON; charset=utf-8")[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://[", "http://127.0.0.1"]
)
def test_a_page_of_another_origin_is_refused(origin: str, plain: int) -> None:
    for path, body in ((COMPLETIONS, BODY), (CHAT, {}), ("/v1/models", None)):
        status, text = send(plain, path, body, Origin=origin)
        assert status == 403 and "--cors" in text


def test_the_servers_own_page_and_no_page_at_all_are_let_in(plain: int) -> None:
    assert send(plain, COMPLETIONS, BODY)[0] == 200
    for origin in (f"http://127.0.0.1:{plain}", f"https://127.0.0.1:{plain}"):
        assert send(plain, COMPLETIONS, BODY, Origin=origin)[0] == 200


def test_a_page_that_is_allowed_may_read_the_answer(locked: int) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", locked, timeout=60)
    asks = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    connection.request("OPTIONS", COMPLETIONS, None, asks)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == APP
    connection.request("GET", "/v1/models", None, {"Origin": APP})
    answer = connection.getresponse()
    assert answer.status == 401 and answer.headers["Access-Control-Allow-Origin"] == APP
    connection.close()
    assert send(locked, "/v1/models", Origin="http://localhost:3001", Authorization=f"Bearer {KEY}")[0] == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 200), ("[::1]:80", 200), ("192.168.1.7", 200), ("LOCALHOST", 200), ("gemma:8080", 200),
     ("localhost.", 200), ("evil.example", 400), ("127.0.0.1.evil.example", 400), ("gemma.evil", 400), ("[::1", 400)],
)  # fmt: skip
def test_a_name_must_be_this_machines(host: str, status: int, plain: int) -> None:
    """With --host 0.0.0.0 any name was accepted, also that of a page whose name resolves to this machine."""
    assert send(plain, "/health", Host=host)[0] == status


def test_a_key_makes_every_name_safe(locked: int) -> None:
    assert send(locked, "/v1/models", Host="gemma.example", Authorization=f"Bearer {KEY}")[0] == 200


@pytest.mark.parametrize(
    "given", [None, "", KEY, f"Basic {KEY}", "Bearer ", "Bearer wrong", f"Bearer {KEY}x", "Bearer \xe9"]
)
def test_without_the_key_nothing_is_answered(given: str | None, locked: int) -> None:
    headers: dict[str, Any] = {} if given is None else {"Authorization": given}
    for path, body in ((COMPLETIONS, BODY), (CHAT, {}), ("/v1/models", None), ("/metrics", None)):
        status, text = send(locked, path, body, **headers)
        assert status == 401 and "Authorization: Bearer" in text and KEY not in text
    assert send(locked, "/health")[0] == send(locked, "/")[0] == 200


def test_with_the_key_everything_is_answered(locked: int) -> None:
    assert send(locked, COMPLETIONS, BODY, Authorization=f"Bearer {KEY}")[0] == 200
    assert send(locked, "/metrics", Authorization=f"bearer {KEY}")[0] == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from the network.*api_key KEY"),
        ({"host": "::"}, "can be reached from the network"),
        ({"host": "no such host.invalid"}, "host 'no such host.invalid' is unknown"),
        ({"host": "192.0.2.1", "no_auth": True}, "cannot listen on host 192.0.2.1.*give an address of this machine"),
        ({"port": 65536}, "port 65536 is not between 0 and 65535"),
        ({"api_key": ""}, "api_key is empty"),
        ({"api_key": "caf\u00e9"}, "printable ASCII"),
        ({"api_key": "a\nb"}, "printable ASCII"),
        ({"api_key": " a"}, "begins or ends with a blank"),
        ({"api_key": "a", "no_auth": True}, "leave one of them out"),
        ({"cors": ("localhost:3000",)}, "is not an origin; give an origin such as http://localhost:3000"),
        ({"cors": ("http://a/b",)}, "is not an origin"),
        ({"time_limit": 0.0}, "time_limit 0.0 is not a number of seconds above 0"),
        ({"time_limit": float("nan")}, "time_limit nan"),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(part),
)
def test_a_server_that_cannot_run_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        listen_on(ServerOptions(**{"port": 0, **options}))


def test_a_port_that_is_taken_is_named() -> None:
    """The command ended with exit code 3 and uvicorn's own lines."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is taken; end the program"):
            listen_on(ServerOptions(port=port))


def test_a_key_or_a_word_opens_the_server_to_the_network() -> None:
    for options in (
        ServerOptions(host="0.0.0.0", port=0, api_key=KEY),
        ServerOptions(host="0.0.0.0", port=0, no_auth=True),
    ):
        (listener,) = listen_on(options)
        assert listener.getsockname()[0] == "0.0.0.0"
        listener.close()
    assert socket.gethostname().lower() in names_of_this_machine()


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from gemma_edge.runtimes.cli import main
    from gemma_edge.runtimes.serve import server

    keys: list[str | None] = []
    monkeypatch.setattr(server, "serve", lambda bundle, options, served, **_: keys.append(served.api_key))
    monkeypatch.setenv(server.KEY_VARIABLE, KEY)
    for args in ([], ["--api-key", "other"], ["--no-auth"]):
        assert CliRunner().invoke(main, ["serve", str(tmp_path), *args]).exit_code == 0
        assert CliRunner().invoke(main, [str(tmp_path), "--serve", *args]).exit_code == 0
    assert keys == [KEY, KEY, "other", "other", None, None]
    assert CliRunner().invoke(main, [str(tmp_path), "-p", "a"]).stderr.count("api") == 0, (
        "other commands do not read it"
    )
