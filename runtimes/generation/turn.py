"""A conversation as tokens: as the model read and wrote it, and how much of it comes before the user's own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from gemma_edge.runtimes.tools.form import Message

OTHER_WORDS = "\N{REPLACEMENT CHARACTER}"  # stands for what a user says: no text begins with it


@dataclass(frozen=True)
class Turn:
    """The conversation at the end of a turn."""

    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()  # the tokens as the model read and wrote them; the last one may not be fed yet
    texts: tuple[str, ...] = ()  # the text of these ids, in each form that a template may write


def ids_after(last: Turn, prompt: str, encode: Callable[..., list[int]]) -> list[int]:
    """The whole conversation as tokens; its earlier part as the model read and wrote it.

    Args:
        last: the turn before.
        prompt: the conversation as text.
        encode: from text to tokens; with `bos=False` without the first one.
    """
    for text in last.texts:
        if prompt.startswith(text):
            return [*last.ids, *encode(prompt.removeprefix(text), bos=False)]
    return encode(prompt)


def beginning(ids: Sequence[int], prompt: str, other: str, encode: Callable[[str], Sequence[int]]) -> int:
    """How many tokens of a conversation come before the user's own words.

    Args:
        ids, prompt: the conversation as tokens and as text.
        other: the text of one that begins in the same way, and whose user says OTHER_WORDS.
        encode: from text to tokens.
    """
    shared = encode(commonprefix([prompt, other]))
    return len(commonprefix([list(ids[: len(shared)]), list(shared)]))
