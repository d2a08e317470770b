"""Packed weights in the user's cache, without LiteRT: what is kept, and what happens where nothing can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_edge.runtimes.engines.weight_cache import kept_weights
from gemma_edge.user_cache import VARIABLE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def test_weights_are_packed_once_for_each_model_and_library(place: Path) -> None:
    with kept_weights("model", "library 1") as path:
        Path(path).write_text("packed")
    with kept_weights("model", "library 1") as again:
        assert again != path and Path(again).read_text() == "packed"
    for model, library in (("other", "library 1"), ("model", "library 2")):
        with kept_weights(model, library) as path:
            assert not Path(path).exists()


def test_what_was_packed_by_a_failed_start_is_not_kept(place: Path) -> None:
    with pytest.raises(RuntimeError), kept_weights("model", "library") as path:
        Path(path).write_text("half")
        raise RuntimeError
    with kept_weights("model", "library") as path:
        assert not Path(path).exists()
    assert [file for file in place.rglob("*") if file.is_file()] == []


def test_without_a_place_to_write_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with kept_weights("model", "library") as path:
        assert path == ""
