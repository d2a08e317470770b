"""The process that is measured: it loads one model, feeds a prompt, generates, and prints its times as JSON.

bench.py starts it as `python -P -m gemma_edge.bench.child JOB`, where JOB is JSON. The first line is printed when the model is
loaded, the second one at the end. Token ids are random, and what is generated is thrown away.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import click

from gemma_edge.bench.machine import Energy
from gemma_edge.bundle.accelerators import ACCELERATORS, CPU
from gemma_edge.command import one_line_errors
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.memory import memory_mib, peak_rss_mib
from gemma_edge.reading import read_json
from gemma_edge.runtimes.engines.load import open_runtime


class Engine(Protocol):
    """What is measured. `prefill`, `first` and `decode` are timed."""

    vocab_size: int
    context: int  # tokens that the KV cache holds
    accelerator: str  # what computes

    @property
    def packages(self) -> Sequence[str]:
        """The packages whose versions belong to the result."""

    def reset(self) -> None:
        """Forget the context."""

    def prefill(self, ids: list[int]) -> None:
        """Feed a prompt."""

    def first(self) -> int:
        """Return the most likely token after the prompt."""

    def decode(self, token: int) -> int:
        """Feed one token and return the most likely next one."""


class Bundle:
    """A bundle in one of its backends: an `Engine`."""

    def __init__(self, job: dict[str, Any]) -> None:
        where = {name: job[name] for name in ("backend", "threads", "accelerator")}
        self.runtime = open_runtime(job["path"], **where)
        self.vocab_size = self.runtime.manifest.config.vocab_size
        self.context = self.runtime.cache.context
        self.packages = ("gemma-edge", job["package"])
        self.accelerator = self.runtime.computes_on
        self._logits: Logits

    def reset(self) -> None:
        """See Engine."""
        self.runtime.reset()

    def prefill(self, ids: list[int]) -> None:
        """See Engine."""
        self._logits = self.runtime.prefill(ids)

    def first(self) -> int:
        """See Engine."""
        return int(self._logits.argmax())

    def decode(self, token: int) -> int:
        """See Engine."""
        return int(self.runtime.decode(token).argmax())


class Genai:
    """onnxruntime-genai, on a folder with a genai_config.json: a model of its own builder, or a bundle. An `Engine`."""

    packages = ("onnxruntime-genai", "onnxruntime")
    accelerator = CPU

    def __init__(self, job: dict[str, Any]) -> None:
        self.og: Any = importlib.import_module(job["module"])
        config = read_json(Path(job["path"]) / "genai_config.json", "name a folder for onnxruntime-genai")["model"]
        self.vocab_size = int(config["vocab_size"])
        # its cache with a sliding window needs room for a whole window, however short the prompt is
        window = int(config["decoder"].get("sliding_window", {}).get("window_size", 0))
        needed = job["prefill"] + job["decode"] + 1
        self.context = max(window, needed)
        if needed > int(config["context_length"]):
            raise InputError(f"onnxruntime-genai holds {config['context_length']} tokens here, {needed} are asked for")
        genai_config = self.og.Config(job["path"])
        options = {"intra_op_num_threads": job["threads"]}
        genai_config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = self.og.Model(genai_config)
        self.generator: Any = None

    def reset(self) -> None:
        """See Engine."""
        self.generator = None  # its cache is freed before the next one is allocated
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, do_sample=False)
        self.generator = self.og.Generator(self.model, params)

    def prefill(self, ids: list[int]) -> None:
        """See Engine."""
        self.generator.append_tokens(ids)

    def first(self) -> int:
        """See Engine."""
        return self.decode(0)

    def decode(self, token: int) -> int:
        """See Engine; genai feeds the token that it chose itself."""
        del token
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {"gemma-bench": Bundle, "onnxruntime-genai": Genai}


def measure(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Run all repetitions.

    Args:
        engine: the loaded model.
        job: `Settings` as a dictionary, and `started_s`, when the process was started on the clock of time.monotonic.

    Returns:
        fields of `Result`: the times, and the energy where it can be measured.
    """
    draw, meter = random.Random(0), Energy()
    fields: dict[str, Any] = {"energy": {"source": meter.source, "prefill_j": 0.0, "decode_j": 0.0}}
    fields |= {name: [] for name in ("prefill_s", "ttft_s", "decode_s", "decode_ms", "decode_at_s")}
    until = time.monotonic() + 60 * job["minutes"]
    number = -job["warmup"]
    while number < job["repeat"] or time.monotonic() < until:
        ids = [draw.randrange(engine.vocab_size) for _ in range(job["prefill"])]
        engine.reset()
        meter.joules()
        start = time.perf_counter()
        engine.prefill(ids)
        prefilled = time.perf_counter()
        token = engine.first()
        ticks = [time.perf_counter()]
        at_s, prefill_j = time.monotonic() - job["started_s"], meter.joules()
        for _ in range(job["decode"]):
            token = engine.decode(token)
            ticks.append(time.perf_counter())
        number += 1
        if number <= 0:  # this repetition was a warm-up
            continue
        fields["energy"]["prefill_j"] += prefill_j
        fields["energy"]["decode_j"] += meter.joules()
        fields["prefill_s"].append(prefilled - start)
        fields["ttft_s"].append(ticks[0] - start)
        fields["decode_s"].append(ticks[-1] - ticks[0])
        fields["decode_ms"].append([1e3 * (after - before) for before, after in itertools.pairwise(ticks)])
        fields["decode_at_s"].append(at_s)
    return fields if meter.source else {**fields, "energy": {}}


def refuse_stand_in(accelerator: str) -> None:
    """Measure no software that stands in for an accelerator.

    Raises:
        InputError: it is none of ACCELERATORS.
    """
    if accelerator not in ACCELERATORS:
        raise InputError(
            f"{accelerator} computes here, which only stands in for the accelerator: its times would be no speed;"
            " measure where the accelerator is, or with `accelerator` cpu"
        )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of packages; one that is not installed is left out."""
    installed = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def main() -> None:
    """Load the model, measure it, and print a line after each of the two."""
    job = json.loads(sys.argv[1])
    importlib.import_module(job["module"])  # its time is not the model's
    start = time.perf_counter()
    engine = ENGINES[job["tool"]](job)
    load_s = time.perf_counter() - start
    refuse_stand_in(engine.accelerator)
    _print({"load_s": load_s, "loaded_mib": memory_mib().get("rss")})
    if job["repeat"]:
        measured = measure(engine, job)
        memory = {"end_mib": memory_mib().get("rss"), "peak_mib": peak_rss_mib() or None}
        facts = {"context": engine.context, "accelerator": engine.accelerator}
        _print({**measured, "memory": memory, **facts, "versions": versions(engine.packages)})


def _print(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201 (this is the protocol)


if __name__ == "__main__":
    try:
        with one_line_errors():
            main()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
