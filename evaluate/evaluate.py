"""Perplexity, KL and top-1 agreement of bundles and folders over the same tokens, against the original's logits.

Models come from models.py, windows from windows.py, sums from comparison.py. Tasks are lm_eval_adapter.py's, files and tables
eval_report.py's. The original is computed once; its logits lie in a temporary file, never in memory together.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np

from gemma_edge.comparison import Comparison, negative_log_likelihood
from gemma_edge.errors import InputError
from gemma_edge.evaluate.model import Model, open_model
from gemma_edge.logits import Logits
from gemma_edge.progress import Progress
from gemma_edge.text.tokenizer import Tokenizer
from gemma_edge.text.windows import DEFAULT_WINDOW, PROTOCOLS, SMALLEST_WINDOW, Window, cut

HELD_OUT = ("heldout_austen.txt", "heldout_kjv.txt")
DEFAULT_MAX_TOKENS = 4096
BINS = 32  # parts of a window whose KL is averaged, for the plot by position
LAYER_TOKENS = 256  # fed to compare hidden states
SAMPLE = 4000  # characters that two tokenizers must agree on
CHARACTERS_PER_TOKEN = 16  # of a text that is cut before it is tokenized; more is taken when that was too few


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on what."""

    models: tuple[Path, ...]
    reference: Path | None = None
    texts: tuple[Path, ...] = ()  # none: the held-out texts of the gate
    protocol: str = "hf"
    window: int | None = None  # None: DEFAULT_WINDOW, or the smallest context
    max_tokens: int = DEFAULT_MAX_TOKENS  # of the texts together; 0 = all
    backend: str | None = None
    threads: int | None = None


@dataclass
class Result:
    """One model in numbers. None where there is no reference, or it is not known."""

    name: str
    path: str
    kind: str
    backend: str
    size: int
    bits_per_weight: float | None
    protocol: str
    window: int
    tokens: int = 0  # scored
    ppl: float = 0.0
    ppl_change: float | None = None  # relative to the reference's
    kl: float | None = None  # nats per token, reference || model
    top1: float | None = None  # part of positions with the same most likely token
    kl_by_position: list[dict[str, float]] = field(default_factory=list)  # first and last position in the window, kl
    layers: list[float] = field(default_factory=list)  # relative error of each layer's output
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> metric -> value


@dataclass
class Evaluation:
    """Everything that was measured."""

    protocol: str
    window: int
    texts: list[str]
    reference: Result | None
    results: list[Result]
    notes: list[str]


@dataclass(frozen=True)
class Job:
    """Options after every check: opened models and the tokens they are fed."""

    models: list[Model]
    reference: Model | None
    names: list[str]
    tokenizer: Tokenizer
    texts: list[str]
    windows: list[Window]
    protocol: str
    window: int


def prepare(options: Options) -> Job:
    """Check everything before any work.

    Raises:
        InputError: a model, a text or a number that cannot be used.
    """
    if options.protocol not in PROTOCOLS:
        raise InputError(f"--protocol {options.protocol}; supported: {', '.join(PROTOCOLS)}")
    if options.max_tokens < 0:
        raise InputError(f"--max-tokens {options.max_tokens} is below 0; 0 takes the whole text")
    texts = _read_texts(options.texts)
    models = [open_model(path, backend=options.backend, threads=options.threads) for path in options.models]
    reference = open_model(options.reference, threads=options.threads) if options.reference else None
    everyone = [*([reference] if reference else []), *models]
    window = _window(options.window, everyone)
    tokenizer = _shared_tokenizer(everyone, next(iter(texts.values())))
    protocol = PROTOCOLS[options.protocol]
    windows: list[Window] = []
    for text in texts.values():
        ids = _encode(tokenizer, text, options.max_tokens // len(texts) if options.max_tokens else None)
        windows += cut(ids, protocol, bos=tokenizer.bos_token_id, window=window)
    _check_ids(windows, everyone[0])
    return Job(models, reference, _names(options.models), tokenizer, list(texts), windows, protocol.name, window)


def evaluate(job: Job, progress: Progress) -> Evaluation:
    """Measure every model; the reference first, once.

    Raises:
        InputError: the reference's logits do not fit on the disk.
    """
    results = []
    with _reference_logits(job, progress) as (reference, saved):
        for name, model in zip(job.names, job.models, strict=True):
            result = _result(job, name, model)
            with progress(f"evaluate {name}", model.steps(job.windows), False) as advance:
                _measure(result, model, job.windows, saved, advance)
            if reference is not None:
                result.ppl_change = result.ppl / reference.ppl - 1.0
            result.layers = model.layer_errors(job.reference, job.windows[0].ids[:LAYER_TOKENS], progress)
            results.append(result)
    return Evaluation(job.protocol, job.window, job.texts, reference, results, _notes(job))


class SavedLogits:
    """Rows of logits in a file that vanishes with the process, however that ends."""

    def __init__(self, file: IO[bytes], vocab_size: int) -> None:
        self._file, self._vocab_size = file, vocab_size

    def append(self, rows: Logits) -> None:
        """Write (t, V) behind what is there."""
        self._file.write(np.ascontiguousarray(rows).data)

    def read(self, first: int, count: int) -> Logits:
        """(count, V) from row `first` on."""
        self._file.seek(4 * first * self._vocab_size)
        rows = np.fromfile(self._file, np.float32, count * self._vocab_size)
        return rows.reshape(count, self._vocab_size)


@contextmanager
def _reference_logits(job: Job, progress: Progress) -> Iterator[tuple[Result | None, SavedLogits | None]]:
    """The reference's own result, and its logits of every scored position; (None, None) without one."""
    if job.reference is None:
        yield None, None
        return
    model, folder = job.reference, scratch_folder()
    vocab_size = model.config.vocab_size
    needed = 4 * vocab_size * sum(window.scored for window in job.windows)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the reference's logits need {needed / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free;"
            " lower --max-tokens, or name another disk in TMPDIR"
        )
    result = _result(job, model.path.resolve().name, model)
    with tempfile.TemporaryFile(dir=folder) as file:
        saved = SavedLogits(file, vocab_size)
        what = f"reference ({needed / 1e9:.2f} GB of logits in {folder})"
        with progress(what, model.steps(job.windows), False) as advance:
            _measure(result, model, job.windows, None, advance, saved.append)
        yield result, saved


