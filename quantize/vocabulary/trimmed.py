"""A model with the rows of some tokens alone, and a folder of its tokenizer, which never gives another token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_edge import user_cache
from gemma_edge.bundle.entries import VocabularyEntry
from gemma_edge.errors import InputError
from gemma_edge.files import write_whole
from gemma_edge.model import hub
from gemma_edge.model.checkpoint import TABLES, Weights
from gemma_edge.model.config import text_config
from gemma_edge.model.quantized import QuantizedTensor
from gemma_edge.quantize.checkpoint.view import View
from gemma_edge.quantize.vocabulary.kept import Kept, kept_ids, rewritten
from gemma_edge.reading import MAX_TOKENIZER, parse_json, present, read_bytes, read_json
from gemma_edge.text.chat import CONFIG_FILE, ChatTemplate
from gemma_edge.text.tokenizer import TOKENIZER_FILE, TOKENIZER_HINT

LAYOUT = 1  # version of what `_write` writes
BLOCK = 1024  # rows of the source that are read at once
CONFIG = "config.json"
ID_KEYS = ("_token_id", "_token_index")  # ends of the keys whose values are ids of tokens
# OLD_IDS: companions that hold tokens under their old ids, and that nothing of ours reads
OLD_IDS = ("tokenizer.model", "added_tokens.json")
CHAT = ("user", "assistant", "user")  # roles of a conversation whose template's tokens are kept


class Trimmed(View):
    """The weights of a model with the rows of `ids` alone, in that order."""

    def __init__(self, source: Weights, ids: Sequence[int], folder: Path, vocabulary: VocabularyEntry) -> None:
        super().__init__(source)
        self.ids = torch.tensor(ids)  # rising
        self.folder = self.text_folder = folder
        self.vocabulary = vocabulary
        place = {token: index for index, token in enumerate(ids)}
        config = source.config
        self.config = replace(
            config,
            vocab_size=len(ids),
            bos_token_id=place[config.bos_token_id],
            eos_token_id=tuple(place[token] for token in config.eos_token_id),
        )

    def files(self) -> list[Path]:
        """See Weights."""
        return [*self.source.files(), self.folder / TOKENIZER_FILE]

    def float_bytes(self, weight: str) -> int:
        """See Weights."""
        size = super().float_bytes(weight)
        return size * len(self.ids) // self.source.config.vocab_size if weight in TABLES else size

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        if weight not in TABLES:
            return super().rows(weight, start, stop)
        return torch.cat(self._blocks(start, stop, lambda *part: (self.source.rows(weight, *part),))[0])

    def plain_rows(self, weight: str, start: int, stop: int) -> Tensor:
        """See Weights."""
        if weight not in TABLES:
            return super().plain_rows(weight, start, stop)
        return torch.cat(self._blocks(start, stop, lambda *part: (self.source.plain_rows(weight, *part),))[0])

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """See Weights."""
        if weight not in TABLES:
            return super().quantized(weight, start, stop)

        def read(first: int, last: int) -> tuple[Tensor, ...]:
            part = self.source.quantized(weight, first, last)
            return part.codes, part.scale

        config = self.configs[weight] or self.source.quantized(weight, 0, 1).config
        codes, scale = (torch.cat(parts) for parts in self._blocks(start, stop, read))
        return QuantizedTensor(codes, scale, config)

    def _blocks(
        self, start: int, stop: int, read: Callable[[int, int], tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, ...]]:
        """Kept rows of the source, of each tensor that `read` gives: what lies close together is read together."""
        ids = self.ids[start:stop]
        cuts = [0, *(torch.nonzero((ids // BLOCK).diff()).flatten() + 1).tolist(), len(ids)]
        blocks = []
        for first, last in zip(cuts, cuts[1:], strict=False):
            some = ids[first:last]
            low = int(some[0])
            blocks.append(tuple(part[some - low] for part in read(low, int(some[-1]) + 1)))
        return list(zip(*blocks, strict=True))


def trim(source: Weights, vocab: str) -> Weights:
    """The model without the tokens that a text does not need.

    Args:
        source: the model.
        vocab: as `Kept.parse` reads it.

    Raises:
        InputError: the text cannot be used, or the model's tokenizer cannot be rewritten.
    """
    kept = Kept.parse(vocab)
    path = source.text_folder / TOKENIZER_FILE
    if not present(path):
        raise InputError(
            f"`vocab` {vocab}: {source.origin} has no {TOKENIZER_FILE}, so no tokens can be counted; leave it out",
            field="vocab",
            value=vocab,
        )
    data = _tokenizer(path)
    texts = kept.texts()
    if not any(text.strip() for text in texts):
        raise InputError(
            f"`vocab` {vocab} is empty, and would leave no token", field="vocab", value=vocab, hint="pass a text"
        )
    config = source.config
    always, texts = {config.bos_token_id, *config.eos_token_id}, [*texts, _conversation(source.text_folder)]
    ids = kept_ids(data, texts, config.vocab_size, always, by_characters=kept.by_characters)
    entry = VocabularyEntry(config.vocab_size, len(ids), tuple(each.name for each in kept.paths), kept.by_characters)
    return Trimmed(source, ids, _folder(source, data, ids), entry)


def _tokenizer(path: Path) -> dict[str, Any]:
    """A tokenizer.json whose model is BPE; `check_text_files` has opened it already."""
    data: dict[str, Any] = parse_json(read_bytes(path, TOKENIZER_HINT, max_bytes=MAX_TOKENIZER))
    kind = data["model"].get("type", "BPE")
    if kind != "BPE":
        raise InputError(f"`vocab`: {path} is a tokenizer of the kind {kind}; only BPE is rewritten", field="vocab")
    return data


def _conversation(folder: Path) -> str:
    """What the chat template writes around the turns; "" if it takes no conversation."""
    try:
        return ChatTemplate.of_folder(folder).render([{"role": role, "content": role} for role in CHAT])
    except InputError:
        return ""


def _folder(source: Weights, data: Mapping[str, Any], ids: Sequence[int]) -> Path:
    """A folder of the user's cache with all files of the model but its weights."""
    files = hub.companions_of(source.folder, source.text_folder)
    raw, _ = text_config(source.folder)
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if name not in (*OLD_IDS, TOKENIZER_FILE, CONFIG_FILE, hub.STOP_IDS)
    }
    place = {token: index for index, token in enumerate(ids)}
    texts[TOKENIZER_FILE] = json.dumps(rewritten(data, ids), ensure_ascii=False)
    if CONFIG_FILE in files:  # its table of added tokens is that of tokenizer.json
        options = read_json(files[CONFIG_FILE])
        texts[CONFIG_FILE] = _as_text({key: value for key, value in options.items() if key != "added_tokens_decoder"})
    if hub.STOP_IDS in files:
        texts[hub.STOP_IDS] = _as_text(_renumbered(read_json(files[hub.STOP_IDS]), place))
    texts[CONFIG] = _as_text({**_renumbered(raw, place), "vocab_size": len(ids)})
    key = hashlib.sha256(json.dumps([LAYOUT, texts], sort_keys=True).encode()).hexdigest()[:32]
    with user_cache.needed_for("the tokenizer of a smaller vocabulary"):
        folder = user_cache.folder("vocabularies", key)
    if not present(folder / CONFIG):  # it is written last
        for name, text in texts.items():
            write_whole(folder / name, text)
    return folder


def _renumbered(values: Mapping[str, Any], place: Mapping[int, int]) -> dict[str, Any]:
    """The keys of a configuration, ids of tokens renumbered; a key whose token is gone is gone, too."""

    def new(value: Any) -> Any:
        return [place[token] for token in value if token in place] if isinstance(value, list) else place.get(value)

    renumbered = {
        key: new(value) if key.endswith(ID_KEYS) and value is not None else value for key, value in values.items()
    }
    return {key: value for key, value in renumbered.items() if value is not None or values[key] is None}


def _as_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
