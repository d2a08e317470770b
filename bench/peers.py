"""Other programs, measured in the same session by their own means: llama.cpp's llama-bench, onnxruntime-genai's package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.bench import machine
from gemma_edge.bench.bench import Contender, Local, here
from gemma_edge.bench.process import ChildFailed, Watched, watch
from gemma_edge.bench.result import Settings
from gemma_edge.children import find_program
from gemma_edge.errors import InputError


@dataclass(frozen=True)
class LlamaBench:
    """A GGUF file in llama-bench. It tells sums of decoding only; memory is watched from outside, mapped pages included."""

    program: str
    path: Path
    tool: str = "llama-bench"

    @property
    def model(self) -> dict[str, Any]:
        """See Contender."""
        return {"name": self.path.name, "backend": "llama.cpp", "bytes": self.path.stat().st_size}

    def device(self, settings: Settings) -> dict[str, Any]:
        """This machine."""
        return here(settings.threads)

    def measure(self, settings: Settings) -> dict[str, Any]:
        """Two calls: the prompt alone, then decoding behind as many tokens."""
        if settings.minutes:
            raise ChildFailed("llama-bench cannot go on for --minutes; leave one of them out")
        before, foreign = machine.state(), machine.Foreign()
        seen, prompt = self._run(settings, "-p", settings.prefill, "-n", 0)
        behind, decode = self._run(settings, "-p", 0, "-n", settings.decode, "-d", settings.prefill)
        prefill_s, decode_s = ([ns / 1e9 for ns in row["samples_ns"]] for row in (prompt, decode))
        loaded_at_s = next(at_s for at_s, line in seen.lines if "benchmark 1/" in line and "run" in line)
        samples = seen.samples + behind.samples
        memory = {
            "loaded_mib": next((mib for at_s, mib in seen.samples if at_s >= loaded_at_s), None),
            "peak_mib": max((mib for _, mib in samples), default=None),
            "samples": behind.samples,
        }
        context = settings.prefill + settings.decode
        return {
            "model": {**self.model, "context": context, "read_bytes_per_token": prompt["model_size"]},
            "versions": {"llama.cpp": prompt["build_commit"]},
            "load": {"warm_s": loaded_at_s},
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "memory": memory,
            "state": {"before": before, "after": machine.state()},
            "others_cores": foreign.cores(),
        }

    def _run(self, settings: Settings, *tests: str | int) -> tuple[Watched, dict[str, Any]]:
        """What was seen, and the one result."""
        command = [self.program, "-m", self.path, "-t", settings.threads, *tests, "-r", settings.repeat, "-o", "json"]
        command += ["--progress"] if settings.warmup else ["--progress", "--no-warmup"]
        seen = watch(lambda started_s: [str(word) for word in command], stream="stderr")
        try:
            (row,) = json.loads(seen.output)
        except ValueError:
            raise ChildFailed(f"{self.program} printed no result: {seen.output[:100]!r}") from None
        return seen, row


def llama_cpp(given: str, bundles: Sequence[Path]) -> list[Contender]:
    """`--peer llama.cpp:FILE.gguf`."""
    if not given:
        raise InputError("--peer llama.cpp wants a model: --peer llama.cpp:FILE.gguf")
    program = find_program("llama-bench")
    if program is None:
        raise InputError("--peer llama.cpp needs llama-bench on the PATH; python tools/benchmarks/peers.py builds it")
    path = Path(given)
    if not path.is_file():
        raise InputError(f"--peer llama.cpp: there is no file {path}")
    return [LlamaBench(program, path.absolute())]


def genai(given: str, bundles: Sequence[Path]) -> list[Contender]:
    """`--peer genai:FOLDER`; without a folder the bundles themselves, which onnxruntime-genai runs as they are."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise InputError("--peer genai needs onnxruntime-genai, which is not installed: pip install onnxruntime-genai")
    return [_genai(folder) for folder in ([Path(given)] if given else bundles)]


def _genai(folder: Path) -> Contender:
    try:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        graph = folder / str(config["decoder"]["filename"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: onnxruntime-genai cannot read it, its genai_config.json is missing or damaged ({error})"
        ) from None
    files = [graph, *folder.glob("*.data")]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    if not sizes:
        raise InputError(f"{folder} holds no graph for onnxruntime-genai: {graph.name} is missing")
    model = {"name": folder.resolve().name, "backend": "genai", "bytes": sum(sizes), "read_bytes_per_token": max(sizes)}
    return Local("onnxruntime-genai", model, {"path": str(folder.absolute()), "module": "onnxruntime_genai"}, files)


PEERS: dict[str, Callable[[str, Sequence[Path]], list[Contender]]] = {"llama.cpp": llama_cpp, "genai": genai}


def contenders(peers: Sequence[str], bundles: Sequence[Path]) -> list[Contender]:
    """Those named by `NAME` or `NAME:MODEL`.

    Raises:
        InputError: an unknown name, one that is not installed, or a model that is not there.
    """
    found = []
    for peer in peers:
        name, _, given = peer.partition(":")
        if name not in PEERS:
            raise InputError(f"--peer {peer}: {name!r} is none of {', '.join(PEERS)}")
        found += PEERS[name](given, bundles)
    return found
