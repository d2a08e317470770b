"""gemma-bench's measurements: which processes run, in which order, and what a result holds of each.

Each result is one process: child.py, watched by process.py. stats.py computes figures from results, report.py and html.py show
them. A bundle on this machine is a `Contender`; so are the peers of peers.py and the phones of phones.py.
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
from gemma_edge.bundle.backends import choose_accelerator, choose_backend, registered
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.manifest import MANIFEST, Manifest, confined
from gemma_edge.children import python_command
from gemma_edge.errors import InputError
from gemma_edge.files import sha256


class Contender(Protocol):
    """Something that can be measured."""

    @property
    def tool(self) -> str:
        """`Result.tool`."""

    @property
    def model(self) -> dict[str, Any]:
        """`Result.model`: at least name and backend."""

    def device(self, settings: Settings) -> dict[str, Any]:
        """`Result.device`: the machine or the phone that it runs on."""

    def measure(self, settings: Settings) -> dict[str, Any]:
        """Measure once.

        Returns:
            fields of a `Result`.

        Raises:
            ChildFailed: the measurement failed; the message says why in one line.
        """


@dataclass(frozen=True)
class Plan:
    """What is measured: in every round each contender once with each of the settings, so that drift hits all alike."""

    contenders: Sequence[Contender]
    settings: Sequence[Settings]
    rounds: int = 1

    def __len__(self) -> int:
        return len(self.contenders) * len(self.settings) * self.rounds

    def run(self) -> Iterator[Result]:
        """Measure one after the other, and yield each result when it is there."""
        for _ in range(self.rounds):
            for contender in self.contenders:
                for settings in self.settings:
                    yield measure(contender, settings)


def measure(contender: Contender, settings: Settings) -> Result:
    """Measure a contender once. The result of one that fails has `failure`, and no samples."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    result = Result(contender.tool, started, contender.model, settings, contender.device(settings))
    try:
        measured = contender.measure(settings)
    except ChildFailed as error:
        result.failure = str(error)
        return result
    known = asdict(result)
    for name, value in measured.items():
        setattr(result, name, {**known[name], **value} if isinstance(value, dict) else value)
    return result


class Local:
    """A model on this machine, which child.py measures in a process of its own."""

    def __init__(self, tool: str, model: dict[str, Any], job: dict[str, Any], files: Sequence[Path]) -> None:
        """Nothing is opened yet.

        Args:
            tool: a name in child.ENGINES.
            model: see `Contender`.
            job: what the engine needs beside the settings: path, module, ...
            files: the files that loading reads; they are dropped from the system's cache before the cold load.
        """
        self.tool, self.model, self._job, self._files = tool, model, job, files

    def device(self, settings: Settings) -> dict[str, Any]:
        """This machine, and how fast that many threads read its memory."""
        return here(settings.threads)

    def measure(self, settings: Settings) -> dict[str, Any]:
        """Start two processes: one loads cold, after its files were dropped from the cache; the other one measures."""
        load = {}
        if drop_from_cache(self._files):
            load["cold_s"] = self._child(settings, load_only=True)[0]["load_s"]
        before, others = machine.state(), machine.OtherProcesses()
        loaded, measured = self._child(settings)
        load["warm_s"] = loaded["load_s"]
        model = {**self.model, **{name: measured.pop(name) for name in ("context", "accelerator")}}
        memory = {"loaded_mib": loaded["loaded_mib"], **measured.pop("memory")}
        own = {"load": load, "memory": memory, "state": {"before": before, "after": machine.state()}}
        return {**measured, **own, "model": model, "others_cores": others.cores()}

    def _child(self, settings: Settings, *, load_only: bool = False) -> list[dict[str, Any]]:
        """The lines that a child printed, parsed; the samples of its memory are added to the last one."""
        requested = {**self._job, **asdict(settings), "tool": self.tool} | ({"repeat": 0} if load_only else {})

        def command(started_s: float) -> list[str]:
            job = json.dumps({**requested, "started_s": started_s})
            return python_command(sys.executable, ["-m", "gemma_edge.bench.child", job])

        watched = watch(command)
        lines = [json.loads(line) for _, line in watched.lines if line.startswith("{")]
        lines[-1].setdefault("memory", {})["samples"] = watched.samples
        return lines


