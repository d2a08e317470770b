"""Lowered halves that are kept between exports."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.checkpoints import make_checkpoint

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'gemma-edge[executorch]'")

from gemma_edge.export.executorch import kept
from gemma_edge.export.executorch.kept import kept_template
from gemma_edge.export.executorch.packing import Weight, random_weight
from gemma_edge.export.executorch.seams import AttendHalf, Half, Limits, block_half
from gemma_edge.export.executorch.templates import Delegate, lower_half
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.recipe import QuantConfig
from gemma_edge.user_cache import VARIABLE

INT4 = QuantConfig(4, 32)


def test_a_half_is_lowered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a file was damaged it is lowered again, and every time where there is no cache or no room in it."""
    config, limits = GemmaConfig.from_hf(make_checkpoint(tmp_path / "model")), Limits(7, 14)
    generator, lowered = torch.Generator().manual_seed(0), list[Delegate]()

    def counted(half: Half, limits: Limits) -> Delegate:
        """The first half's delegate serves all, which takes seconds less."""
        lowered.append(lowered[0] if lowered else lower_half(half, limits))
        return lowered[0]

    def weight(name: str, rows: int, columns: int) -> Weight:
        return random_weight(INT4, rows, columns, generator)

    def made(about: object = "same") -> Delegate:
        return kept_template(partial(block_half, AttendHalf, config, 0), weight, limits, (config, about)).delegate

    monkeypatch.setattr(kept, "lower_half", counted)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    first, second = made(), made()
    assert len(lowered) == 1
    assert_equal(first, second)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-9], b"", whole.replace(b'"outputs', b'"outpost')):
        file.write_bytes(damaged)
        assert made().arguments
    assert len(lowered) == 4
    made("other")
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    made()
    assert len(lowered) == 6

    def full(*arguments: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(kept, "save_file", full)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "full"))
    made()
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]


def assert_equal(one: Delegate, two: Delegate) -> None:
    """Tensors among the arguments compared by value."""
    assert (one.blob, one.keys, one.shared, one.outputs) == (two.blob, two.keys, two.shared, two.outputs)
    assert len(one.arguments) == len(two.arguments)
    for a, b in zip(one.arguments, two.arguments, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
