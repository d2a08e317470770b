"""gemma-bench's measurements on this machine: which processes run, in which order, and what is known of each.

A result is one process (bench_child.py); bench_process.py watches it. Numbers are drawn from results by bench_stats.py, shown by
bench_report.py and bench_html.py. Peers are bench_peers.py's, phones are phones.py's: they are `Contender`s like a bundle.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from gemma_edge.bench import machine
from gemma_edge.bench.process import ChildFailed, watch
from gemma_edge.bench.result import Result, Settings
from gemma_edge.bundle.backends import RUNTIMES, choose_backend, how_to_install
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.manifest import MANIFEST, Manifest, confined, sha256
from gemma_edge.errors import InputError


class Contender(Protocol):
    """Something that can be measured."""

    @property
    def tool(self) -> str:
        """For the result."""

    @property
    def model(self) -> dict[str, Any]:
        """For the result; name and backend at least."""

    def device(self, settings: Settings) -> dict[str, Any]:
        """Where it runs; for the result."""

    def measure(self, settings: Settings) -> dict[str, Any]:
        """Fields of a result.

        Raises:
            ChildFailed: why there are none, in one line.
        """


@dataclass(frozen=True)
class Plan:
    """What is measured, in this order: in every round each setting of each contender once, so that drift hits all alike."""

    contenders: Sequence[Contender]
    settings: Sequence[Settings]
    rounds: int = 1

    def __len__(self) -> int:
        return len(self.contenders) * len(self.settings) * self.rounds

    def run(self) -> Iterator[Result]:
        """Measure one after the other."""
        for _ in range(self.rounds):
            for contender in self.contenders:
                for settings in self.settings:
                    yield measure(contender, settings)


def measure(contender: Contender, settings: Settings) -> Result:
    """One result; of a contender that fails it says why."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    result = Result(contender.tool, started, contender.model, settings, contender.device(settings))
    try:
        found = contender.measure(settings)
    except ChildFailed as error:
        result.failure = str(error)
        return result
    known = asdict(result)
    for name, value in found.items():
        setattr(result, name, {**known[name], **value} if isinstance(value, dict) else value)
    return result


class Local:
    """A model on this machine, in a process that speaks bench_child.py's protocol."""

    def __init__(self, tool: str, model: dict[str, Any], job: dict[str, Any], files: Sequence[Path]) -> None:
        """Nothing is opened yet.

        Args:
            tool: of bench_child.ENGINES.
            job: path, module and what the engine wants beside the settings.
            files: what a load reads, to be dropped from the system's cache for the cold one.
        """
        self.tool, self.model, self._job, self._files = tool, model, job, files

    def device(self, settings: Settings) -> dict[str, Any]:
        """This machine, with the read bandwidth of as many threads."""
        return here(settings.threads)

    def measure(self, settings: Settings) -> dict[str, Any]:
        """A process that only loads, after its files were dropped from the cache; then the one that measures."""
        load = {}
        if drop_from_cache(self._files):
            load["cold_s"] = self._child(settings, load_only=True)[0]["load_s"]
        before, foreign = machine.state(), machine.Foreign()
        loaded, found = self._child(settings)
        load["warm_s"] = loaded["load_s"]
        model = {**self.model, "context": found.pop("context")}
        memory = {"loaded_mib": loaded["loaded_mib"], **found.pop("memory")}
        own = {"load": load, "memory": memory, "state": {"before": before, "after": machine.state()}}
        return {**found, **own, "model": model, "others_cores": foreign.cores()}

    def _child(self, settings: Settings, *, load_only: bool = False) -> list[dict[str, Any]]:
        """What it printed; the samples of its memory go to the last line."""
        asked = {**self._job, **asdict(settings), "tool": self.tool} | ({"repeat": 0} if load_only else {})

        def command(started_s: float) -> list[str]:
            job = json.dumps({**asked, "started_s": started_s})
            return [sys.executable, "-m", "gemma_edge.bench.child", job]

        seen = watch(command)
        lines = [json.loads(line) for _, line in seen.lines if line.startswith("{")]
        lines[-1].setdefault("memory", {})["samples"] = seen.samples
        return lines