class BundleContender(Local):
    """A bundle in one of its backends."""

    def __init__(self, path: Path, manifest: Manifest, backend: str, accelerator: str | None = None) -> None:
        info = registered()[backend]
        job = {
            "path": str(path.absolute()),
            "backend": backend,
            "accelerator": accelerator,
            "module": info.engine_module,
            "package": info.runs_with.module,
        }
        super().__init__(
            "gemma-bench", backend_facts(path, manifest, backend), job, backend_files(path, manifest, backend)
        )
        self._cache = manifest.backends[backend].cache

    def measure(self, settings: Settings) -> dict[str, Any]:
        """See `Local`; the bytes that a token reads are added."""
        measured = super().measure(settings)
        model = measured["model"]
        model["read_bytes_per_token"] = read_bytes_per_token(model, self._cache, settings)
        return measured


def backend_facts(path: Path, manifest: Manifest, backend: str) -> dict[str, Any]:
    """`Result.model`, as far as the bundle itself tells."""
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
    """How many bytes the token in the middle of the answer must read at least: the weights file, and its part of the cache.

    The weights file is the largest one. It is read whole, because the embedding table is the head, too.
    """
    return int(model["weights_bytes"]) + kv_bytes(cache, settings.prefill + settings.decode // 2)


def backend_files(path: Path, manifest: Manifest, backend: str) -> list[Path]:
    """The files of one backend, as far as its entry in the manifest names them."""
    entry = manifest.backends[backend]
    names = entry.files
    if isinstance(entry.settings, dict):  # a backend of another package: any of its settings may be a file's name
        names = [name for name in entry.settings.values() if isinstance(name, str) and name in manifest.files]
    return [confined(path, name) for name in names]


def kv_bytes(cache: CacheGeometry, depth: int) -> int:
    """How many bytes of keys and values a token sees when `depth` tokens are in the context."""
    part = sum(min(depth, layer.window) for layer in cache.layers) / sum(layer.slots for layer in cache.layers)
    return round(cache.bytes * part)


def drop_from_cache(files: Sequence[Path]) -> bool:
    """Ask the system to drop files from its cache, so that the next load reads the disk; False where that is not possible.

    A user may do no more than ask: what another process has mapped stays in memory.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


@lru_cache
def here(threads: int) -> dict[str, Any]:
    """This machine, and how fast `threads` threads read its memory, which is measured once."""
    return {**machine.describe(), "read_gb_per_s": round(machine.read_gb_per_s(threads), 1)}


def bundle_contenders(
    paths: Sequence[Path], backend: str | None, accelerator: str | None = None
) -> tuple[list[Contender], list[str]]:
    """Every backend of every bundle that can run here.

    Args:
        paths: the bundles.
        backend: measure this backend only; None measures every one.
        accelerator: what computes; None takes what each backend was made for.

    Returns:
        the contenders, and a note on each backend that is left out because it is not installed.

    Raises:
        InputError: a path is not a bundle, or no backend of a bundle can run here.
    """
    contenders: list[Contender] = []
    notes = []
    for path in paths:
        manifest = Manifest.load(path)
        choose_backend(path, manifest, backend)  # refuses what cannot run at all
        for name in [backend] if backend else [name for name in manifest.backends if name in registered()]:
            if command := registered()[name].how_to_install():
                notes.append(f"{path}: {name} is not installed and left out; {command}")
            else:
                choose_accelerator(path, manifest, name, accelerator)  # refuses what it was not made for
                contenders.append(BundleContender(path, manifest, name, accelerator))
    return contenders, notes


@dataclass(frozen=True)
class Sweep:
    """Numbers of threads and lengths of prompts that are measured in every combination, and what they share."""

    threads: Sequence[int]
    prefill: Sequence[int]  # tokens
    decode: int  # tokens
    repeat: int
    warmup: int
    minutes: float

    def settings(self, cores: int) -> list[Settings]:
        """Every combination; the number of threads changes least often.

        Raises:
            InputError: a number is out of range, or there are more threads than `cores`.
        """
        bounds: dict[str, tuple[Sequence[float], float, float, str]] = {
            "threads": (self.threads, 1, cores, f"more threads than the {cores} cores only wait for each other"),
            "prefill": (self.prefill, 1, 1 << 20, "a prompt has at least one token"),
            "decode": ([self.decode], 1, 1 << 20, "at least one token must be generated"),
            "repeat": ([self.repeat], 1, 10_000, "at least one repetition must count"),
            "warmup": ([self.warmup], 0, 10_000, "0 for none"),
            "minutes": ([self.minutes], 0, 24 * 60, "0 for none, a day at most"),
        }
        for name, (values, low, high, reason) in bounds.items():
            for value in values:
                if not low <= value <= high:
                    problem = f"`{name}` {value} is not within {low} and {high}: {reason}"
                    raise InputError(problem, field=name, value=value)
        shared = (self.decode, self.repeat, self.warmup, self.minutes)
        return [Settings(count, tokens, *shared) for count in self.threads for tokens in self.prefill]
