"""The gate: a finished bundle is opened in its own runtime and compared with the original, past the end of the context, too.

Two comparisons. *Quality*: against the float checkpoint; what quantization costs. *Lowering*: against the very same integers,
dequantized in torch with a float cache; what the exporter and the runtime add, which is the runtime's int8 activations, the
rounding of an int8 KV cache, and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from gemma_edge.bundle.accelerators import CPU, DELEGATES, GPU, QUALCOMM
from gemma_edge.bundle.backends import registered
from gemma_edge.bundle.codec import convert
from gemma_edge.bundle.entries import BackendEntry, GateResult
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.children import own_place, python_command
from gemma_edge.errors import InputError
from gemma_edge.export.gate import judge
from gemma_edge.export.gate.limits import LEVELS, LOWERING_TEXT, Limits, failures
from gemma_edge.memory import give_back
from gemma_edge.model import layerwise as reference
from gemma_edge.model.checkpoint import Weights
from gemma_edge.reading import present
from gemma_edge.runtimes.engines import software_gpu
from gemma_edge.runtimes.engines.qualcomm import npu
from gemma_edge.text import corpus
from gemma_edge.text.tokenizer import TOKENIZER_FILE, TOKENIZER_HINT, open_tokenizer

# MAX_STAND_IN: weights of the largest model that SwiftShader runs: it holds them in float32, and computes about a token a second
MAX_STAND_IN = 500_000_000
# MAX_SIMULATED: the same of Qualcomm's library where it emulates the NPU
MAX_SIMULATED = 20_000_000
KILLED = 9  # SIGKILL, which Windows does not know


@dataclass(frozen=True)
class Gate:
    """Which tokens are fed and which positions are compared."""

    level: str
    text: str
    ids: list[int]
    positions: list[int]


def choose_gate(source: Weights, context: int, level: str) -> Gate | None:
    """The gate of a model's bundle; None for the level "none".

    Raises:
        InputError: the tokenizer gives an id that the model's table does not have.
    """
    if level == "none":
        return None
    path, config = source.text_folder / TOKENIZER_FILE, source.config
    return make_gate(path if present(path) else None, config.vocab_size, config.bos_token_id, context, level)


def make_gate(tokenizer: Path | None, vocab_size: int, bos: int, context: int, level: str) -> Gate:
    """Choose the tokens for a level of LEVELS; not for "none"."""
    chosen = LEVELS[level]
    assert chosen is not None, "nothing is chosen for a gate that is not run"
    ids = [bos, *_tokens(tokenizer, vocab_size, chosen.tokens(context) - 1)]
    text = ", ".join(corpus.HELD_OUT) if tokenizer else "random tokens: the model has no tokenizer"
    return Gate(level, text, ids, chosen.positions(context))


def _tokens(tokenizer: Path | None, vocab_size: int, count: int) -> list[int]:
    if tokenizer is None:
        return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, count)]
    # Half of the tokens come from each text, so that no book decides alone. Only the beginning of each text is encoded.
    encoder, half = open_tokenizer(tokenizer, TOKENIZER_HINT), count // 2
    texts = [corpus.read(name)[: corpus.CHARACTERS_PER_TOKEN * (count - half)] for name in corpus.HELD_OUT]
    halves = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
    ids = [*halves[0][:half], *halves[1][: count - half]]
    if max(ids) >= vocab_size:
        raise InputError(
            f"{tokenizer} gives token id {max(ids)}, the model has a vocabulary of {vocab_size}; {TOKENIZER_HINT}"
        )
    return ids


@dataclass(frozen=True)
class References:
    """The logits that bundles are compared with, on disk: computed once, whatever is judged by them."""

    folder: Path  # also holds task and result of the process that judges
    gate: Gate
    context: int  # tokens, of the bundles


def save_references(
    folder: Path,
    gate: Gate,
    context: int,
    original: Weights,
    quantized: Weights,
    progress: Callable[[int], None] = lambda done: None,
) -> References:
    """Compute the logits of both references.

    Args:
        folder: exists; takes 4 bytes per vocabulary entry and `Level.saved_logits`.
        gate: from `make_gate`.
        context: of the bundles, in tokens.
        original: the float checkpoint.
        quantized: the integers that are lowered.
        progress: called with 1 for each layer of each reference: see `reference_steps`.
    """
    ids, first = torch.tensor(gate.ids), [p for p in gate.positions if p < LOWERING_TEXT]
    hidden = reference.hidden_states(original, ids, context, progress)
    reference.write_logits(original, hidden[gate.positions], folder / judge.QUALITY)
    hidden = reference.hidden_states(quantized, ids[:LOWERING_TEXT], context, progress)
    reference.write_logits(quantized, hidden[first], folder / judge.LOWERING)
    return References(folder, gate, context)


def verify(
    bundle: Path,
    references: References,
    limits: Mapping[str, Limits],
    *,
    pythons: Mapping[str, str] | None = None,
    adapter: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Run the gate on backends of a bundle.

    Args:
        bundle: the finished folder.
        references: what it is compared with.
        limits: by backend, those of its fewest bits. Backends that are not named are not run.
        pythons: by backend, the Python that runs it, if that is not this one.
        adapter: the folder of one that is used.
        progress: called with 1 for each chunk of each backend: see `judging_steps`.

    Returns:
        By backend, the figures, whether they `passed`, and what it was `judged_on`; `typed` makes the manifest's
        `verification` of it.

    Raises:
        RuntimeError: the bundle could not be run.
    """
    folder, gate, results = references.folder, references.gate, {}
    manifest = Manifest.load(bundle)
    for backend, limit in limits.items():
        runs_on = place_of(manifest.backends[backend].accelerator, manifest.model.parameters)
        task = {
            "bundle": str(bundle.absolute()),
            "ids": gate.ids,
            "positions": gate.positions,
            "lowering": LOWERING_TEXT,
            "context": references.context,
            "backend": asdict(registered()[backend]),
            "accelerator": runs_on.accelerator,
            "adapter": str(adapter.absolute()) if adapter else None,
        }
        (folder / judge.TASK).write_text(json.dumps(task))
        result = {
            "level": gate.level,
            "text": gate.text,
            "fed_tokens": len(gate.ids),
            "past_wrap": len(gate.ids) > references.context,
            **_judge(folder, progress, (pythons or {}).get(backend, sys.executable), runs_on.environment),
            "limits": asdict(limit),
        }
        out_of_bounds = failures(result, limit)
        results[backend] = {**result, "failures": out_of_bounds, "passed": not out_of_bounds}
    return results


