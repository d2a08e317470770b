"""A model's tokenizer and chat template are tried before an export. Damaged ones are refused; warnings name what looks wrong."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import DEMO
from support.toys import TOY_CONFIG, edit_json

from gemma_edge.errors import InputError
from gemma_edge.text.check import check_text_files

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
STOPS = TOY_CONFIG.eos_token_id
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    edit(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))


def remove(model: dict[str, Any], count: int) -> list[int]:
    """Remove pieces that no other piece is made of, with their merges; their ids."""
    parts = {part for pair in model["merges"] for part in pair}
    pieces = ["".join(pair) for pair in model["merges"] if "".join(pair) not in parts][-count:]
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in pieces]
    ids = [model["vocab"].pop(piece) for piece in pieces]
    return ids


def test_a_whole_folder_passes_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert check_text_files(folder, TOY_CONFIG) == STOPS and check_text_files(DEMO, TOY_CONFIG) == STOPS
    (folder / "tokenizer.json").unlink()
    assert check_text_files(folder, TOY_CONFIG) == STOPS
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("text", ['{"bos_token": "<bos', "{}{}", "\ufeff{}", "[1]", "{" * 100_000])
def test_a_damaged_file_is_refused(name: str, text: str, folder: Path) -> None:
    """A broken tokenizer_config.json passed the export, and chatting was refused later."""
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"{folder / name} "):
        check_text_files(folder, TOY_CONFIG)


@pytest.mark.parametrize("value", [["<bos>"], 2, {"content": 5}, {}])
def test_a_special_token_that_is_no_text_is_refused(value: object, folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", bos_token=value)
    if value == {}:
        check_text_files(folder, TOY_CONFIG)  # no content is no token, as null
    else:
        with pytest.raises(InputError, match="bos_token is (list|int), not a token's text"):
            check_text_files(folder, TOY_CONFIG)


def test_an_id_that_the_table_does_not_have_is_refused(folder: Path) -> None:
    def move(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary[list(vocabulary)[3000]] = 1_835_005_505

    edit_tokenizer(folder, move)
    with pytest.raises(
        InputError, match=r"has the id 1835005505, but the model has a vocabulary of 4096; take the tokeniz"
    ):
        check_text_files(folder, TOY_CONFIG)


def test_a_missing_piece_gives_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The bundle's texts silently became other tokens than the original's."""

    def drop(data: dict[str, Any]) -> None:
        remove(data["model"], 1)

    edit_tokenizer(folder, drop)
    check_text_files(folder, TOY_CONFIG)
    assert any("1 ids have no token" in message for message in caplog.messages)


def test_a_byte_without_a_piece_is_refused(folder: Path) -> None:
    def rename(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["something else"] = vocabulary.pop("<0xF0>")

    edit_tokenizer(folder, rename)
    with pytest.raises(InputError, match="has no token for the byte 240, <0xF0>; take the tokenizer.json"):
        check_text_files(folder, TOY_CONFIG)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "cannot be read"),
        ("{{ nothing.at.all }}", "cannot write the conversation"),
        ("{% if messages | length > 1 %}{{ [] + '' }}{% endif %}{{ messages[0]['content'] }}", "cannot write"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too many steps"),
    ],
)
def test_a_template_that_fails_is_refused(template: str, words: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=words):
        check_text_files(folder, TOY_CONFIG)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('documents are needed') }}", "a conversation with 1 messages: .* documents are needed"),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}",
            "with 3",
        ),
        ("{{ bos_token }}", "leaves out what the user says"),
    ],
)
def test_a_template_that_refuses_gives_a_warning(
    template: str, words: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    caplog.set_level(logging.WARNING)
    assert check_text_files(folder, TOY_CONFIG) == STOPS
    assert re.search(words, "\n".join(caplog.messages))


def add_tokens(folder: Path, *contents: str, special: bool = True) -> list[int]:
    """Add tokens in the places of others; their ids."""
    ids: list[int] = []

    def add(data: dict[str, Any]) -> None:
        ids.extend(remove(data["model"], len(contents)))
        for content, token in zip(contents, ids, strict=True):
            added = {**data["added_tokens"][0], "id": token, "content": content, "special": special}
            data["added_tokens"].append(added)
            data["model"]["vocab"][content] = token

    edit_tokenizer(folder, add)
    return ids


def test_the_end_of_the_templates_turn_becomes_a_stop_id(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fine-tune with ChatML beside an older generation_config.json ran on into the user's turn."""
    ids = add_tokens(folder, "<|im_start|>", "<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHATML)
    assert check_text_files(folder, TOY_CONFIG) == (*STOPS, ids[1])
    assert any('"<|im_end|>" ends a turn in the chat template' in message for message in caplog.messages)


@pytest.mark.parametrize("value", ["<|done|>", {"content": "<|done|>", "special": True}])
def test_the_tokenizers_eos_token_becomes_a_stop_id(
    value: object, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainers set it to the token that they train the model to end with, and leave generation_config.json as it was."""
    (end,) = add_tokens(folder, "<|done|>", special=False)
    edit_json(folder / "tokenizer_config.json", eos_token=value)
    assert check_text_files(folder, TOY_CONFIG) == (*STOPS, end)
    (message,) = caplog.messages
    assert f'"<|done|>" is the tokenizer\'s eos_token, but is not among the stop ids {list(STOPS)}' in message


def test_a_token_that_ends_both_turn_and_text_is_added_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, end = add_tokens(folder, "<|im_start|>", "<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHATML)
    edit_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    assert check_text_files(folder, TOY_CONFIG) == (*STOPS, end)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("value", ["<end_of_turn>", "no token of the tokenizer", None])
def test_an_eos_token_that_ends_texts_already_or_nowhere_changes_nothing(
    value: str | None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=value)
    assert check_text_files(folder, TOY_CONFIG) == STOPS and caplog.messages == []
