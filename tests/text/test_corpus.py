"""The texts that are shipped: they are there, and reading only the beginning of one changes no token that is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import DEMO, TEXTS
from tokenizers import Tokenizer

from gemma_edge.export.gate.verify import make_gate
from gemma_edge.text import corpus


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def test_every_text_of_the_folder_is_in_one_list_and_can_be_read() -> None:
    files = {path.name for path in TEXTS.glob("*.txt")}
    assert files == {*corpus.HELD_OUT, *corpus.CALIBRATION} and len(files) == 6
    for name in files:
        assert corpus.read(name) == (TEXTS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*corpus.HELD_OUT, *corpus.CALIBRATION])
def test_the_tokens_that_are_used_do_not_depend_on_how_much_more_is_read(name: str, tokenizer: Tokenizer) -> None:
    """The gate used to read 16 characters for each token of a text, and so did gemma-eval: now it is CHARACTERS_PER_TOKEN."""
    text = corpus.read(name)
    whole = ids(tokenizer, text)
    for count in (1, 2, 31, 256, 1152, 2048):
        for characters in (16, corpus.CHARACTERS_PER_TOKEN):
            assert ids(tokenizer, text[: characters * count])[:count] == whole[:count]


@pytest.mark.parametrize("context", [24, 512, 4096])
def test_the_gate_takes_half_of_its_tokens_from_the_beginning_of_each_text(context: int, tokenizer: Tokenizer) -> None:
    gate = make_gate(Path(DEMO / "tokenizer.json"), 4096, 2, context, "quick")
    assert gate.text == "heldout_austen.txt, heldout_kjv.txt"
    count = len(gate.ids) - 1
    first, second = (ids(tokenizer, corpus.read(name)) for name in corpus.HELD_OUT)
    assert gate.ids == [2, *first[: count // 2], *second[: count - count // 2]]
