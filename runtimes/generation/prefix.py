"""A beginning that many prompts share: its text and the state after it in one file, so that it is fed only once."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.state import read_state, write_state
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer, parse_ids


def save(runtime: Runtime, text: str, path: Path, *, chat: bool) -> None:
    """Feed a text, and write the text and the state after it.

    Args:
        runtime: the part of the text that it has seen already is not fed again.
        text: the beginning; token ids for a bundle without a tokenizer.
        path: the file; an older one is replaced.
        chat: whether the text will begin the user's first turn of a chat.

    Raises:
        InputError: there is no text, or the file cannot be written.
    """
    if not runtime.manifest.tokenizer:
        ids = parse_ids(text)
        text = text.strip() + " "  # so that the ids of a prompt can follow
    else:
        ids = Tokenizer(runtime.bundle, runtime.manifest).encode(_opening(runtime.bundle, text) if chat else text)
    known = runtime.align(ids)
    runtime.prefill(ids[known:])
    write_state(path, runtime.snapshot(), {"prefix": text})


def load(runtime: Runtime, path: Path) -> str:
    """Restore a saved state.

    Returns:
        Its text, with which every prompt must begin.

    Raises:
        InputError: the file is missing, damaged, or of another bundle or backend.
    """
    state, notes = read_state(path)
    if not isinstance(notes.get("prefix"), str):
        raise InputError(f"{path} holds no prefix; make one with `gemma-run prefix`")
    runtime.restore(state)
    return str(notes["prefix"])


def _opening(bundle: Path, text: str) -> str:
    """A conversation that begins with `text`, cut off after it."""
    rendered = ChatTemplate.from_bundle(bundle).render([{"role": "user", "content": text}])
    end = rendered.rfind(text.strip())
    return rendered[: end + len(text.strip())] if end >= 0 else rendered
