"""The process that is measured: loads one model, runs prompt and generation, prints one JSON line.

bench.py starts it as `python -m gemma_edge.bench.child JOB`; each engine imports what it needs. Token ids are
random; what is generated is thrown away.
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
from gemma_edge.command import one_line_errors
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.memory import memory_mib, peak_rss_mib
from gemma_edge.runtimes.engines.load import open_runtime


class Engine(Protocol):
    """The three things that are timed, and what is said of them."""

    vocab_size: int
    context: int  # tokens its KV cache holds

    @property
    def packages(self) -> Sequence[str]:
        """Whose versions matter."""

    def reset(self) -> None:
        """Forget the context; not timed."""

    def prefill(self, ids: list[int]) -> None:
        """Feed a prompt."""

    def first(self) -> int:
        """The likeliest token after it."""

    def decode(self, token: int) -> int:
        """Feed one token, return the likeliest next one."""


class Bundle:
    """A bundle in one of its backends."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.runtime = open_runtime(job["path"], backend=job["backend"], threads=job["threads"])
        self.vocab_size = self.runtime.manifest.config.vocab_size
        self.context = self.runtime.cache.context
        self.packages = ("gemma-edge", job["package"])
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
    """onnxruntime-genai, on a folder with a genai_config.json: its builder's, or a bundle of ours."""

    packages = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, job: dict[str, Any]) -> None:
        self.og: Any = importlib.import_module(job["module"])
        given = json.loads((Path(job["path"]) / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.vocab_size = int(given["vocab_size"])
        # its windowed cache wants room for a whole window, whatever the prompt
        window = int(given["decoder"].get("sliding_window", {}).get("window_size", 0))
        asked = job["prefill"] + job["decode"] + 1
        self.context = max(window, asked)
        if asked > int(given["context_length"]):
            raise InputError(f"onnxruntime-genai holds {given['context_length']} tokens here, {asked} are asked for")
        config = self.og.Config(job["path"])
        options = {"intra_op_num_threads": job["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = self.og.Model(config)
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
        """See Engine; it appends the token it chose itself."""
        del token
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {"gemma-bench": Bundle, "onnxruntime-genai": Genai}


def measure(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """All repetitions; times in the fields of bench_result.Result."""
    draw, meter = random.Random(0), Energy()
    found: dict[str, Any] = {"energy": {"source": meter.source, "prefill_j": 0.0, "decode_j": 0.0}}
    found |= {name: [] for name in ("prefill_s", "ttft_s", "decode_s", "decode_ms", "decode_at_s")}
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
        if number <= 0:  # it was a warm-up
            continue
        found["energy"]["prefill_j"] += prefill_j
        found["energy"]["decode_j"] += meter.joules()
        found["prefill_s"].append(prefilled - start)
        found["ttft_s"].append(ticks[0] - start)
        found["decode_s"].append(ticks[-1] - ticks[0])
        found["decode_ms"].append([1e3 * (after - before) for before, after in itertools.pairwise(ticks)])
        found["decode_at_s"].append(at_s)
    return found if meter.source else {**found, "energy": {}}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of packages installed here; absent ones are left out."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def main() -> None:
    """One line when the model is loaded, one with the measurements."""
    job = json.loads(sys.argv[1])
    importlib.import_module(job["module"])  # not the model's time
    start = time.perf_counter()
    engine = ENGINES[job["tool"]](job)
    load_s = time.perf_counter() - start
    _tell({"load_s": load_s, "loaded_mib": memory_mib().get("rss")})
    if job["repeat"]:
        found = measure(engine, job)
        memory = {"end_mib": memory_mib().get("rss"), "peak_mib": peak_rss_mib() or None}
        _tell({**found, "memory": memory, "context": engine.context, "versions": versions(engine.packages)})


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201 (this is the protocol)


if __name__ == "__main__":
    try:
        with one_line_errors():
            main()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
