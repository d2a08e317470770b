"""Files written slice by slice, read back by the safetensors library."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.quantize.checkpoint.safetensors_writer import DTYPE_NAMES, Spec, plain_spec, write_safetensors

NUMBERS = torch.arange(60).reshape(12, 5)


def slices(value: Tensor, step: int) -> Iterator[Tensor]:
    return (value[start : start + step] for start in range(0, len(value), step))


def spec(name: str, value: Tensor, step: int = 5) -> Spec:
    return Spec(name, value.dtype, tuple(value.shape), lambda: slices(value, step))


@pytest.mark.parametrize("step", [1, 5, 12, 100])
def test_the_library_reads_what_was_written_in_slices(step: int, tmp_path: Path) -> None:
    values = {str(dtype): NUMBERS.to(dtype) for dtype in DTYPE_NAMES}
    values["vector"] = torch.arange(3.0)
    write_safetensors(tmp_path / "file", [spec(name, value, step) for name, value in values.items()])
    found = load_file(tmp_path / "file")
    assert set(found) == set(values)
    for name, value in values.items():
        assert_close(found[name], value, rtol=0.0, atol=0.0)


def test_slices_that_are_no_plain_rows_in_memory_are_written_as_they_read(tmp_path: Path) -> None:
    value = NUMBERS.t().float()  # (5, 12), its rows are columns in memory
    write_safetensors(tmp_path / "file", [spec("a", value, 2)])
    assert_close(load_file(tmp_path / "file")["a"], value, rtol=0.0, atol=0.0)


def test_transformers_finds_the_format_it_asks_for(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", [spec("a", NUMBERS)])
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_data_starts_at_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    """Else a reader that maps the file gets unaligned numbers."""
    for length in range(1, 10):
        write_safetensors(tmp_path / "file", [spec("n" * length, NUMBERS)])
        raw = (tmp_path / "file").read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        assert size % 8 == 0
        assert json.loads(raw[8 : 8 + size])["n" * length]["shape"] == [12, 5]
        assert raw[8 + size :] == NUMBERS.numpy().tobytes()


def test_only_one_slice_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """The reason why the library's own writer is not used: it wants the whole file in memory."""
    path, sizes = tmp_path / "file", []

    def data() -> Iterator[Tensor]:
        for _ in range(4):
            (file,) = tmp_path.iterdir()  # under another name until it is complete
            sizes.append(file.stat().st_size)
            yield torch.zeros(1, 1 << 16)  # larger than any buffer of the file

    write_safetensors(path, [Spec("a", torch.float32, (4, 1 << 16), data)])
    assert [after - before for before, after in zip(sizes[1:], sizes[2:], strict=False)] == [4 << 16] * 2


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([NUMBERS[:5]], r"a: 200 bytes for 480"),  # too few rows
        ([NUMBERS, NUMBERS[:1]], r"a: 520 bytes for 480"),  # too many
        ([], r"a: 0 bytes for 480"),
        ([NUMBERS[:6], NUMBERS[6:].int()], r"a: a slice of torch\.int32 for a tensor of torch\.int64"),
    ],
)
def test_slices_that_do_not_make_up_the_tensor_are_a_bug(parts: list[Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=words):
        write_safetensors(tmp_path / "file", [Spec("a", torch.int64, (12, 5), lambda: iter(parts))])
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_safetensors(path, [plain_spec("a", NUMBERS)])
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_safetensors(path, [Spec("a", torch.int64, (12, 5), lambda: iter([]))])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
