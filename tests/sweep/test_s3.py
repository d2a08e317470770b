"""A store behind an s3:// URL, with a server that speaks S3 over HTTP on the loopback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'gemma-edge[dev]'")
pytest.importorskip("moto.server", reason="moto is not installed: pip install 'gemma-edge[dev]'")

import s3fs
from moto.server import ThreadedMotoServer

from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions
from gemma_edge.sweep.cluster import remote
from gemma_edge.sweep.cluster import store as module
from gemma_edge.sweep.cluster.remote import open_store
from gemma_edge.sweep.units import Job, Unit
from gemma_edge.user_cache import VARIABLE

LARGE = 6 << 20  # bytes: s3fs sends it in parts
FIRST = Unit("quantize", "q", "quantize", Job(ExportOptions()))
SECOND = Unit("lower", "l", "lower", Job(ExportOptions()), {"quantize": FIRST})


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket."""
    running = ThreadedMotoServer(port=0, verbose=False)
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


def test_nodes_share_results_behind_s3(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def compute(unit: Unit, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
        computed.append(unit.key)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(unit.key.encode() * LARGE)
        return {"read": [len((path / "deep" / "file").read_bytes()) for path in inputs.values()]}

    monkeypatch.setattr(module, "compute", compute)
    store = open_store(bucket, tmp_path / "default")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one"))
    store.check()
    assert store.record(FIRST) is None
    made = store.make(FIRST, "one")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "two"))
    assert store.record(FIRST) == made
    assert store.make(SECOND, "two")["result"] == {"read": [LARGE]} and computed == ["q", "l"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "three"))
    store.fetch(SECOND)
    assert (store.place(SECOND) / "deep" / "file").read_bytes() == b"l" * LARGE


def test_a_server_that_does_not_answer_is_one_line(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself tries again for longer than anybody wants to wait."""
    monkeypatch.setattr(remote, "ANSWERS_S", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match="s3://bucket/sweep cannot be used: no answer within 1 s"):
        open_store(bucket, tmp_path).check()


def test_a_clients_own_error_is_one_line(bucket: str, tmp_path: Path) -> None:
    """Those of botocore are no OSErrors."""
    with pytest.raises(InputError, match="s3://bucket/sweep cannot be used: Invalid"):
        with open_store(bucket, tmp_path)._reached():  # type: ignore[attr-defined]
            raise RuntimeError("Invalid")
