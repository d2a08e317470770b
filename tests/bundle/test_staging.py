"""How a bundle appears: whatever OUT is, whoever else writes there, and however the export ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_edge.bundle import staging
from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.bundle.staging import staged
from gemma_edge.errors import InputError


def publish(out: Path, text: str = "new", *, force: bool = False) -> None:
    with staged(out, force=force) as work:
        (work / "bundle" / MANIFEST).write_text(text)


def text_of(out: Path) -> str:
    return (out / MANIFEST).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dangling(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "nowhere" / "x")
    return folder / "out"


def looping(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "out")
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "out"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dangling, "where nothing is"),
        (looping, "where nothing is"),
        (below_a_file, "Not a directory"),
        (lambda folder: folder / ("x" * 300), "File name too long"),
        (lambda folder: folder / "a\0b", "null"),
        (lambda folder: Path("/proc/out"), "cannot write"),
    ],
    ids=["dangling", "looping", "below a file", "too long", "NUL", "read-only"],
)
def test_an_out_that_cannot_be_is_one_line_and_leaves_nothing(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    """A dangling link raised NotADirectoryError at the end of the work, a long name OSError."""
    out = make(tmp_path)
    before = names(tmp_path)
    for force in (False, True):
        with pytest.raises(InputError, match=message) as caught:
            publish(out, force=force)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    """The link itself was renamed, and left behind under a hidden name."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for text in ("first", "second"):
        publish(tmp_path / "out", text, force=True)
        assert (tmp_path / "out").is_symlink() and text_of(tmp_path / "disk" / "real") == text
    assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk") == ["real"]


def test_a_file_system_of_its_own_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-v FOLDER:/out` makes OUT a mount point, which cannot be renamed: the export noticed that only after the work."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(InputError, match="pass a folder inside it"):
        publish(out, force=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["x" * 250, "ü" * 120, "x" * 200, "[a-z]*?", "a.partial-1"])
def test_every_name_that_a_folder_can_have_is_made_and_cleaned_up(name: str, tmp_path: Path) -> None:
    """The hidden folder's name was too long, or was taken for a pattern that does not match itself."""
    out = tmp_path / name
    with pytest.raises(RuntimeError), staged(out, force=False):
        assert len(names(tmp_path)) == 1
        raise RuntimeError
    assert names(tmp_path) == []
    kill_while_it_works(out)
    assert len(names(tmp_path)) == 1 and not out.exists()
    publish(out)
    assert names(tmp_path) == [name] and text_of(out) == "new"


WAITING = """
import sys, time
from pathlib import Path
from gemma_edge.bundle.staging import staged
with staged(Path(sys.argv[1]), force=True) as work:
    (work / "bundle" / "half").write_text("x")
    print("working", flush=True)
    time.sleep(60)
"""


def start_work(out: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", WAITING, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    return process


def kill_while_it_works(out: Path) -> None:
    process = start_work(out)
    process.kill()
    process.communicate()


def test_an_export_in_work_is_left_alone_whatever_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two containers that share a folder each export is process 1, and each took the other's work for a leftover."""
    out = tmp_path / "out"
    process = start_work(out)
    try:
        monkeypatch.setattr(staging, "_alive", lambda pid: False)
        publish(out)
        assert len(names(tmp_path)) == 2 and text_of(out) == "new"
    finally:
        process.kill()
        process.communicate()
    publish(out, "newer", force=True)
    assert names(tmp_path) == ["out"] and text_of(out) == "newer"


def test_of_two_exports_to_one_place_the_first_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="exists"), staged(out, force=False) as work:
        (work / "bundle" / MANIFEST).write_text("second")
        publish(out, "first")
    assert text_of(out) == "first" and names(tmp_path) == ["out"]
    with staged(out, force=True) as work:
        (work / "bundle" / MANIFEST).write_text("third")
        publish(out, "between", force=True)
    assert text_of(out) == "third" and names(tmp_path) == ["out"]


def test_there_is_a_whole_bundle_at_every_moment_of_many_replacements(tmp_path: Path) -> None:
    """Between two renames there was no bundle: a reader found none, and a kill at that moment lost it."""
    out = tmp_path / "out"
    publish(out)
    done, missing = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            try:
                missing.extend([] if text_of(out) == "new" else ["another"])
            except FileNotFoundError as error:
                missing.append(str(error))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(100):
        publish(out, force=True)
    done.set()
    reader.join()
    if sys.platform != "linux":
        pytest.skip("folders are exchanged in one step on Linux and macOS")
    assert missing == []


def test_where_folders_cannot_be_exchanged_the_old_one_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    monkeypatch.setattr(staging, "_exchange", lambda new, place: False)
    publish(out, "newer", force=True)
    assert text_of(out) == "newer" and names(tmp_path) == ["out"]
    real = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "bundle":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match="Input/output error"):
        publish(out, "newest", force=True)
    assert text_of(out) == "newer" and names(tmp_path) == ["out"]


def test_a_bundle_moved_aside_by_a_killed_export_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "old")
    kill_while_it_works(out)
    (left,) = (path for path in tmp_path.iterdir() if path != out)
    out.rename(left / staging.OLD)
    with pytest.raises(InputError, match="exists"):
        publish(out)
    assert text_of(out) == "old" and names(tmp_path) == ["out"]


def test_an_error_while_writing_is_one_line_and_one_of_the_model_is_not_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="Permission denied"), staged(out, force=False) as work:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(work / "bundle" / "x"))
    with pytest.raises(OSError, match="model"), staged(out, force=False):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "model"))
    assert names(tmp_path) == []


ENDING = """
import signal, sys, time
from pathlib import Path
from gemma_edge.bundle.staging import staged
from gemma_edge.command import clean_up_when_ended
if sys.argv[2] == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
clean_up_when_ended()
with staged(Path(sys.argv[1]), force=True) as work:
    print("working", flush=True)
    time.sleep(0.5 if sys.argv[2] == "ignored" else 60)
    (work / "bundle" / "manifest.json").write_text("whole")
"""


@pytest.mark.parametrize(
    ("ended_by", "how", "code"),
    [
        (signal.SIGTERM, "plain", 143),
        (signal.SIGHUP, "plain", 129),
        (signal.SIGHUP, "ignored", 0),
    ],
)
def test_an_ended_export_cleans_up(ended_by: int, how: str, code: int, tmp_path: Path) -> None:
    """When the terminal was closed (SIGHUP), the export left everything behind. Under nohup it must go on."""
    command = [sys.executable, "-c", ENDING, str(tmp_path / "out"), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(ended_by)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (code, b"")
    assert names(tmp_path) == (["out"] if code == 0 else [])
