"""lm-eval's tasks on any `Runtime`. Needs the `eval` extra; everything else of gemma-eval works without this module.

lm-eval respects HF_HUB_OFFLINE, and tasks of one's own over JSONL files need no network. BOS begins every sequence: Gemma
without it predicts nonsense. Source of the interface: lm_eval/api/model.py, `TemplateLM`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval  # type: ignore[import-untyped]
import numpy as np
import yaml  # type: ignore[import-untyped]
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped]

from gemma_edge.comparison import log_softmax
from gemma_edge.errors import InputError
from gemma_edge.progress import Progress
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import generate
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # of an answer whose task sets no limit: lm-eval's own default
BOOTSTRAPS = 1000  # resamplings for the standard errors that have no formula
# what a task file, a data file or the hub can raise while tasks are loaded; yaml's and datasets' errors are among them
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, yaml.YAMLError)


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """A runtime and its tokenizer as lm-eval sees a model."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, progress: Progress) -> None:
        super().__init__()
        self._runtime, self._tokenizer, self._progress = runtime, tokenizer, progress

    @property
    def eot_token_id(self) -> int:
        """The first of the model's stop ids."""
        return self._runtime.manifest.config.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """BOS, which an empty context stands for."""
        return self._tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model looks back on."""
        return self._runtime.cache.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with BOS in front unless `add_special_tokens` is False."""
        return self._tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(request, context, continuation) each -> log p of the continuation, and whether greedy decoding would give it."""
        # Choices of one token share everything that is fed, the question: one run for all of them
        same_feed: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            same_feed.setdefault(self._feed(context, continuation), []).append(index)
        found: dict[int, tuple[float, bool]] = {}
        with self._progress("log-likelihoods", len(same_feed), False) as advance:
            for feed, indices in same_feed.items():
                scores = self._score(feed, [requests[index][2] for index in indices])
                found |= dict(zip(indices, scores, strict=True))
                advance(1)
        return [found[index] for index in range(len(requests))]

    def _feed(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What must be fed to foretell the continuation: BOS first, the oldest tokens left out where it is too long.

        Raises:
            InputError: the continuation alone is too long.
        """
        if len(continuation) > self.max_length:
            raise InputError(
                f"an answer of {len(continuation)} tokens exceeds {self._runtime.bundle}'s context of {self.max_length}"
            )
        bos = self.prefix_token_id
        rest = [*(context[1:] if context[:1] == [bos] else context), *continuation[:-1]]
        # the first token of the continuation needs one before it, BOS at the least
        return (bos, *rest[max(0, len(rest) + 1 - self.max_length) :])

    def _score(self, feed: tuple[int, ...], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Sum of log p, and greediness, of continuations that all end one token after `feed`."""
        totals, greedy = [0.0] * len(continuations), [True] * len(continuations)
        begins = [len(feed) - len(continuation) for continuation in continuations]  # position that foretells the first
        position = 0
        for chunk in self._runtime.score_chunks(feed):
            skip = max(0, min(begins) - position)
            log_p = log_softmax(chunk[skip:]) if skip < len(chunk) else chunk[:0]  # (t, V)
            best, first, position = log_p.argmax(-1), position + skip, position + len(chunk)
            for index, (begin, continuation) in enumerate(zip(begins, continuations, strict=True)):
                start = max(begin, first)
                targets = np.array(continuation[start - begin : max(0, position - begin)], np.int64)
                rows = np.arange(start - first, start - first + len(targets))
                totals[index] += float(log_p[rows, targets].sum())
                greedy[index] &= bool((best[rows] == targets).all())
        return list(zip(totals, greedy, strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log p of whole texts, in disjoint windows that each begin with BOS."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy unless the task samples, ended by one of its stop texts, a stop token or its limit."""
        with self._progress("answers", len(requests), False) as advance:
            answers = []
            for request in requests:
                answers.append(self._answer(*request.args))
                advance(1)
        return answers

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(settings.get("max_gen_toks", settings.get("max_tokens", MAX_NEW_TOKENS)))
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        params = SamplingParams(temperature=temperature, top_p=float(settings.get("top_p") or 1.0), seed=0)
        bos, *rest = self.tok_encode(context)
        kept = rest[max(0, len(rest) + 1 - max(1, self.max_length - limit)) :]  # room for the answer
        self._runtime.reset()
        tokens = generate(
            self._runtime, [bos, *kept], Sampler(params), max_tokens=limit, stop_ids=self._tokenizer.stop_ids
        )
        text = ""
        for piece in self._tokenizer.stream(tokens):
            text += piece
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text


class Tasks:
    """lm-eval tasks, loaded and known to be there."""

    def __init__(self, names: Sequence[str], include_path: Path | None) -> None:
        """Find and load them, their data included.

        Raises:
            InputError: an unknown task, a broken file, or data that cannot be fetched.
        """
        if include_path is not None and not include_path.is_dir():
            raise InputError(f"--include-path {include_path} is not a folder")
        self._names = list(names)
        self._manager = _manager(names, include_path)
        for name in names:
            if name not in self._manager.all_tasks and not Path(name).is_file():
                raise InputError(
                    f"--tasks {name}: lm-eval knows no such task and there is no such file; `lm-eval ls tasks` lists them"
                )
        try:
            self._manager.load(self._names)
        except LOAD_ERRORS as error:
            raise InputError(f"--tasks {','.join(names)} cannot be loaded: {type(error).__name__}: {error}") from None

    def run(
        self, runtime: Runtime, tokenizer: Tokenizer, progress: Progress, *, limit: int | None
    ) -> dict[str, dict[str, float]]:
        """Every task on one model: task -> metric -> value; `METRIC_stderr` is a metric's standard error.

        Args:
            runtime, tokenizer: the model.
            progress: shows how far it is.
            limit: most examples of each task, None = all.
        """
        found = lm_eval.simple_evaluate(
            model=RuntimeLM(runtime, tokenizer, progress),
            tasks=self._names,
            task_manager=self._manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
        return {
            task: {
                _metric(key): float(value)
                for key, value in values.items()
                if "," in key and isinstance(value, int | float)
            }
            for task, values in found["results"].items()
        }


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """lm-eval's own 14,000 tasks are indexed only when they are asked for: that takes seconds."""
    own = TaskManager(include_path=include_path, include_defaults=False)
    if all(name in own.all_subtasks or Path(name).is_file() for name in names):
        return own
    return TaskManager(include_path=include_path)


def _metric(key: str) -> str:
    """`acc,none` -> acc; `exact_match,strict-match` -> exact_match (strict-match)."""
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else f"{metric} ({filtered})"
