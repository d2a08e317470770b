"""The options of `evaluate`, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_MAX_TOKENS = 4096


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-eval. They need the `eval` extra."""

    tasks: tuple[str, ...]  # lm-eval's names, or YAML files
    include_path: Path | None = None  # folder with further task files
    limit: int | None = None  # examples taken of each task; None: all


@dataclass(frozen=True)
class EvaluationOptions:
    """Which models are measured, and on which text."""

    models: tuple[Path, ...]  # bundles and Hugging Face folders
    reference: Path | None = None  # the original, for KL, top-1 agreement and perplexity change
    texts: tuple[Path, ...] = ()  # UTF-8 files; empty: the held-out texts, gemma_edge.text.corpus.HELD_OUT
    protocol: str = "hf"  # a name in gemma_edge.text.windows.PROTOCOLS
    window: int | None = None  # tokens of a window, BOS included; None: 512, or the smallest context
    max_tokens: int = DEFAULT_MAX_TOKENS  # tokens of all texts together; 0: everything
    backend: str | None = None  # backend of the bundles; None: the first that is installed
    threads: int | None = None  # threads of the bundles; None: what each bundle's target says
    tasks: TaskOptions | None = None  # None: no tasks
    memorization: Path | None = None  # UTF-8 file whose passages the models are to continue; None: no probe