class BundleContender(Local):
    """A bundle in one of its backends."""

    def __init__(self, path: Path, manifest: Manifest, backend: str) -> None:
        module, _, package, _ = RUNTIMES[backend]
        job = {"path": str(path), "backend": backend, "module": module, "package": package}
        super().__init__(
            "gemma-bench", backend_facts(path, manifest, backend), job, backend_files(path, manifest, backend)
        )
        self._cache = manifest.backends[backend].cache

    def measure(self, settings: Settings) -> dict[str, Any]:
        """See Local; with the bytes that a token reads."""
        found = super().measure(settings)
        found["model"]["read_bytes_per_token"] = read_bytes_per_token(found["model"], self._cache, settings)
        return found


def backend_facts(path: Path, manifest: Manifest, backend: str) -> dict[str, Any]:
    """The `model` of a result, as far as the bundle itself tells."""
    sizes = [file.stat().st_size for file in backend_files(path, manifest, backend)]
    name, digest = path.resolve().name, sha256(path / MANIFEST)
    return {
        "name": name,
        "backend": backend,
        "bytes": sum(sizes),
        "weights_bytes": max(sizes),
        "manifest_sha256": digest,
    }


def read_bytes_per_token(model: dict[str, Any], cache: CacheGeometry, settings: Settings) -> int:
    """Half-way, what a token must read at least: the largest file (the weights; the table is the head too), and the cache."""
    return int(model["weights_bytes"]) + kv_bytes(cache, settings.prefill + settings.decode // 2)


def backend_files(path: Path, manifest: Manifest, backend: str) -> list[Path]:
    """The files of one backend, as far as its entry in the manifest names them."""
    return [confined(path, name) for name in manifest.backends[backend].files]


def kv_bytes(cache: CacheGeometry, depth: int) -> int:
    """Keys and values that a token sees when `depth` tokens are in the context."""
    kept = sum(min(depth, layer.window) for layer in cache.layers) / sum(layer.slots for layer in cache.layers)
    return round(cache.bytes * kept)


def drop_from_cache(files: Sequence[Path]) -> bool:
    """Ask the system to forget files, so that the next load reads the disk; False where it cannot be asked.

    It is the most that a user may do. What another process has mapped stays.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet could not be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


@lru_cache
def here(threads: int) -> dict[str, Any]:
    """This machine, with what `threads` threads read: measured once."""
    return {**machine.describe(), "read_gb_per_s": round(machine.read_gb_per_s(threads), 1)}


def bundle_contenders(paths: Sequence[Path], backend: str | None) -> tuple[list[Contender], list[str]]:
    """Every backend of every bundle that can run here, and a note on each that cannot.

    Raises:
        InputError: no bundle, or one of which nothing can run here.
    """
    found: list[Contender] = []
    notes = []
    for path in paths:
        manifest = Manifest.load(path)
        choose_backend(path, manifest, backend)  # refuses what cannot run at all
        for name in [backend] if backend else [name for name in manifest.backends if name in RUNTIMES]:
            if command := how_to_install(name):
                notes.append(f"{path}: {name} is not installed and left out; {command}")
            else:
                found.append(BundleContender(path, manifest, name))
    return found, notes


def settings_of(
    threads: Sequence[int], prefill: Sequence[int], *, decode: int, repeat: int, warmup: int, minutes: float, cores: int
) -> list[Settings]:
    """Every combination, threads outermost.

    Raises:
        InputError: a number out of range, or more threads than `cores`.
    """
    bounds = {
        "-t": (threads, 1, cores, f"more threads than the {cores} cores only wait for each other"),
        "-p": (prefill, 1, 1 << 20, "a prompt has at least one token"),
        "-n": ([decode], 1, 1 << 20, "at least one token must be generated"),
        "-r": ([repeat], 1, 10_000, "at least one repetition must count"),
        "-w": ([warmup], 0, 10_000, "0 for none"),
        "--minutes": ([minutes], 0, 24 * 60, "0 for none, a day at most"),
    }
    for option, (values, low, high, why) in bounds.items():
        for value in values:
            if not low <= value <= high:
                raise InputError(f"{option} {value} is not within {low} and {high}: {why}")
    return [Settings(count, tokens, decode, repeat, warmup, minutes) for count in threads for tokens in prefill]
