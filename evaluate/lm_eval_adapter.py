"""lm-eval's tasks on any `Runtime`. Only this module needs lm-eval, which the `eval` extra installs.

lm-eval respects HF_HUB_OFFLINE, and a task over a JSONL file needs no network. Every sequence begins with BOS, because Gemma
predicts nonsense without it. Source of the interface: lm_eval/api/model.py, `TemplateLM`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
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
from gemma_edge.evaluate.options import TaskOptions
from gemma_edge.progress import Progress
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.sampling import SamplingParams
from gemma_edge.runtimes.generation.text_generator import TextGenerator
from gemma_edge.text.tokenizer import Tokenizer

# MAX_NEW_TOKENS: the length of an answer where the task sets no limit; lm-eval's own default.
MAX_NEW_TOKENS = 256
# BOOTSTRAPS: how many resamplings give the standard error of a metric that has no formula for it.
BOOTSTRAPS = 1000
# lm-eval's switch: else it resamples in forked processes, and these can wait for ever for a lock of this process's threads
os.environ["DISABLE_MULTIPROC"] = "1"
# LOAD_ERRORS: what a task file, a data file or the hub can raise while tasks are loaded, errors of yaml and datasets included.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, yaml.YAMLError)


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """A runtime and its tokenizer behind lm-eval's interface of a model."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, progress: Progress) -> None:
        super().__init__()
        self._runtime, self._tokenizer, self._progress = runtime, tokenizer, progress

    @property
    def eot_token_id(self) -> int:
        """The first of the model's stop ids."""
        return self._runtime.manifest.config.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """BOS: what is fed where the context is empty."""
        return self._tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """How many tokens the model looks back on."""
        return self._runtime.cache.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with BOS in front unless `add_special_tokens` is False."""
        return self._tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log probability of each continuation, and whether greedy decoding would give it.

        Args:
            requests: (request, token ids of the context, token ids of the continuation) each.
        """
        # Answers of one token to the same question differ only in what is not fed: one run serves them all.
        same_feed: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            same_feed.setdefault(self._feed(context, continuation), []).append(index)
        results: dict[int, tuple[float, bool]] = {}
        with self._progress("log-likelihoods", len(same_feed), False) as advance:
            for feed, indices in same_feed.items():
                scores = self._score(feed, [requests[index][2] for index in indices])
                results |= dict(zip(indices, scores, strict=True))
                advance(1)
        return [results[index] for index in range(len(requests))]

    def _feed(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The tokens to feed so that every token of the continuation is predicted: BOS, then all of the rest that fits.

        Raises:
            InputError: the continuation alone does not fit into the context.
        """
        if len(continuation) > self.max_length:
            raise InputError(
                f"an answer of {len(continuation)} tokens exceeds {self._runtime.bundle}'s context of {self.max_length}"
            )
        bos = self.prefix_token_id
        rest = [*(context[1:] if context[:1] == [bos] else context), *continuation[:-1]]
        # BOS always stays, so that the first token of the continuation has a token before it.
        return (bos, *rest[max(0, len(rest) + 1 - self.max_length) :])

    def _score(self, feed: tuple[int, ...], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """For continuations that all end one token after `feed`: their log probabilities, and whether they are greedy."""
        totals, greedy = [0.0] * len(continuations), [True] * len(continuations)
        # the position that predicts the first token of each continuation
        begins = [len(feed) - len(continuation) for continuation in continuations]
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
        """The log probabilities of whole texts, in disjoint windows that each begin with BOS."""
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
        """Answers: greedy unless the task samples, up to one of its stop texts, a stop token or its limit."""
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
        sampling = SamplingParams(temperature=temperature, top_p=float(settings.get("top_p") or 1.0), seed=0)
        options = GenerationOptions(max_tokens=limit, sampling=sampling, stop=tuple(filter(None, stops)))
        bos, *rest = self.tok_encode(context)
        kept = rest[max(0, len(rest) + 1 - max(1, self.max_length - limit)) :]  # room for the answer
        self._runtime.reset()
        return "".join(TextGenerator(self._runtime, self._tokenizer).answer([bos, *kept], options))


class Tasks:
    """lm-eval tasks that have been loaded."""

    def __init__(self, options: TaskOptions) -> None:
        """Load the tasks and their data.

        Raises:
            InputError: a task is unknown, a file is broken, or data cannot be fetched.
        """
        folder = options.include_path
        if folder is not None and not folder.is_dir():
            raise InputError(f"`include_path` {folder} is not a folder", field="include_path", value=folder)
        self._names, self._limit = list(options.tasks), options.limit
        self._manager = _manager(self._names, folder)
        for name in self._names:
            if name not in self._manager.all_tasks and not Path(name).is_file():
                raise InputError(
                    f"`tasks` {name}: lm-eval knows no such task, and there is no such file",
                    field="tasks",
                    value=name,
                    hint="`lm-eval ls tasks` lists its tasks",
                )
        try:
            self._manager.load(self._names)
        except LOAD_ERRORS as error:
            problem = f"`tasks` {','.join(self._names)} cannot be loaded: {type(error).__name__}: {error}"
            raise InputError(problem, field="tasks", value=self._names) from None

    def run(self, runtime: Runtime, tokenizer: Tokenizer, progress: Progress) -> dict[str, dict[str, float]]:
        """Run every task on one model.

        Args:
            runtime, tokenizer: the model.
            progress: shows how far the work is.

        Returns:
            task -> metric -> value; `METRIC_stderr` is the standard error of METRIC.
        """
        with redirect_stdout(sys.stderr):  # it prints that it resamples some metrics; stdout is the result's
            evaluated = lm_eval.simple_evaluate(
                model=RuntimeLM(runtime, tokenizer, progress),
                tasks=self._names,
                task_manager=self._manager,
                limit=self._limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        return {
            task: {
                _metric(key): float(value)
                for key, value in values.items()
                if "," in key and isinstance(value, int | float)
            }
            for task, values in evaluated["results"].items()
        }


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Find tasks by name. lm-eval's own 14,000 tasks are indexed only where one of them is needed, because that takes seconds."""
    own = TaskManager(include_path=include_path, include_defaults=False)
    if all(name in own.all_subtasks or Path(name).is_file() for name in names):
        return own
    return TaskManager(include_path=include_path)


def _metric(key: str) -> str:
    """`acc,none` -> acc; `exact_match,strict-match` -> exact_match (strict-match)."""
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else f"{metric} ({filtered})"
