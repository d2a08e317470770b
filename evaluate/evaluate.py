"""Perplexity, KL and top-1 agreement of bundles and folders over the same tokens, against the original's logits.

Checks are prepare.py's, sums are comparison.py's, tasks are lm_eval_adapter.py's, tables and the page report.py's and html.py's.
The original is computed once. Its logits are written to a temporary file, because they do not fit into memory together.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from gemma_edge.comparison import Comparison, negative_log_likelihood
from gemma_edge.errors import InputError
from gemma_edge.evaluate.memorization import probe
from gemma_edge.evaluate.model import Model
from gemma_edge.evaluate.options import EvaluationOptions
from gemma_edge.evaluate.prepare import Job, prepare
from gemma_edge.evaluate.result import Evaluation, Result
from gemma_edge.files import write_whole
from gemma_edge.logits import Logits
from gemma_edge.progress import Progress, no_progress
from gemma_edge.text.windows import Window

# POSITION_BINS: how many stretches of the window have a mean KL of their own, for the plot by position.
POSITION_BINS = 32
# LAYER_TOKENS: how many tokens are fed to compare the outputs of the layers.
LAYER_TOKENS = 256
# REFERENCE, LOGITS: files of a folder that keeps what a reference predicts: its own result, and its logits.
REFERENCE, LOGITS = "reference.json", "logits.f32"

Rows = Iterable[tuple[Window, int, Logits]]  # what `Model.rows` yields


def evaluate(
    options: EvaluationOptions, progress: Progress = no_progress, *, reference_folder: Path | None = None
) -> Evaluation:
    """Measure models on the same tokens, and compare each with the original.

    Args:
        options: the models, the reference, the texts and how they are cut, and the tasks.
        progress: called as `progress(what, total, in_bytes)`; returns a context whose value is called with the steps done.
        reference_folder: keeps what the reference predicts for these tokens: it is computed where the folder is empty, and read
            where it is not. None: it is computed, and forgotten at the end.

    Returns:
        one result per model, in order: perplexity; with a reference also KL, top-1 agreement and perplexity change; with tasks
        their scores, and those of the reference; with a text for the memorization probe what each model has by heart.

    Raises:
        InputError: a model, a text, a task or a number that cannot be used, or too little disk for the reference's logits.
            All but the last are checked before anything is computed.
    """
    job = prepare(options)
    results = []
    with _reference(job, progress, reference_folder) as (reference, saved):
        for name, model in zip(job.names, job.models, strict=True):
            result = _new_result(job, name, model)
            with progress(f"evaluate {name}", model.steps(job.windows), False) as advance:
                rows = model.rows(job.windows, advance)
                if reference is None or saved is None:
                    _score(result, rows)
                else:
                    _compare(result, rows, saved, longest=max(len(window.ids) for window in job.windows))
                    result.ppl_change = result.ppl / reference.ppl - 1.0
            result.layers = model.layer_errors(job.reference, job.windows[0].ids[:LAYER_TOKENS], progress)
            results.append(result)
    pairs = list(zip(results, job.models, strict=True))
    if reference is not None and job.reference is not None:
        pairs.insert(0, (reference, job.reference))
    for result, model in pairs if job.tasks is not None or job.passages else ():
        runtime = model.runtime()
        if job.tasks is not None:
            result.tasks = job.tasks.run(runtime, job.tokenizer, progress)
        if job.passages:
            result.memorization = probe(runtime, job.passages, job.tokenizer.bos_token_id, progress)
        del runtime  # one model is in memory at a time
    return Evaluation(job.protocol, job.window, job.texts, reference, results, job.notes)


class SavedLogits:
    """Rows of logits in an open file."""

    def __init__(self, file: IO[bytes], vocab_size: int) -> None:
        self._file, self._vocab_size = file, vocab_size

    def append(self, rows: Logits) -> None:
        """Write (t, V) behind the rows that are there."""
        self._file.write(np.ascontiguousarray(rows).data)

    def read(self, first: int, count: int) -> Logits:
        """Read (count, V) from row `first` on."""
        self._file.seek(4 * first * self._vocab_size)
        rows = np.fromfile(self._file, np.float32, count * self._vocab_size)
        return rows.reshape(count, self._vocab_size)


@contextmanager
def _reference(job: Job, progress: Progress, kept: Path | None) -> Iterator[tuple[Result | None, SavedLogits | None]]:
    """The reference's own result, and its logits of every scored position; (None, None) where there is no reference.

    Where they are not kept, the file with the logits has no name, so that it vanishes with this process, however that ends.
    """
    if job.reference is None:
        yield None, None
        return
    vocab_size = job.reference.config.vocab_size
    if kept is None:
        with tempfile.TemporaryFile(dir=scratch_folder()) as file:
            saved = SavedLogits(file, vocab_size)
            yield _save_reference(job, job.reference, saved, scratch_folder(), progress), saved
        return
    figures = kept / REFERENCE
    if not figures.is_file():
        with (kept / LOGITS).open("wb") as file:
            reference = _save_reference(job, job.reference, SavedLogits(file, vocab_size), kept, progress)
        write_whole(figures, json.dumps(asdict(reference)))
    with (kept / LOGITS).open("rb") as file:
        yield Result(**json.loads(figures.read_text(encoding="utf-8"))), SavedLogits(file, vocab_size)


def _save_reference(job: Job, model: Model, saved: SavedLogits, folder: Path, progress: Progress) -> Result:
    """Compute the reference, and save its logits.

    Args:
        job: the tokens.
        model: the reference.
        saved: where its logits go.
        folder: on the disk that they take.
        progress: shows how far the work is.

    Raises:
        InputError: the disk is too full.
    """
    vocab_size = model.config.vocab_size
    needed = 4 * vocab_size * sum(window.scored for window in job.windows)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the reference's logits need {needed / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free",
            field="max_tokens",
            hint="lower `max_tokens`, or name another disk in TMPDIR",
        )
    result = _new_result(job, model.path.resolve().name, model)
    what = f"reference ({needed / 1e9:.2f} GB of logits in {folder})"
    with progress(what, model.steps(job.windows), False) as advance:
        _score(result, model.rows(job.windows, advance), save=saved.append)
    return result


def scratch_folder() -> Path:
    """The folder for files larger than memory: TMPDIR, else /var/tmp, because /tmp is often kept in memory."""
    lasting = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return lasting
    return Path(tempfile.gettempdir())


def _score(result: Result, rows: Rows, save: Callable[[Logits], None] = lambda logits: None) -> None:
    """Fill in the perplexity; `save` is called with every block of logits (t, V)."""
    nll = 0.0
    for window, position, logits in rows:
        nll += negative_log_likelihood(logits, window.targets(position, len(logits)))
        save(logits)
        result.tokens += len(logits)
    result.ppl = float(np.exp(nll / result.tokens))


def _compare(result: Result, rows: Rows, saved: SavedLogits, *, longest: int) -> None:
    """Fill in perplexity, KL and agreement with the saved logits; `longest` is the length of the longest window."""
    comparison = Comparison()
    kl, counts = np.zeros(longest), np.zeros(longest)
    for window, position, logits in rows:
        here = slice(position, position + len(logits))
        expected = saved.read(result.tokens, len(logits))
        kl[here] += comparison.add(logits, expected, window.targets(position, len(logits)))
        counts[here] += 1
        result.tokens += len(logits)
    means = comparison.to_json()
    result.ppl, result.kl, result.top1 = means["ppl"], means["kl"], means["top1"]
    result.kl_by_position = list(_stretches(kl, counts))


def _stretches(kl: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> Iterator[dict[str, float]]:
    """The mean KL of up to POSITION_BINS stretches of the window, over the positions that were scored.

    Args:
        kl, counts: (T,) sums of KL at each position of the window, and how many windows were scored there.
    """
    (scored,) = counts.nonzero()
    for part in np.array_split(scored, min(POSITION_BINS, len(scored))):
        mean = float(kl[part].sum() / counts[part].sum())
        yield {"first": int(part[0]), "last": int(part[-1]), "kl": max(mean, 0.0)}


def _new_result(job: Job, name: str, model: Model) -> Result:
    """A result without its measurements."""
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
