"""The bundle's tokenizer, against transformers where it has the same function."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import DEMO
from support.toys import END_OF_TURN, EOS, toy_manifest
from transformers import AutoTokenizer

from gemma_edge.errors import InputError
from gemma_edge.text.tokenizer import Tokenizer

BOS, START_OF_TURN = 2, 4
TEXTS = ["It was a truth", " two  spaces ", "line\nbreak\n\n", "Ünïcödé 😀🇩🇪 日本語", "\ttab", "a", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO, toy_manifest())


@cache
def vocabulary() -> dict[str, int]:
    found: dict[str, int] = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    return found


def byte(tokenizer: Tokenizer, value: int) -> int:
    """The byte-fallback token of a byte."""
    return vocabulary()[f"<0x{value:02X}>"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_comes_first_exactly_once(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("Hello", bos=False)
    assert BOS not in plain
    assert tokenizer.encode("Hello") == tokenizer.encode("<bos>Hello") == [BOS, *plain]
    assert tokenizer.encode("") == tokenizer.encode("<bos>") == [BOS]


def test_special_tokens_in_a_text_become_their_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<start_of_turn>user\nHi<end_of_turn>", bos=False)
    assert (ids[0], ids[-1]) == (START_OF_TURN, END_OF_TURN)


def test_stop_ids_are_those_of_the_config_and_the_end_of_a_turn(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids == {EOS, END_OF_TURN}


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(tokenizer.stream(tokenizer.encode(text))) == text


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é😀", bos=False)
    assert len(ids) > 2
    assert list(tokenizer.stream(ids)) == ["é", "😀"]


def test_a_character_cut_off_at_the_end_is_dropped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀", bos=False)
    for kept in range(1, len(ids)):
        assert "".join(tokenizer.stream(ids[:kept])) == "a"


def test_bytes_that_are_no_text_do_not_stop_the_stream(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("it", bos=False)
    ids = [*word, byte(tokenizer, 0xE2), *word, byte(tokenizer, 0xFF), byte(tokenizer, 0x80), *word, *word]
    text = "".join(tokenizer.stream(ids))
    assert text == tokenizer.decode(ids)
    assert text.replace("\ufffd", "") == "it" * 4


def test_a_byte_before_others_that_are_no_text_stays(tokenizer: Tokenizer) -> None:
    """It was an exception of the library's, which decodes bytes in a row all or none: after the `0` was out, it was gone."""
    word = tokenizer.encode("it", bos=False)
    ids = [byte(tokenizer, 0x30), byte(tokenizer, 0xE2), *word, byte(tokenizer, 0x31), *word]
    assert "".join(tokenizer.stream(ids)) == "0\ufffdit1it"


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What Kotlin's `TextStream` gives: bytes in a row are text as soon as they are UTF-8 together, else each is U+FFFD."""
    text, run = "", b""
    for token in ids:
        each = tokenizer.token_bytes(token)
        if token != byte(tokenizer, each[0]):
            text, run = text + "\ufffd" * len(run) + each.decode(), b""
            continue
        run += each
        try:
            text, run = text + run.decode(), b""
        except UnicodeDecodeError:
            pass
    return text


def test_each_byte_that_is_no_text_is_one_character_as_in_kotlin(tokenizer: Tokenizer) -> None:
    """After a byte that was text already, one U+FFFD stood for all that followed."""
    rng = np.random.default_rng(0)
    some = [byte(tokenizer, each) for each in (0x30, 0x7F, 0x80, 0xC3, 0xE2, 0xF0, 0xFF)]
    some += tokenizer.encode("it", bos=False)
    for _ in range(200):
        ids = [int(token) for token in rng.choice(some, 12)]
        assert "".join(tokenizer.stream(ids)) == streamed(tokenizer, ids)


def test_no_tokens_at_all_end_the_stream(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    some = [byte(tokenizer, each) for each in (0x30, 0x7F, 0x80, 0xC3, 0xE2, 0xF0, 0xFF)] + tokenizer.encode("it é")
    for _ in range(200):
        ids = [int(token) for token in rng.choice(some, 40)]
        text = "".join(tokenizer.stream(ids))
        assert text.count("it") == tokenizer.decode(ids).count("it")


def test_special_tokens_are_not_printed(tokenizer: Tokenizer) -> None:
    ids = [BOS, *tokenizer.encode("it", bos=False), EOS]
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == "it"


def test_truncation_left_in_the_file_by_training_is_ignored(tmp_path: Path) -> None:
    """A tokenizer.json saved after training cuts every prompt at its `max_length`, in silence."""
    data = json.loads((DEMO / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert len(Tokenizer(tmp_path, toy_manifest()).encode("It was a truth universally acknowledged")) > 4


def test_text_that_is_no_utf8_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not valid UTF-8 at character 2"):
        tokenizer.encode(b"ab\xff".decode("utf-8", errors="surrogateescape"))


def test_a_bundle_without_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="is a token-level bundle, without a tokenizer: give token ids"):
        Tokenizer(DEMO, toy_manifest(tokenizer=False))


def test_a_damaged_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer \("):
        Tokenizer(tmp_path, toy_manifest())


def test_a_tokenizer_outside_the_bundle_is_refused(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "tokenizer.json").symlink_to("../tokenizer.json")
    with pytest.raises(InputError, match="outside the bundle"):
        Tokenizer(tmp_path / "bundle", toy_manifest())
