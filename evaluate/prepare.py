"""Everything that is checked, opened and tokenized before an evaluation measures anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_edge.errors import InputError
from gemma_edge.evaluate.memorization import passages
from gemma_edge.evaluate.model import Model
from gemma_edge.evaluate.open_model import open_model
from gemma_edge.evaluate.options import EvaluationOptions, TaskOptions
from gemma_edge.files import need
from gemma_edge.reading import read_text
from gemma_edge.text import corpus
from gemma_edge.text.tokenizer import Tokenizer
from gemma_edge.text.windows import DEFAULT_WINDOW, PROTOCOLS, SMALLEST_WINDOW, Window, cut

if TYPE_CHECKING:
    from gemma_edge.evaluate.lm_eval_adapter import Tasks

# SAMPLE_CHARACTERS: the length of the text that two tokenizers must turn into the same tokens to count as one.
SAMPLE_CHARACTERS = 4000


@dataclass(frozen=True)
class Job:
    """Opened models, and the tokens that are fed to each of them."""

    models: list[Model]
    names: list[str]  # of the models, for people
    reference: Model | None
    tokenizer: Tokenizer
    texts: list[str]  # names
    windows: list[Window]
    protocol: str
    window: int  # tokens
    tasks: Tasks | None
    passages: list[tuple[int, ...]]  # of the memorization probe

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the numbers rightly."""
        tuned = [name for name in self.names if re.search(r"[-_]it(?![a-z])", name.lower())]
        if not tuned:
            return []
        return [
            f"{', '.join(tuned)}: tuned for instructions, so that the perplexity of raw text says little; judge by KL and"
            " top-1"
        ]