def scratch_folder() -> Path:
    """For files larger than memory: TMPDIR, else /var/tmp, because /tmp is often kept in memory."""
    lasting = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return lasting
    return Path(tempfile.gettempdir())


def _measure(
    result: Result,
    model: Model,
    windows: list[Window],
    saved: SavedLogits | None,
    progress: Callable[[int], None],
    keep: Callable[[Logits], None] = lambda rows: None,
) -> None:
    """Fill in perplexity, and KL and agreement where there are saved logits."""
    comparison, nll, done = Comparison(), 0.0, 0
    longest = max(len(window.ids) for window in windows)
    kl, counts = np.zeros(longest), np.zeros(longest)
    for window, position, rows in model.rows(windows, progress):
        targets = window.targets(position, len(rows))
        if saved is None:
            nll += negative_log_likelihood(rows, targets)
        else:
            here = slice(position, position + len(rows))
            kl[here] += comparison.add(rows, saved.read(done, len(rows)), targets)
            counts[here] += 1
        keep(rows)
        done += len(rows)
    result.tokens = done
    result.ppl = float(np.exp((comparison.nll if saved else nll) / done))
    if saved is not None:
        found = comparison.to_json()
        result.kl, result.top1 = found["kl"], found["top1"]
        result.kl_by_position = list(_bins(kl, counts))


def _bins(kl: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> Iterator[dict[str, float]]:
    """Mean KL of up to BINS stretches of the window, over the positions that were scored."""
    (scored,) = counts.nonzero()
    for part in np.array_split(scored, min(BINS, len(scored))):
        mean = float(kl[part].sum() / counts[part].sum())
        yield {"first": int(part[0]), "last": int(part[-1]), "kl": max(mean, 0.0)}


def _result(job: Job, name: str, model: Model) -> Result:
    return Result(
        name=name,
        path=str(model.path),
        kind=model.kind,
        backend=model.backend,
        size=model.size,
        bits_per_weight=model.bits_per_weight,
        protocol=job.protocol,
        window=job.window,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or the paths where two would be the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Texts by name.

    Raises:
        InputError: missing, not UTF-8, or empty.
    """
    if not paths:
        data = resources.files("gemma_edge.text") / "data"
        return {name: (data / name).read_text(encoding="utf-8") for name in HELD_OUT}
    texts = {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"--text {path} is not a file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"--text {path} is not UTF-8 at byte {error.start}; give UTF-8 text") from None
        if not text.strip():
            raise InputError(f"--text {path} is empty; give a text of some hundred words")
        texts[str(path)] = text
    return texts


def _window(asked: int | None, models: Sequence[Model]) -> int:
    smallest = min(models, key=lambda model: model.context)
    window = min(DEFAULT_WINDOW, smallest.context) if asked is None else asked
    if not SMALLEST_WINDOW <= window <= smallest.context:
        raise InputError(
            f"--window {window}; {smallest.path} looks back on {smallest.context} tokens:"
            f" {SMALLEST_WINDOW} to {smallest.context} are allowed"
        )
    return window


def _shared_tokenizer(models: Sequence[Model], text: str) -> Tokenizer:
    """The one tokenizer of all models; one that has none is fed by the others'.

    Raises:
        InputError: nobody has one, or two models do not mean the same tokens.
    """
    first = models[0]
    for model in models:
        for key in ("vocab_size", "bos_token_id"):
            if getattr(model.config, key) != getattr(first.config, key):
                raise InputError(
                    f"{first.path} and {model.path} have different vocabularies: {key} {getattr(first.config, key)} and"
                    f" {getattr(model.config, key)}; only models of the same tokens can be compared"
                )
    found = [(model, tokenizer) for model in models if (tokenizer := model.tokenizer()) is not None]
    if not found:
        raise InputError(
            f"{first.path} has no tokenizer, so that no text can be fed to it; give --reference a folder with tokenizer.json"
        )
    (owner, tokenizer), *others = found
    expected = tokenizer.encode(text[:SAMPLE])
    for model, other in others:
        if other.encode(text[:SAMPLE]) != expected:
            raise InputError(
                f"{owner.path} and {model.path} have different tokenizers: the same text gives other tokens;"
                " only models of the same tokens can be compared"
            )
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, limit: int | None) -> list[int]:
    """At most `limit` tokens, without BOS; a long text is tokenized only as far as needed."""
    if limit is not None:
        ids = tokenizer.encode(text[: CHARACTERS_PER_TOKEN * limit])[1:]
        if len(ids) > limit:
            return ids[:limit]
    return tokenizer.encode(text)[1:][:limit]


def _check_ids(windows: Sequence[Window], model: Model) -> None:
    largest, size = max(max(window.ids) for window in windows), model.config.vocab_size
    if largest >= size:
        raise InputError(
            f"the tokenizer gives token id {largest}, {model.path} has a vocabulary of {size}: they do not belong together"
        )


def _notes(job: Job) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    tuned = [name for name in job.names if re.search(r"[-_]it(?![a-z])", name.lower())]
    if not tuned:
        return []
    return [
        f"{', '.join(tuned)}: tuned for instructions, so that the perplexity of raw text says little; judge by KL and top-1"
    ]
