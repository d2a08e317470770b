"""Other programs, measured in the same run as bundles: llama.cpp by its llama-bench, onnxruntime-genai by its package."""

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
from gemma_edge.reading import read_json


@dataclass(frozen=True)
class LlamaBench:
    """A GGUF file in llama-bench, which tells the time of all decoded tokens together, not of each.

    Its memory is read from outside the process, mapped pages included.
    """

    program: str
    path: Path
    tool: str = "llama-bench"

    @property
    def model(self) -> dict[str, Any]:
        """See `Contender`."""
        return {"name": self.path.name, "backend": "llama.cpp", "bytes": self.path.stat().st_size}

    def device(self, settings: Settings) -> dict[str, Any]:
        """This machine."""
        return here(settings.threads)

    def measure(self, settings: Settings) -> dict[str, Any]:
        """Run llama-bench twice: the prompt alone, then decoding after as many tokens of context."""
        if settings.minutes:
            raise ChildFailed("llama-bench cannot go on for some minutes; leave out either this peer or the minutes")
        before, others = machine.state(), machine.OtherProcesses()
        prefilling, prompt = self._run(settings, "-p", settings.prefill, "-n", 0)
        decoding, decode = self._run(settings, "-p", 0, "-n", settings.decode, "-d", settings.prefill)
        prefill_s, decode_s = ([ns / 1e9 for ns in row["samples_ns"]] for row in (prompt, decode))
        loaded_at_s = next(at_s for at_s, line in prefilling.lines if "benchmark 1/" in line and "run" in line)
        samples = prefilling.samples + decoding.samples
        memory = {
            "loaded_mib": next((mib for at_s, mib in prefilling.samples if at_s >= loaded_at_s), None),
            "peak_mib": max((mib for _, mib in samples), default=None),
            "samples": decoding.samples,
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
            "others_cores": others.cores(),
        }

    def _run(self, settings: Settings, *tests: str | int) -> tuple[Watched, dict[str, Any]]:
        """Run llama-bench with one test; what was seen of the process, and the result it printed."""
        command = [self.program, "-m", self.path, "-t", settings.threads, *tests, "-r", settings.repeat, "-o", "json"]
        command += ["--progress"] if settings.warmup else ["--progress", "--no-warmup"]
        watched = watch(lambda started_s: [str(word) for word in command], stream="stderr")
        try:
            (row,) = json.loads(watched.output)
        except ValueError:
            raise ChildFailed(f"{self.program} printed no result: {watched.output[:100]!r}") from None
        return watched, row


def llama_cpp(model: str, bundles: Sequence[Path]) -> list[Contender]:
    """The peer `llama.cpp:FILE.gguf`."""
    if not model:
        raise InputError("`peers` llama.cpp needs a model: `peers` llama.cpp:FILE.gguf", field="peers")
    program = find_program("llama-bench")
    if program is None:
        problem = "`peers` llama.cpp needs llama-bench on the PATH"
        raise InputError(problem, field="peers", hint="python tools/benchmarks/peers.py builds it")
    path = Path(model)
    if not path.is_file():
        raise InputError(f"`peers` llama.cpp: there is no file {path}", field="peers", value=model)
    return [LlamaBench(program, path.absolute())]


def genai(model: str, bundles: Sequence[Path]) -> list[Contender]:
    """The peer `genai:FOLDER`; `genai` alone runs the bundles, which onnxruntime-genai can open as they are."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        problem = "`peers` genai needs onnxruntime-genai, which is not installed: pip install onnxruntime-genai"
        raise InputError(problem, field="peers")
    if not model and not bundles:
        raise InputError("`peers` genai needs a model: give a bundle, or `peers` genai:FOLDER", field="peers")
    return [_genai(folder) for folder in ([Path(model)] if model else bundles)]


def _genai(folder: Path) -> Contender:
    try:
        config = read_json(folder / "genai_config.json", "pass a folder with a model for onnxruntime-genai")["model"]
        graph = folder / str(config["decoder"]["filename"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: onnxruntime-genai cannot read it, its genai_config.json is missing or damaged ({error})"
        ) from None
    files = [graph, *folder.glob("*.data")]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    if not sizes:
        raise InputError(f"{folder} holds no graph for onnxruntime-genai: {graph.name} is missing")
    model = {"name": folder.resolve().name, "backend": "genai", "bytes": sum(sizes), "read_bytes_per_token": max(sizes)}
    return Local("onnxruntime-genai", model, {"path": str(folder.absolute()), "module": "onnxruntime_genai"}, files)


# PEERS: name -> a function of the model in NAME:MODEL ("" for NAME alone) and the bundles.
PEERS: dict[str, Callable[[str, Sequence[Path]], list[Contender]]] = {"llama.cpp": llama_cpp, "genai": genai}


def contenders(peers: Sequence[str], bundles: Sequence[Path]) -> list[Contender]:
    """The peers to measure.

    Args:
        peers: `NAME` or `NAME:MODEL` each.
        bundles: the bundles that are measured, too.

    Raises:
        InputError: a name is unknown, a program is not installed, or a model is missing.
    """
    contenders: list[Contender] = []
    for peer in peers:
        name, _, model = peer.partition(":")
        if name not in PEERS:
            raise InputError(f"`peers` {peer}: {name!r} is none of {', '.join(PEERS)}", field="peers", value=peer)
        contenders += PEERS[name](model, bundles)
    return contenders