def prepare(options: EvaluationOptions) -> Job:
    """Check the options, open the models, and cut the texts into windows.

    Raises:
        InputError: a model, a text, a task or a number that cannot be used.
    """
    if options.protocol not in PROTOCOLS:
        raise InputError(field="protocol", value=options.protocol, allowed=PROTOCOLS)
    if options.max_tokens < 0:
        value = options.max_tokens
        raise InputError(
            f"`max_tokens` {value} is below 0", field="max_tokens", value=value, hint="0 takes the whole text"
        )
    if options.tasks is not None:
        _check_tasks(options.tasks)
    texts = _read_texts(options.texts)
    models = [open_model(path, backend=options.backend, threads=options.threads) for path in options.models]
    reference = open_model(options.reference, threads=options.threads) if options.reference else None
    _refuse_unused(options, models, reference)
    everyone = [*([reference] if reference else []), *models]
    window = _window(options.window, everyone)
    tokenizer = _shared_tokenizer(everyone, next(iter(texts.values())))
    protocol = PROTOCOLS[options.protocol]
    windows: list[Window] = []
    for text in texts.values():
        ids = _encode(tokenizer, text, options.max_tokens // len(texts) if options.max_tokens else None)
        windows += cut(ids, protocol, bos=tokenizer.bos_token_id, window=window)
    _check_ids(windows, everyone[0])
    parts = [] if options.memorization is None else _passages(options.memorization, tokenizer, options.max_tokens)
    tasks = None if options.tasks is None else _load_tasks(options.tasks)
    names = _names(options.models)
    return Job(models, names, reference, tokenizer, list(texts), windows, protocol.name, window, tasks, parts)


def _passages(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[tuple[int, ...]]:
    """The passages of a file's first `max_tokens` tokens; 0 takes all."""
    text = read_text(path, "give UTF-8 text", field="memorization")
    return passages(_encode(tokenizer, text, max_tokens or None))


def _refuse_unused(options: EvaluationOptions, models: Sequence[Model], reference: Model | None) -> None:
    """Refuse options for bundles if no bundle is among the models."""
    bundles = [model for model in models if model.kind == "bundle"]
    if options.backend is not None and not bundles:
        raise InputError(
            f"`backend` {options.backend} has no effect: no bundle is among the models; leave it out",
            field="backend",
            value=options.backend,
        )
    if options.threads is not None and not bundles and (reference is None or reference.kind != "bundle"):
        raise InputError(
            f"`threads` {options.threads} has no effect: no bundle is among the models; leave it out",
            field="threads",
            value=options.threads,
        )


def _check_tasks(options: TaskOptions) -> None:
    if not options.tasks:
        raise InputError("`tasks` names no task; give names or YAML files, comma-separated", field="tasks")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"`limit` {options.limit} is below 1", field="limit", value=options.limit)
    need("`tasks`", "lm_eval")


def _load_tasks(options: TaskOptions) -> Tasks:
    """Load the tasks before any work, so that a task that cannot be loaded is noticed at once and not after an hour."""
    from gemma_edge.evaluate.lm_eval_adapter import Tasks

    return Tasks(options)


def _names(paths: Sequence[Path]) -> list[str]:
    """The names of the folders, or their paths where two names are the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Texts by name; the held-out texts where no path is given.

    Raises:
        InputError: a file is missing, empty, or not UTF-8.
    """
    if not paths:
        return {name: corpus.read(name) for name in corpus.HELD_OUT}
    texts = {}
    for path in paths:
        text = read_text(path, "give UTF-8 text", field="texts")
        if not text.strip():
            raise InputError(f"`texts` {path} is empty", field="texts", value=path, hint="give some hundred words")
        texts[str(path)] = text
    return texts


def _window(requested: int | None, models: Sequence[Model]) -> int:
    """The length of the windows, which every model's context must hold."""
    smallest = min(models, key=lambda model: model.context)
    window = min(DEFAULT_WINDOW, smallest.context) if requested is None else requested
    if not SMALLEST_WINDOW <= window <= smallest.context:
        raise InputError(
            f"`window` {window}; {smallest.path} looks back on {smallest.context} tokens:"
            f" {SMALLEST_WINDOW} to {smallest.context} are allowed",
            field="window",
            value=window,
        )
    return window


def _shared_tokenizer(models: Sequence[Model], text: str) -> Tokenizer:
    """The tokenizer that all models share. A model without a tokenizer is fed with the tokens of the others'.

    Raises:
        InputError: no model has a tokenizer, or two models do not mean the same tokens.
    """
    first = models[0]
    for model in models:
        for key in ("vocab_size", "bos_token_id"):
            ours, theirs = getattr(first.config, key), getattr(model.config, key)
            if ours != theirs:
                raise InputError(
                    f"{first.path} and {model.path} have different vocabularies: {key} {ours} and {theirs};"
                    " only models of the same tokens can be compared"
                )
    owned = [(model, tokenizer) for model in models if (tokenizer := model.tokenizer()) is not None]
    if not owned:
        raise InputError(
            f"{first.path} has no tokenizer, so that no text can be fed to it; give `reference` a folder with"
            " tokenizer.json"
        )
    (owner, tokenizer), *others = owned
    expected = tokenizer.encode(text[:SAMPLE_CHARACTERS])
    for model, other in others:
        if other.encode(text[:SAMPLE_CHARACTERS]) != expected:
            raise InputError(
                f"{owner.path} and {model.path} have different tokenizers: the same text gives other tokens;"
                " only models of the same tokens can be compared"
            )
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, limit: int | None) -> list[int]:
    """At most `limit` tokens of a text, without BOS. Of a long text only the beginning is tokenized."""
    if limit is not None:
        ids = tokenizer.encode(text[: corpus.CHARACTERS_PER_TOKEN * limit])[1:]
        if len(ids) > limit:
            return ids[:limit]
    # The tokens of this text are longer than CHARACTERS_PER_TOKEN, or the text is short.
    return tokenizer.encode(text)[1:][:limit]


def _check_ids(windows: Sequence[Window], model: Model) -> None:
    largest, size = max(max(window.ids) for window in windows), model.config.vocab_size
    if largest >= size:
        raise InputError(
            f"the tokenizer gives token id {largest}, {model.path} has a vocabulary of {size}: they do not belong together"
        )
