"""Calibration text: where it may come from, how it is cut, what is refused in one line, and where finished layers are kept."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import DEMO, TEXTS
from tokenizers import Tokenizer
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.quantize.calibration import cache
from gemma_edge.quantize.calibration.text import WINDOW, windows
from gemma_edge.quantize.options import CalibrationText
from gemma_edge.text import corpus

BOS = 2
AUSTEN = (TEXTS / "heldout_austen.txt").read_text()
KJV = (TEXTS / "heldout_kjv.txt").read_text()


def cut(*paths: Path, tokens: int = 4096, longest: int = WINDOW, **options: bool | int) -> Tensor:
    return windows(DEMO, BOS, longest, CalibrationText(paths, tokens, **options))  # type: ignore[arg-type]


def said(found: Tensor) -> str:
    return str(Tokenizer.from_file(str(DEMO / "tokenizer.json")).decode(found.flatten().tolist()))


def pieces(found: Tensor) -> list[str]:
    return [said(window) for window in found]


@pytest.fixture
def austen(tmp_path: Path) -> Path:
    path = tmp_path / "austen.txt"
    path.write_text(AUSTEN)
    return path


def test_every_window_begins_with_bos_and_no_other_token_is_one(austen: Path) -> None:
    for found in (cut(), cut(austen), cut(austen, chat=True)):
        assert found.shape == (8, 512) and found.dtype == torch.int64
        assert (found[:, 0] == BOS).all() and (found[:, 1:] != BOS).all()


def test_windows_are_pieces_of_the_text_and_never_the_same_twice(austen: Path) -> None:
    found = pieces(cut(austen, tokens=16384))
    assert all(piece in AUSTEN for piece in found)
    places = sorted(AUSTEN.index(piece) for piece in found)
    # windows do not overlap: the next one begins where this one has ended
    lengths = {AUSTEN.index(piece): len(piece) for piece in found}
    assert all(place + lengths[place] <= following for place, following in zip(places, places[1:], strict=False))


def test_a_context_shorter_than_a_window_cuts_shorter_windows() -> None:
    assert cut(tokens=1024, longest=128).shape == (8, 128)
    assert cut(tokens=300).shape == (1, 300)


def test_the_seed_draws_other_passages_and_only_that(austen: Path) -> None:
    assert torch.equal(cut(austen, seed=1), cut(austen, seed=1))
    assert not torch.equal(cut(austen, seed=1), cut(austen))


def test_every_shipped_text_has_its_share() -> None:
    texts = [(TEXTS / name).read_text() for name in corpus.CALIBRATION]
    found = pieces(cut(tokens=8192))
    assert [sum(piece in text for piece in found) for text in texts] == [4, 4, 4, 4]


def test_shipped_text_is_not_what_the_gate_judges_by() -> None:
    for piece in pieces(cut(tokens=1 << 20)):
        assert piece[100:200] not in AUSTEN and piece[100:200] not in KJV


def test_a_folder_is_read_with_what_is_below_it_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "kjv.md").write_text(KJV)
    (tmp_path / "austen.txt").write_text(AUSTEN)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    found = pieces(cut(tmp_path))
    assert [sum(piece in text for piece in found) for text in (AUSTEN, KJV)] == [4, 4]
    again = pieces(cut(tmp_path / "austen.txt", tmp_path / "deep"))
    assert again == found


def test_files_too_short_for_a_window_are_joined(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_text(AUSTEN[i * 200 : i * 200 + 200])
    found = cut(tmp_path, tokens=2048)
    assert found.shape == (4, 512)


def test_json_lines_hold_texts_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    odd = "a line\u2028that\u0085a Unicode reader\x0bwould cut"  # these three are no ends of a line in JSON
    turns = [{"role": "user", "content": "Call me Ishmael."}, {"role": "assistant", "content": "Ishmael!"}]
    lines = [{"text": odd}, {"messages": turns}, {"text": AUSTEN[:3000]}]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8-sig")
    found = cut(path, tokens=512)
    whole = Tokenizer.from_file(str(DEMO / "tokenizer.json")).decode(
        found.flatten().tolist(), skip_special_tokens=False
    )
    assert odd in whole
    assert "<start_of_turn>user\nCall me Ishmael.<end_of_turn>\n<start_of_turn>model\nIshmael!<end_of_turn>" in whole


def test_plain_text_becomes_turns_where_a_chat_is_asked_for(austen: Path) -> None:
    found = cut(austen, chat=True)
    turns = [
        Tokenizer.from_file(str(DEMO / "tokenizer.json")).token_to_id(name)
        for name in ("<start_of_turn>", "<end_of_turn>")
    ]
    assert all((window == turn).sum() >= 3 for window in found for turn in turns)
    assert not torch.isin(cut(austen), torch.tensor(turns)).any()


def test_of_a_long_file_only_the_beginning_is_read(tmp_path: Path) -> None:
    """A corpus of gigabytes was read, and held as tokens, to its end."""
    parts = [AUSTEN[start : start + 1000] for start in range(0, 100_000, 1000)]
    lines = "".join(json.dumps({"text": part}) + "\n" for part in parts)
    for name, text in (("long.txt", "".join(parts)), ("long.jsonl", lines)):
        (tmp_path / name).write_bytes(text.encode() + b"\xff" * 100_000)  # would be refused
        assert cut(tmp_path / name, tokens=1024).shape == (2, 512)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "0 tokens; at least 256 are needed: give more"),
        ("blank.jsonl", b"\n\n\n", "0 tokens"),
        ("tiny.txt", b"Call me Ishmael.", r"\d tokens; at least 256"),
        ("binary.txt", b"\xff\xfe\x00" * 500, "binary.txt cannot be read as UTF-8 text"),
        ("late.jsonl", b'{"text": "a"}\n' * 30 + b"\xff\n", "late.jsonl cannot be read as UTF-8 text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', r'bad.jsonl:2 is no {"text": ...} or {"messages": \[...\]}'),
        ("other.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', r"other.jsonl:3 is no .*'text'"),
        ("list.jsonl", b'["text"]\n', "list.jsonl:1 is no"),
        ("number.jsonl", b"5\n", "number.jsonl:1 is no"),
        ("null.jsonl", b'{"text": null}\n', "null.jsonl:1 is no .*NoneType"),
        ("system.jsonl", b'{"messages": [{"role": "system", "content": "x"}]}', "system.jsonl:1 is no .*System role"),
        ("roles.jsonl", b'{"messages": ["hello"]}', "roles.jsonl:1 is no"),
        ("none.jsonl", b'{"messages": null}', "none.jsonl:1 is no"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)  # fmt: skip
def test_text_that_cannot_be_used_is_refused_in_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        cut(tmp_path / name)
    assert "Traceback" not in str(caught.value)


def test_paths_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; give a text file, a folder or JSON lines"):
        cut(tmp_path / "nowhere")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no \.txt, \.md, \.jsonl file"):
        cut(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="folder.txt is a folder, not a regular file"):
        cut(tmp_path)


def test_a_text_of_another_language_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "russian.txt"
    path.write_text("Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. " * 40)
    assert cut(path, tokens=1024).numel() == 1024
    assert "is spelled in single bytes: is it in a language of this model?" in caplog.text
    caplog.clear()
    cut(tokens=1024)
    assert caplog.text == ""


def test_less_text_than_asked_for_is_a_warning(austen: Path, caplog: pytest.LogCaptureFixture) -> None:
    austen.write_text(AUSTEN[:6000])
    found = cut(austen)
    assert 512 <= found.numel() < 2048
    assert f"only {found.numel()} of 4096 tokens of calibration text" in caplog.text


def test_without_a_tokenizer_there_is_nothing_to_cut(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json, so no text to calibrate on: pass method mse"):
        windows(tmp_path, BOS, WINDOW, CalibrationText(tokens=512))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer .*belongs to the model"):
        windows(tmp_path, BOS, WINDOW, CalibrationText(tokens=512))


# Where finished layers are kept


def test_the_cache_is_where_the_variable_says_else_where_caches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(cache.VARIABLE, "")
    assert cache.root() == tmp_path / "home" / ".cache" / "gemma-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "gemma-edge"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "mine"))
    assert cache.calibration_folder("key") == tmp_path / "mine" / "calibration" / "key"
    assert (tmp_path / "mine" / "calibration" / "key").is_dir()


def test_calibrations_that_nobody_used_for_a_week_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    old, recent, used = (cache.calibration_folder(key) for key in ("old", "recent", "used"))
    (old / "layer-000.safetensors").write_text("x")
    for folder, days in ((old, 8), (recent, 6), (used, 30)):
        then = time.time() - days * 24 * 3600
        os.utime(folder, (then, then))
    cache.calibration_folder("used")
    assert sorted(folder.name for folder in old.parent.iterdir()) == ["recent", "used"]


def test_a_cache_that_cannot_be_written_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a traceback, in a container whose user has no home."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file.*set GEMMA_EDGE_CACHE to a folder that can be written to"):
        cache.calibration_folder("key")
