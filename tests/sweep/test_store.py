"""Where results lie: whole or not at all, on a shared path or behind a URL with a mirror on every node."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'gemma-edge[sweep]'")

import fsspec

from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions
from gemma_edge.sweep.cluster import remote
from gemma_edge.sweep.cluster import store as module
from gemma_edge.sweep.cluster.remote import RemoteStore, open_store
from gemma_edge.sweep.cluster.store import Store
from gemma_edge.sweep.units import RECORD, Job, Unit
from gemma_edge.user_cache import VARIABLE

JOB = Job(ExportOptions())
FIRST = Unit("quantize", "q", "quantize", JOB)
SECOND = Unit("lower", "l", "lower", JOB, {"quantize": FIRST})


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that were computed; each leaves a file, and reads those of the units that it needs."""
    done: list[str] = []

    def compute(unit: Unit, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
        done.append(unit.key)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(unit.key)
        return {"read": [(path / "deep" / "file").read_text() for path in inputs.values()]}

    monkeypatch.setattr(module, "compute", compute)
    return done


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on a server that speaks S3, on the loopback."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'gemma-edge[dev]'")
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'gemma-edge[dev]'")
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)
    yield "s3://bucket/sweep"
    running.stop()


def test_a_result_appears_whole_and_a_failure_leaves_nothing(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    assert store.record(FIRST) is None
    assert store.make(FIRST, "node")["result"] == {"read": []} and store.make(SECOND, "node")["result"] == {
        "read": ["q"]
    }
    found = store.record(SECOND)
    assert found is not None and found["node"] == "node" and found["cpu_s"] >= 0
    assert store.make(FIRST, "other")["node"] == "node"  # another sweep was faster

    def fail(unit: Unit, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise InputError("no")

    monkeypatch.setattr(module, "compute", fail)
    with pytest.raises(InputError, match="no"):
        store.make(Unit("quantize", "x", "x", JOB), "node")
    assert sorted(path.name for path in (tmp_path / "quantize").iterdir()) == ["q"]


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_behind_a_url_every_node_has_a_mirror_of_what_it_needs(
    scheme: str,
    tmp_path: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    url = request.getfixturevalue("bucket") if scheme == "s3" else f"file://{tmp_path}/bucket"
    store = open_store(url, tmp_path / "default")
    assert isinstance(store, RemoteStore) and store.shared == []
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one"))
    store.check()
    assert store.record(FIRST) is None
    made = store.make(FIRST, "one")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "two"))
    with fsspec.open(f"{url}/quantize/q/{RECORD}") as there:
        assert store.record(FIRST) == made == json.load(there)
    assert store.make(SECOND, "two")["result"] == {"read": ["q"]} and computed == ["q", "l"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "three"))
    store.fetch(SECOND)
    assert (store.place(SECOND) / "deep" / "file").read_text() == "l"


class Killed(BaseException):
    """Stands for the end of a process: nothing in the product catches it."""


@pytest.mark.parametrize("last", ["deep/file", RECORD])
def test_an_upload_that_was_killed_is_never_taken_for_a_result(
    last: str, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    store = open_store(f"memory://killed-{tmp_path.name}-{len(last)}", tmp_path)
    real = type(files).put_file

    def half(self: Any, source: str, target: str, *args: object, **more: object) -> None:
        if not target.endswith(last):
            real(self, source, target, *args, **more)
            return
        whole = Path(source).read_bytes()
        self.pipe_file(target, whole[: len(whole) // 2])
        raise Killed

    monkeypatch.setenv(VARIABLE, str(tmp_path / "one"))
    with monkeypatch.context() as patch:
        patch.setattr(type(files), "put_file", half)
        with pytest.raises(Killed):
            store.make(FIRST, "one")
    assert files.find(store._there(FIRST))  # type: ignore[attr-defined]  # half a result is there
    for mirror in ("one", "two"):
        monkeypatch.setenv(VARIABLE, str(tmp_path / mirror))
        assert store.record(FIRST) is None
    assert store.make(FIRST, "two")["node"] == "two" and computed == ["q", "q"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "three"))
    assert store.record(FIRST) is not None and store.make(SECOND, "three")["result"] == {"read": ["q"]}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one"))
    assert store.make(FIRST, "one")["node"] == "one" and computed == ["q", "q", "l"]  # it sends what it has made


@pytest.mark.parametrize("url", ["s3://", "file:///"])
def test_a_url_that_names_no_place_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"store {url} names no place"):
        open_store(url, tmp_path)


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "file:///proc/nowhere/x"])
def test_a_url_that_cannot_be_used_is_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used") as caught:
        open_store(url, tmp_path).check()
    assert caught.value.field == "store"


def test_a_server_that_does_not_answer_is_one_line(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself tries again for longer than anybody wants to wait."""
    monkeypatch.setattr(remote, "ANSWERS_S", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(InputError, match="s3://bucket/sweep cannot be used: no answer within 1 s"):
        open_store(bucket, tmp_path).check()


def test_a_clients_own_error_is_one_line(bucket: str, tmp_path: Path) -> None:
    """Those of botocore are no OSErrors."""
    with pytest.raises(InputError, match="s3://bucket/sweep cannot be used: Invalid"):
        with open_store(bucket, tmp_path)._reached():  # type: ignore[attr-defined]
            raise RuntimeError("Invalid")
