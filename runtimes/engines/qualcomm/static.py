"""ONNX Runtime over graphs in plain operators with static shapes: on Qualcomm's NPU, on what emulates it, or on the CPU.

A step is two graphs: `feeds` computes on the CPU what depends on tokens and positions, and `generate` (one token), `prefill` or
`score` (a chunk each) compute the rest. A shorter chunk is filled up with its last token at its own position, which writes the
same rows to the same slot again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from gemma_edge.bundle.accelerators import CPU, QUALCOMM
from gemma_edge.bundle.entries import BackendEntry
from gemma_edge.bundle.manifest import Manifest, intact
from gemma_edge.bundle.settings import OnnxSettings
from gemma_edge.errors import InputError, one_line
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Buffers, Runtime
from gemma_edge.runtimes.engines.load import STDOUT, in_library, refuse_older, silent, thread_count
from gemma_edge.runtimes.engines.onnx import ERRORS, OLDEST_ONNXRUNTIME, session_options
from gemma_edge.runtimes.engines.qualcomm import npu

log = logging.getLogger(__name__)


class StaticOnnxRuntime(Runtime):
    """A bundle's ONNX backend that was made for an NPU."""

    def __init__(self, bundle: Path, manifest: Manifest, *, threads: int | None, accelerator: str = CPU) -> None:
        """Open the graphs of one token.

        Args:
            bundle, manifest: the folder and what it says of itself.
            threads: of what is computed on the CPU; None takes the target's.
            accelerator: what computes all but the feeds.

        Raises:
            InputError: a package is missing or too old, files are not what the manifest says, or the NPU cannot run them whole.
        """
        entry: BackendEntry[OnnxSettings] = manifest.backends["onnx"]
        super().__init__(bundle, manifest, entry.cache, entry.identity)
        refuse_older("onnxruntime", ort.__version__, OLDEST_ONNXRUNTIME)
        self._graphs = entry.settings.roles
        self.threads = thread_count(threads, manifest)
        self._device = None if accelerator == CPU else npu.find()
        if self._device is not None:
            self.computes_on = npu.SIMULATOR if npu.is_simulated() else QUALCOMM
        cache = self.cache
        self._rows: dict[str, NDArray[np.float32]] = {
            f"{index}.{kind}": np.zeros((1, cache.kv_heads, layer.slots, cache.head_dim), np.float32)
            for index, layer in enumerate(cache.layers)
            for kind in ("key", "value")
        }
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._fed = [node.name for node in self._session("feeds").get_outputs()]
        self._session("generate")

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """See Runtime."""
        count = len(ids)
        role = "generate" if count == 1 else "score" if every_position else "prefill"
        session = self._session(role)
        size = next(node.shape[1] for node in session.get_inputs() if node.name == "inputs_embeds")
        at = np.minimum(np.arange(size), count - 1)  # the last token fills the graph up
        fed = self._run("feeds", {"input_ids": ids[at][None], "positions": self.position + at})
        past = {f"past_key_values.{name}": rows for name, rows in self._rows.items()}
        out = self._run(role, {**fed, **past})
        self._rows = {name: out[f"present.{name}"] for name in self._rows}
        logits: Logits = out["logits"][0]
        return logits[:count] if every_position else logits

    def _run(self, role: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        session = self._sessions[role]
        with in_library(self.bundle / self._graphs[role], "does not run", ERRORS):
            outputs = session.run(None, inputs)
        return dict(zip((node.name for node in session.get_outputs()), outputs, strict=True))

    def _clear(self) -> None:
        """See Runtime: masks hide every slot that was not written since."""

    def _buffers(self) -> Buffers:
        """See Runtime."""
        return dict(self._rows)

    def _session(self, role: str) -> ort.InferenceSession:
        """The graph of a role, opened when it is first used."""
        if role in self._sessions:
            return self._sessions[role]
        path = intact(self.bundle, self.manifest.files, self._graphs[role])
        intact(self.bundle, self.manifest.files, self._graphs["weights"])
        log.info("loading %s", path)
        options = session_options(self.threads)
        with in_library(path, "is damaged, or is not a graph of this bundle", ERRORS):
            if self._device is None or role == "feeds":
                session = ort.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
                )
            else:
                session = self._on_npu(path, options)
            self._check_contract(path, role, session)
        self._sessions[role] = session
        return session

    def _on_npu(self, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        """A graph of which nothing is left on the CPU."""
        # else the rest would be computed on the CPU without a word
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([self._device], npu.settings())
        try:
            with silent(STDOUT):  # the emulator's line about its threads
                return ort.InferenceSession(str(path), options)
        except ERRORS as error:
            raise InputError(
                f"`accelerator` {QUALCOMM}: Qualcomm's library cannot compute the whole of {path} ({one_line(error)});"
                " use `accelerator` cpu",
                field="accelerator",
                value=QUALCOMM,
            ) from None

    def _check_contract(self, path: Path, role: str, session: ort.InferenceSession) -> None:
        """Names and shapes of the graph against the manifest."""
        found = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
        if role == "feeds":
            expected: dict[str, list[int | None]] = {"input_ids": [1, None], "positions": [None]}
        else:
            size = found["inputs_embeds"][1]
            expected = {name: [] for name in self._fed} | {
                "logits": [1, size if role == "score" else 1, self.vocab_size]
            }
            for name, rows in self._rows.items():
                expected |= {f"{side}.{name}": list(rows.shape) for side in ("past_key_values", "present")}
        for name, shape in expected.items():
            actual = found.get(name)
            fits = actual is not None and all(want in (None, size) for want, size in zip(shape, actual, strict=False))
            if not fits:
                raise InputError(f"{path}: {name} is {actual}, the manifest says {shape}; export the bundle again")
