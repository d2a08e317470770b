"""Tries a model's tokenizer and chat template before an export. Damaged ones are refused; a warning names what looks wrong.

Without this check a bundle could turn text into other tokens than the original, or fail in a chat.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers.models import BPE

from gemma_edge.bundle.codec import shown
from gemma_edge.errors import InputError
from gemma_edge.reading import present, read_json
from gemma_edge.text.chat import CONFIG_FILE, ChatTemplate, ConversationRefused
from gemma_edge.text.tokenizer import END_OF_TURN, TOKENIZER_FILE, TOKENIZER_HINT, TokenIds, open_tokenizer

logger = logging.getLogger(__name__)

JSON_FILES = (CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "generation_config.json")
TEMPLATE_HINT = "repair or remove the chat template"
SAMPLE = "It was 12:30 -- naïve façade, “quoted”;\n\n\tdef f(x):  # 東京 🙂 👩‍🚀 \x7f\u200b\n"
QUESTION, ANSWER = "What is the capital of France?", "Paris, on the Seine."


class TextConfig(TokenIds, Protocol):
    """The part of a model's configuration that its tokenizer must fit."""

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""


def check_text_files(folder: Path, config: TextConfig) -> tuple[int, ...]:
    """Load a folder's tokenizer and chat template, and use both.

    Args:
        folder: a Hugging Face folder; without a tokenizer.json only the other files are read.
        config: the model's.

    Returns:
        The model's stop ids, with the token that ends a turn in the chat template and the tokenizer's own eos_token.

    Raises:
        InputError: a file cannot be read, a token has an id that the model's table does not have, a byte has no token, or the
            template fails on a conversation of one turn.
    """
    for name in JSON_FILES:
        if present(folder / name):
            read_json(folder / name, "take the one that belongs to the model")
    template = ChatTemplate.of_folder(folder)
    conversation = _render(template)
    path = folder / TOKENIZER_FILE
    if not present(path):
        return tuple(config.eos_token_id)
    tokenizer = open_tokenizer(path, TOKENIZER_HINT)
    _check_ids(tokenizer, path, config.vocab_size)
    _check_bytes(tokenizer, path)
    if tokenizer.decode(tokenizer.encode(SAMPLE, add_special_tokens=False).ids) != SAMPLE:
        logger.warning("%s: decoding the tokens of a text does not give the same text", path)
    bos = tokenizer.token_to_id(template.bos)
    if bos != config.bos_token_id:
        logger.warning(
            "%s: %s has the id %s, the model's texts begin with %d", path, template.bos, bos, config.bos_token_id
        )
    _, answered, after = conversation.rpartition(ANSWER)
    ends = {
        "ends a turn in the chat template": next(_special(tokenizer, after), None) if answered else None,
        "is the tokenizer's eos_token": tokenizer.token_to_id(template.eos),
    }
    return _stop_ids(path, tokenizer, ends, config)


def _render(template: ChatTemplate) -> str:
    """A conversation of three turns up to the end of the answer; "" if the template takes none."""
    user, model = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    for messages in ([user], [user, model, user]):
        try:
            if QUESTION not in template.render(messages):
                logger.warning("the chat template leaves out what the user says")
        except ConversationRefused as error:
            logger.warning("a conversation with %d messages: %s", len(messages), error)
            return ""
        except InputError as error:
            raise InputError(f"{error}", hint=TEMPLATE_HINT) from None
    return template.render([user, model], add_generation_prompt=False)


def _check_ids(tokenizer: tokenizers.Tokenizer, path: Path, vocab_size: int) -> None:
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    every = tokenizer.get_vocab(with_added_tokens=True)
    for piece, token in every.items():
        if token >= vocab_size and piece in pieces:
            raise InputError(
                f"{path}: {shown(piece)} has the id {token}, but the model has a vocabulary of {vocab_size}",
                hint=TOKENIZER_HINT,
            )
        if token >= vocab_size:
            logger.warning(
                "%s: %s has the id %d, but the model has a vocabulary of %d: a text that contains it cannot be used",
                path,
                shown(piece),
                token,
                vocab_size,
            )
    inside = {token for token in every.values() if token < vocab_size}
    missing = [token for token in range(max(inside, default=-1)) if token not in inside]
    if missing:
        logger.warning(
            "%s: %d ids have no token, the first is %d; if the model was made with another tokenizer.json, its texts"
            " become other tokens here",
            path,
            len(missing),
            missing[0],
        )


def _check_bytes(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Refuse a tokenizer in which a byte has no token: texts in rare scripts would lose characters."""
    model: Any = tokenizer.model
    if not (isinstance(model, BPE) and model.byte_fallback):
        return
    for byte in range(256):
        token = tokenizer.token_to_id(f"<0x{byte:02X}>")
        if token is None:
            raise InputError(f"{path} has no token for the byte {byte}, <0x{byte:02X}>", hint=TOKENIZER_HINT)
        text = tokenizer.decode([token], skip_special_tokens=False)
        if text != (chr(byte) if byte < 128 else "\ufffd"):
            raise InputError(f"{path}: the token of the byte {byte} decodes to {shown(text)}", hint=TOKENIZER_HINT)


def _stop_ids(
    path: Path, tokenizer: tokenizers.Tokenizer, ends: Mapping[str, int | None], config: TextConfig
) -> tuple[int, ...]:
    """The stop ids with the tokens that end an answer: fine-tunes change template and tokenizer, and forget the stop ids.

    Args:
        path: the tokenizer.
        tokenizer: what it holds.
        ends: what a token is, for the message -> its id; None: there is no token of that kind.
        config: the model's.
    """
    stops = tuple(config.eos_token_id)
    by_name = tokenizer.token_to_id(END_OF_TURN)  # class Tokenizer stops there, whatever the stop ids are
    for what, end in ends.items():
        if end is None or end in (*stops, by_name) or end >= config.vocab_size:
            continue
        logger.warning(
            "%s: %s %s, but is not among the stop ids %s; it is added to them",
            path.parent,
            shown(tokenizer.id_to_token(end)),
            what,
            list(stops),
        )
        stops = (*stops, end)
    return stops


def _special(tokenizer: tokenizers.Tokenizer, text: str) -> Iterator[int]:
    """The special tokens in a text."""
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    return (token for token in tokenizer.encode(text, add_special_tokens=False).ids if token in special)
