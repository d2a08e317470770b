"""Our reader of safetensors files against the library's own writer and reader, and files that are larger than the memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import FINAL_NORM, TABLE, norm_names, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.safetensors_reader import DTYPES, SafetensorsFile

BIG = 64 << 30  # bytes of the table: more than the address space that the test leaves
SPARE = 4 << 30


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_every_type_and_shape_is_read_bit_for_bit_as_the_library_reads_it(tmp_path: Path) -> None:
    bits = torch.randint(0, 2, (3, 5, 4), dtype=torch.uint8)
    tensors = {name: bits.repeat(1, 1, 8).view(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"empty": torch.zeros(0, 4), "number": torch.tensor(2.5), "no columns": torch.zeros(4, 0)}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt", "why": "ü"})
    file, expected = SafetensorsFile(tmp_path / "file"), load_file(tmp_path / "file")
    assert file.metadata == {"format": "pt", "why": "ü"} and file.tensors.keys() == expected.keys()
    for name, value in file.whole().items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape
        assert torch.equal(value.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))
    for start, stop in ((0, 1), (1, None), (2, 9), (3, 3), (-1, None)):
        assert torch.equal(file.rows("BF16", start, stop), expected["BF16"][start:stop])


DAMAGED: dict[str, tuple[object, bytes]] = {
    "no JSON": (b"<html>", b""),
    "nested deep": (b"[" * 100_000, b""),
    "a list": ([], b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "an entry is a list": ({"a": []}, b""),
    "negative offset": ({"a": entry(-1, 0)}, b"x"),
    "fraction": ({"a": entry(0, 1, shape=[1.0])}, b"x"),
    "true": ({"a": entry(0, 1, shape=[True])}, b"x"),
    "fewer bytes than its shape": ({"a": entry(0, 4, shape=[5])}, b"1234"),
    "offsets that wrap": ({"a": entry(0, 4, shape=[1 << 63, 1 << 62])}, b"1234"),
    "behind the end": ({"a": entry(0, 5)}, b"1234"),
    "backwards": ({"a": entry(4, 0, "F4", [4])}, b"1234"),
    "an overlap": ({"a": entry(0, 3), "b": entry(2, 4)}, b"1234"),
    "a hole": ({"a": entry(0, 1), "b": entry(2, 4)}, b"1234"),
    "more data than tensors": ({"a": entry(0, 3)}, b"1234"),
    "a name twice": (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', b""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_header_that_does_not_fit_is_one_line(name: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "file", *DAMAGED[name])
    with pytest.raises(InputError, match="file is damaged or truncated"):
        SafetensorsFile(path)


def test_a_header_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", 1 << 40))
    os.truncate(path, 1 << 41)
    with pytest.raises(InputError, match="at most 100000000 are possible"):
        SafetensorsFile(path)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    problems = {
        "pipe": "pipe is a pipe, not a regular file",
        "folder": "folder is a folder, not",
        "missing": "has no missing",
    }
    for name, problem in problems.items():
        with pytest.raises(InputError, match=problem):
            SafetensorsFile(tmp_path / name)


def test_a_file_that_was_replaced_is_read_by_its_new_header(tmp_path: Path) -> None:
    """--distill writes shards anew under a checkpoint that is open."""
    path = tmp_path / "file"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    file = SafetensorsFile(path)
    save_file({"0": torch.zeros(100), "b": torch.arange(8.0)}, tmp_path / "other")
    (tmp_path / "other").rename(path)
    assert_close(file.rows("b"), torch.arange(8.0), rtol=0.0, atol=0.0)
    with pytest.raises(InputError, match="tensor a is missing"):
        file.rows("a")


def test_a_tensor_of_a_type_that_torch_does_not_have_is_named_when_it_is_read(tmp_path: Path) -> None:
    file = SafetensorsFile(raw(tmp_path / "file", {"a": entry(0, 4, "F4", [8])}, b"1234"))
    with pytest.raises(InputError, match="tensor a is F4; supported: BOOL"):
        file.rows("a")


def large_model(source: Path, folder: Path) -> Path:
    """A model in one sparse file of zeros whose table alone has BIG bytes."""
    folder.mkdir()
    raw_config = json.loads((source / "config.json").read_text())
    raw_config["hidden_size"] = 1 << 13
    raw_config["vocab_size"] = BIG // 2 // raw_config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(raw_config))
    config = GemmaConfig.from_hf(folder)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in weight_shapes(config).items()}
    shapes |= {name: (config.hidden_size,) for name in norm_names(config)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = entry(end, end + size, "BF16", list(shape))
        end += size
    path = raw(folder / "model.safetensors", header)
    os.truncate(path, path.stat().st_size + end)
    return folder


LIMITED = """
import resource, sys
from pathlib import Path
import torch
import gemma_edge.export.onnx.backend, gemma_edge.quantize.api
from gemma_edge.export import api, cli, plan
from gemma_edge.model.checkpoint import Checkpoint
torch.ones(64, 64) @ torch.ones(64, 64)  # its threads have their stacks now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
checkpoint = Checkpoint.open(Path(sys.argv[1]))
rows = checkpoint.config.vocab_size
assert torch.equal(checkpoint.rows(sys.argv[3], rows - 3, rows), torch.zeros(3, checkpoint.config.hidden_size))
assert torch.equal(checkpoint.vector(sys.argv[4]), torch.zeros(checkpoint.config.hidden_size))
cli.main(["plan", sys.argv[1], "--target", "desktop", "--bits", "8", "--quality", "fast", "--ram", "900", "--context", "64"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' /proc and its limit on the address space")
def test_a_file_larger_than_the_memory_is_planned_and_read(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The library maps a file private and writable for torch, which counts as memory: `plan` of a 27B in one file failed."""
    folder = large_model(checkpoint(), tmp_path / "model")
    command = [sys.executable, "-c", LIMITED, str(folder), str(SPARE), TABLE, FINAL_NORM]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "onnx" in done.stdout