def gate_pythons(backends: Iterable[str], other: Path | None) -> dict[str, str]:
    """The Python that runs each backend's gate: this one, or the other one where this one lacks the runtime.

    Args:
        backends: names.
        other: `runtime_python`.

    Raises:
        InputError: neither has the runtime.
    """
    pythons = {}
    for name in backends:
        command = registered()[name].how_to_install()
        if command is None:
            pythons[name] = sys.executable
            continue
        hint = (
            f"{command}, then `runtime_python` with that environment's python;"
            " or `verify` none, and the bundle says NOT VERIFIED"
        )
        if other is None:
            raise InputError(
                f"`backend` {name}: the gate runs the finished bundle, and its runtime is not installed here: {hint}",
                field="backend",
                value=name,
            )
        failure = cannot_judge(str(other), name)
        if failure:
            raise InputError(
                f"`runtime_python` {other} cannot run {name} bundles ({failure}): {hint}",
                field="runtime_python",
                value=other,
            )
        pythons[name] = str(other)
    return pythons


def cannot_judge(python: str, backend: str) -> str | None:
    """Why a Python cannot run the gate of a backend; None where it can."""
    command = python_command(python, ["-c", f"import {judge.__name__}, {registered()[backend].engine_module}"])
    try:
        with own_place() as place:
            done = subprocess.run(command, capture_output=True, text=True, cwd=place.cwd, env=place.env)
    except OSError as error:
        return error.strerror
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1] if done.returncode else None


@dataclass(frozen=True)
class Place:
    """Where the gate runs a backend."""

    accelerator: str  # CPU where neither the accelerator nor a stand-in for it is here
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that its process gets


def place_of(accelerator: str, parameters: int) -> Place:
    """Where the gate runs a model of so many weights that was made for an accelerator.

    It is the accelerator, else software that stands in for it, else the CPU.
    """
    return PLACES.get(accelerator, PLACES[CPU])(parameters)


def can_judge(entry: BackendEntry[Any]) -> bool:
    """Whether anything here runs a backend of a bundle: the delegates of an experiment run on their own machine alone."""
    if entry.accelerator not in DELEGATES:
        return True
    from gemma_edge.runtimes.engines.executorch import has_delegates

    return has_delegates(entry.accelerator)


def _gpu(parameters: int) -> Place:
    folder = software_gpu.swiftshader() if parameters <= MAX_STAND_IN else None
    if software_gpu.has_gpu():
        return Place(GPU)
    return Place(GPU, {software_gpu.VARIABLE: str(folder)}) if folder else Place(CPU)


def _qualcomm(parameters: int) -> Place:
    usable = npu.has_package() and (not npu.is_simulated() or parameters <= MAX_SIMULATED)
    return Place(QUALCOMM if usable else CPU)


def _itself(accelerator: str) -> Callable[[int], Place]:
    return lambda parameters: Place(accelerator)


PLACES: Mapping[str, Callable[[int], Place]] = {
    GPU: _gpu,
    QUALCOMM: _qualcomm,
    **{name: _itself(name) for name in (CPU, *DELEGATES)},
}


def typed(results: Mapping[str, Any]) -> dict[str, GateResult]:
    """What `verify` returns as a manifest holds it: there null stands for a figure that is not finite."""
    return convert(msgspec.json.decode(msgspec.json.encode(results)), dict[str, GateResult])


def _judge(
    folder: Path, progress: Callable[[int], None], python: str, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The bundle's half in a fresh process: it shares no memory with torch, as on the device."""
    command = python_command(python, ["-m", judge.__name__, str(folder.absolute())])
    log = folder / "stderr"
    give_back()
    with (
        own_place() as place,
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=place.cwd,
            env={**place.env, **environment},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for _ in process.stdout:
                progress(1)
        except BaseException:
            process.kill()
            raise
    if process.returncode == -KILLED:
        raise InputError(
            "the gate's process was killed while it ran the finished bundle, most likely because memory was full;"
            " close other programs, raise the container's limit, or pass `verify` none",
            field="verify",
        )
    if process.returncode != 0:
        message = log.read_text().strip() or f"exit code {process.returncode}"
        raise RuntimeError(f"the finished bundle does not run: {message.splitlines()[-1]}")
    result: dict[str, Any] = json.loads((folder / judge.RESULT).read_text())
    return result


def reference_steps(layers: int) -> int:
    """How often `save_references` reports progress."""
    return 2 * layers


def judging_steps(tokens: int, chunk: int, backends: int) -> int:
    """How often `verify` reports progress."""
    return backends * -(-tokens // chunk)
