"""Packed weights in the user's cache, without LiteRT: what is kept, what is believed, and what happens where nothing can be."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from gemma_edge import file_hash, user_cache
from gemma_edge.errors import InputError
from gemma_edge.quantize.calibration.cache import calibration_folder
from gemma_edge.runtimes.engines.weight_cache import kept_weights
from gemma_edge.user_cache import VARIABLE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(b"weights")
    return path


def pack(model: Path, text: str = "packed") -> None:
    with kept_weights(model, "library 1") as path:
        Path(path).write_text(text)


def packs_again(model: Path, library: str = "library 1") -> bool:
    with kept_weights(model, library) as path:
        return not Path(path).exists()


def test_weights_are_packed_once_for_each_model_and_library(place: Path, model: Path, tmp_path: Path) -> None:
    pack(model)
    with kept_weights(model, "library 1") as again:
        assert Path(again).read_text() == "packed"
    other = tmp_path / "other"
    other.write_bytes(b"Weights")
    assert packs_again(other) and packs_again(model, "library 2")
    other.write_bytes(model.read_bytes())
    assert not packs_again(other)  # the same bytes in another place


def test_what_was_packed_by_a_failed_start_is_not_kept(place: Path, model: Path) -> None:
    with pytest.raises(RuntimeError), kept_weights(model, "library") as path:
        Path(path).write_text("half")
        raise RuntimeError
    assert packs_again(model, "library")
    assert [file for file in place.rglob("new*") if file.is_file()] == []


def test_what_a_killed_process_of_the_same_number_left_is_not_read(place: Path, model: Path) -> None:
    with kept_weights(model, "library 1") as path:
        folder = Path(path).parent
    (folder / f"new.{os.getpid()}").write_text("half")
    assert packs_again(model)


def test_without_a_place_to_write_there_is_no_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(model))
    with kept_weights(model, "library") as path:
        assert path == ""


def test_a_model_that_was_changed_is_another_model_whatever_its_dates_say(place: Path, model: Path) -> None:
    """The cache went by the hash that the manifest states, which a damaged copy states too."""
    pack(model)
    found = model.stat()
    model.write_bytes(b"weighty")
    os.utime(model, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert packs_again(model)


def test_a_model_that_changes_while_it_is_packed_leaves_nothing(place: Path, model: Path) -> None:
    with kept_weights(model, "library 1") as path:
        Path(path).write_text("packed")
        model.write_bytes(b"Weights")
    assert list(place.rglob("weights-*")) == []


@pytest.mark.parametrize("damage", ["changed", "truncated", "a link", "writable by others"])
def test_a_packed_file_that_is_not_what_was_written_is_packed_again(
    damage: str, place: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(model)
    (kept,) = place.rglob("weights-*")
    if damage == "a link":
        (tmp_path / "same").write_bytes(kept.read_bytes())
        kept.unlink()
        kept.symlink_to(tmp_path / "same")
    elif damage == "writable by others":
        kept.chmod(0o666)
    else:
        kept.write_text("Packed" if damage == "changed" else "pack")
    with caplog.at_level(logging.WARNING):
        assert packs_again(model)
    assert f"{kept} is damaged or not ours" in caplog.text
    pack(model)
    assert not packs_again(model)


def test_a_hash_is_remembered_for_one_state_of_a_file(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = file_hash.file_hash(model)
    assert list(place.rglob("sha256/*/sha256")) == [], "it may be changed again within the clock's tick"
    monkeypatch.setattr(file_hash, "SETTLED_S", -60.0)
    assert file_hash.file_hash(model) == expected
    (note,) = place.rglob("sha256/*/sha256")
    note.write_text("0" * 64)
    assert file_hash.file_hash(model) == "0" * 64, "it was not looked up"
    os.utime(model)
    assert file_hash.file_hash(model) == expected
    model.rename(model.with_name("moved"))
    model.write_bytes(b"weights")
    os.utime(model, ns=(model.with_name("moved").stat().st_atime_ns, model.with_name("moved").stat().st_mtime_ns))
    assert file_hash.file_hash(model) == expected, "another inode"


@pytest.mark.parametrize("text", ["", "x" * 64, "0" * 63])
def test_a_remembered_hash_that_is_none_is_computed_again(
    text: str, place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hash, "SETTLED_S", -60.0)
    expected = file_hash.file_hash(model)
    (note,) = place.rglob("sha256/*/sha256")
    note.write_text(text)
    assert file_hash.file_hash(model) == expected


def test_the_cache_is_closed_to_others_whatever_the_umask(place: Path, model: Path) -> None:
    before = os.umask(0)
    try:
        pack(model)
        calibration_folder("key")
    finally:
        os.umask(before)
    for path in (place, *place.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("part", ["", "xnnpack", "calibration"])
def test_a_cache_that_others_can_write_to_is_not_used(
    part: str, place: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can write there decides what is computed: the packed weights and the calibrated layers are believed."""
    (place / part).mkdir(parents=True)
    (place / part).chmod(0o777)
    with kept_weights(model, "library 1") as path:
        assert (path == "") == (part != "calibration")
    assert ("make it yours alone with chmod 700" in caplog.text) == (part != "calibration")
    if part != "xnnpack":
        with pytest.raises(InputError, match=r"has mode 777.*chmod 700"):
            calibration_folder("key")


def test_a_cache_of_another_user_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    with pytest.raises(user_cache.ForeignFolder, match=f"belongs to user {place.stat().st_uid}"):
        user_cache.folder("xnnpack", "key")


def test_a_link_in_the_cache_is_not_followed_but_the_cache_may_be_one(place: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "disk")
    assert user_cache.folder("xnnpack", "key").is_dir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (place / "calibration").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(user_cache.ForeignFolder, match="is a link or no folder"):
        user_cache.folder("calibration", "key")
