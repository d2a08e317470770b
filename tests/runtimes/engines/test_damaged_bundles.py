"""Bundles that are damaged, hostile, or replaced while they are used: one line each, and the process lives on."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from support.damage import reseal
from support.toys import write_toy_bundle

import gemma_edge
from gemma_edge import file_hash
from gemma_edge.bundle import manifest as manifests
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.export.api import Export
from gemma_edge.runtimes.engines import load
from gemma_edge.runtimes.engines.structure.flatbuffer import Damaged
from gemma_edge.runtimes.engines.structure.pte import check_program
from gemma_edge.runtimes.engines.structure.tflite import check_model
from gemma_edge.runtimes.generation.text_generator import TextGenerator


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle")


def refusal(bundle: Path, *, backend: str | None = None, steps: int = 2) -> str:
    """Why a bundle cannot be used, in one line."""
    with pytest.raises(InputError) as caught:
        runtime = gemma_edge.load(bundle, backend=backend, threads=1)
        TextGenerator.open(runtime)
        runtime.prefill([3] * steps)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["generate.onnx", "tokenizer.json", "tokenizer_config.json"])
def test_one_bit_in_a_file_is_seen_at_every_open(name: str, bundle: Path) -> None:
    """The bundle opened, and answered something else or failed in the middle of an answer."""
    flip(bundle / name)
    assert f"{bundle / name} was changed" in refusal(bundle)


def test_a_graph_that_is_loaded_later_is_compared_then(bundle: Path) -> None:
    """A bundle that was replaced in the meantime was half the old one and half the new one."""
    runtime = gemma_edge.load(bundle, threads=1)
    runtime.prefill([3, 4])
    flip(bundle / "score.onnx")
    with pytest.raises(InputError, match=r"score\.onnx was changed"):
        runtime.score([3, 4])


def test_a_large_file_is_hashed_once_for_each_state_of_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "SMALL_BYTES", 0)
    monkeypatch.setattr(file_hash, "SETTLED_S", -60.0)
    gemma_edge.load(bundle, threads=1)
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(file_hash, "sha256", count)
    gemma_edge.load(bundle, threads=1)
    assert hashed == []
    graph = bundle / "generate.onnx"
    before = graph.stat()
    flip(graph)
    os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an unpacked archive has them
    assert "was changed" in refusal(bundle)
    assert hashed == ["generate.onnx"]


def test_an_error_in_the_middle_of_a_call_is_one_line(bundle: Path) -> None:
    """ONNX Runtime's own exception ended in a traceback."""
    graph = onnx.load(bundle / "generate.onnx")
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = 32767
    (bundle / "generate.onnx").write_bytes(graph.SerializeToString())
    reseal(bundle)
    assert "generate.onnx does not run: " in refusal(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", str(1 << 40)),
        ("offset", "-1"),
        ("length", str(1 << 40)),
        ("length", "7"),
        ("location", "../../secret"),
        ("location", "/dev/zero"),
        ("location", ""),
    ],
)
def test_weights_that_lie_elsewhere_are_one_line(key: str, value: str, talking: Export, tmp_path: Path) -> None:
    """ONNX Runtime's message of several lines was passed through."""
    copy = Path(shutil.copytree(talking.bundle, tmp_path / "copy"))
    graph = onnx.load(copy / "generate.onnx", load_external_data=False)
    for entry in next(tensor for tensor in graph.graph.initializer if tensor.external_data).external_data:
        entry.value = value if entry.key == key else entry.value
    (copy / "generate.onnx").write_bytes(graph.SerializeToString())
    reseal(copy)
    assert "generate.onnx is damaged, or is not a graph of this bundle: " in refusal(copy, backend="onnx")


CHECKS: dict[str, Callable[[Path], None]] = {"model.tflite": check_model, "model.pte": check_program}


@pytest.mark.parametrize("name", CHECKS)
def test_every_offset_that_leads_out_of_a_file_is_seen(name: str, talking: Export, tmp_path: Path) -> None:
    """LiteRT and ExecuTorch followed such offsets, and a signal ended the process. The campaign `bundles` runs such files."""
    source = talking.bundle / name
    if not source.exists():
        pytest.skip(f"its backend is not installed: {name}")
    whole, path, chance, refused = source.read_bytes(), tmp_path / name, random.Random(16), 0
    CHECKS[name](source)
    for _ in range(60):
        data = bytearray(whole)
        at = chance.randrange(0, 1 << 14, 4)
        data[at : at + 4] = chance.choice((0x7FFFFFFF, 0xFFFFFFF0, 0x00FFFFFF)).to_bytes(4, "little")
        path.write_bytes(data)
        try:
            CHECKS[name](path)
        except ValueError:
            refused += 1
    assert refused > 15
    for end in (0, 7, 60, 5000):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=".+"):
            CHECKS[name](path)


def test_an_index_of_a_tensor_that_is_not_there_is_seen(talking: Export, tmp_path: Path) -> None:
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf((talking.bundle / "model.tflite").read_bytes(), 0)
    operator = model.subgraphs[1].operators[3]
    operator.inputs = [*operator.inputs[:-1], len(model.subgraphs[1].tensors)]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path = tmp_path / "model.tflite"
    path.write_bytes(bytes(builder.Output()) + bytes(16 << 20))
    with pytest.raises(Damaged, match="names a Tensor that is not there"):
        check_model(path)


def hub_cache(bundle: Path, folder: Path) -> Path:
    """The bundle as huggingface_hub keeps a snapshot: links into `blobs`."""
    snapshot = folder / "models--someone--gemma" / "snapshots" / ("a" * 40)
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in bundle.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_bundle_in_the_hubs_cache_opens(bundle: Path, tmp_path: Path) -> None:
    """The message was "lies outside the bundle; do not use this bundle"."""
    snapshot = hub_cache(bundle, tmp_path / "hub")
    runtime = gemma_edge.load(snapshot, threads=1)
    assert TextGenerator.open(runtime).tokenizer is not None
    assert runtime.prefill([3, 4]).shape == (runtime.vocab_size,)
    (snapshot / "score.onnx").unlink()
    (snapshot / "score.onnx").symlink_to(bundle / "score.onnx")
    assert "lies outside the bundle" in refusal(snapshot)


@pytest.mark.parametrize("backend", ["onnx", "executorch", "tflite"])
def test_every_backend_runs_from_the_hubs_cache(backend: str, talking: Export, tmp_path: Path) -> None:
    if backend not in Manifest.load(talking.bundle).backends:
        pytest.skip(f"{backend} is not installed")
    snapshot = hub_cache(talking.bundle, tmp_path / "hub")
    runtime = gemma_edge.load(snapshot, backend=backend, threads=1)
    assert runtime.prefill([3, 4]).shape == (runtime.vocab_size,)


@pytest.mark.parametrize("fails", [False, True])
def test_a_bundle_that_is_replaced_while_it_is_opened_is_one_line(
    fails: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime had the old manifest and the new graph."""
    newer = write_toy_bundle(tmp_path / "newer")
    real = load.intact_but_engines

    def replaced(folder: Path, manifest: Manifest) -> None:
        shutil.rmtree(bundle)
        newer.rename(bundle)
        if fails:
            flip(bundle / "tokenizer.json")
        real(folder, manifest)

    monkeypatch.setattr(load, "intact_but_engines", replaced)
    assert "was replaced while it was opened" in refusal(bundle)


def test_a_cache_that_memory_cannot_hold_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    message = refusal(bundle)
    assert "not enough memory" in message and "smaller context" in message
