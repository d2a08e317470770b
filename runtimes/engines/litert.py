"""LiteRT on CPU or GPU: `.tflite` signatures over one set of KV caches, each one buffer that is input and output at once.

signatures.py chooses what is fed to which signature.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.environment import Environment
from ai_edge_litert.gpu_options import GpuOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import CpuOptions, Options
from ai_edge_litert.tensor_buffer import TensorBuffer
from numpy.typing import NDArray

from gemma_edge.bundle.accelerators import CPU, GPU
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.bundle.signature import Signature
from gemma_edge.errors import InputError, one_line
from gemma_edge.logits import Logits
from gemma_edge.memory import MappedTable
from gemma_edge.runtimes.engines.base import Buffers
from gemma_edge.runtimes.engines.signatures import ERRORS, SignatureRuntime
from gemma_edge.runtimes.engines.software_gpu import gpu_name
from gemma_edge.runtimes.engines.state import Layout
from gemma_edge.runtimes.engines.weight_cache import kept_weights

OLDEST_LITERT = (2, 3)
HELD = "kv_cache_held_"  # begins the names of the buffers that say which position each slot of a kind of layer holds
Named = Mapping[str, TensorBuffer]


class TFLiteRuntime(SignatureRuntime):
    """A bundle's TFLite backend."""

    backend: ClassVar[str] = "tflite"

    def __init__(self, bundle: Path, manifest: Manifest, *, threads: int | None, accelerator: str = CPU) -> None:
        """Load the model and make the caches; arguments as SignatureRuntime's.

        Args:
            accelerator: what computes; not the CPU only for a bundle that was made for it.

        Raises:
            InputError: LiteRT is too old, the file is not what the manifest says, or the accelerator cannot run it whole.
        """
        super().__init__(bundle, manifest, self.backend, threads, package="ai-edge-litert", oldest=OLDEST_LITERT)
        load = {CPU: self._load, GPU: self._load_on_gpu}[accelerator]
        self._caches: dict[str, TensorBuffer] = {}  # each is an input and an output of every signature
        self._io: dict[str, tuple[Named, Named]] = {}
        with self._loading():
            self._model = load()
            for signature in self._signatures:
                self._check_contract(signature)
            # buffers for scoring, whose logits are large, are made when it is used
            for signature in self._roles("prefill", "decode"):
                self._buffers_of(signature)
        self._table = MappedTable(self._path)  # loading has read its graph, and its weights if it packed them

    def _load(self) -> CompiledModel:
        with kept_weights(self._path, f"ai-edge-litert {metadata.version('ai-edge-litert')}") as path:
            cpu = CpuOptions(num_threads=self.threads, xnnpack_weight_cache_path=path)
            options = Options(cpu_options=cpu)
            return CompiledModel.from_file(str(self._path), environment=environment(), options=options)

    def _load_on_gpu(self) -> CompiledModel:
        self.computes_on = gpu_name()
        # angles of rotary embeddings need float32: in 16 bits the error grows with the position
        gpu = GpuOptions(enforce_f32=True)
        options = Options(hardware_accelerators=HardwareAccelerator.GPU, gpu_options=gpu)
        try:
            model = CompiledModel.from_file(str(self._path), environment=environment(), options=options)
        except ERRORS as error:
            raise InputError(
                f"`accelerator` gpu: LiteRT cannot run {self._path} on a GPU of this machine ({one_line(error)});"
                " install the GPU's driver, or use `accelerator` cpu",
                field="accelerator",
                value=GPU,
            ) from None
        if not model.is_fully_accelerated():
            raise InputError(
                f"`accelerator` gpu: LiteRT would compute a part of {self._path} on the CPU; use `accelerator` cpu",
                field="accelerator",
                value=GPU,
            )
        return model

    def _check_contract(self, signature: Signature) -> None:
        model, name, cache = self._model, signature.name, self.cache
        inputs, outputs = model.get_input_tensor_details(name), model.get_output_tensor_details(name)
        caches = {
            f"kv_cache_{kind}_{index}": [1, cache.kv_heads, layer.slots, cache.head_dim]
            for index, layer in enumerate(cache.layers)
            for kind in "kv"
        }
        self._check(signature, {key: detail["shape"] for key, detail in {**inputs, **outputs}.items()}, caches)

    def _buffers_of(self, signature: Signature) -> tuple[Named, Named]:
        """A signature's inputs and outputs."""
        if signature.name not in self._io:
            self._io[signature.name] = self._make_buffers(signature.name)
        return self._io[signature.name]

    def _make_buffers(self, name: str) -> tuple[Named, Named]:
        model = self._model
        inputs, outputs = model.get_input_tensor_details(name), model.get_output_tensor_details(name)
        for key, detail in inputs.items():
            if key in outputs and key not in self._caches:
                self._caches[key] = model.create_input_buffer_by_name(name, key)
                self._caches[key].write(np.zeros(detail["shape"], detail["dtype"]))
        return (
            {key: self._caches.get(key) or model.create_input_buffer_by_name(name, key) for key in inputs},
            {key: self._caches.get(key) or model.create_output_buffer_by_name(name, key) for key in outputs},
        )

    def _mark(self, count: int) -> None:
        """See SignatureRuntime."""
        for kind, layer in enumerate(self.cache.kinds):
            if layer.pinned:
                rows = np.abs(self._read(f"{HELD}{kind}"))  # (slots, 1)
                rows[:count] *= -1
                self._caches[f"{HELD}{kind}"].write(rows)

    def _call(self, signature: Signature, tokens: NDArray[np.int32], input_pos: NDArray[np.int32]) -> Logits | None:
        """See SignatureRuntime."""
        inputs, outputs = self._buffers_of(signature)
        inputs["tokens"].write(tokens)
        inputs["input_pos"].write(input_pos)
        self._model.run_by_name(signature.name, inputs, outputs)
        self._table.count(signature.tokens)
        if "logits" not in outputs:
            return None
        flat = outputs["logits"].read(signature.tokens * self.vocab_size, np.float32)
        logits: Logits = flat.reshape(signature.tokens, self.vocab_size)
        return logits

    def _layout(self, written: int) -> Layout:
        """See Runtime. A position p lies in a slot that is at most p: export/tflite/seams.py."""
        layout = {}
        for name in self._caches:
            *lead, slots, width = self._shape(name)
            layout[name] = (
                (*lead, min(slots, written), width),
                np.dtype(np.int32 if name.startswith(HELD) else np.float32),
            )
        return layout

    def _saved_rows(self) -> Buffers:
        """See Runtime. A slot that holds nothing is saved as zeros, because an earlier text may have left its rows there."""
        layout = self._layout(self._written)
        rows = {name: self._read(name)[..., : layout[name][0][-2], :].copy() for name in layout}
        kinds = self.cache.kinds
        for index in range(len(kinds)):  # without the marks: what is pinned stands in the state
            np.abs(rows[f"{HELD}{index}"], out=rows[f"{HELD}{index}"])
        for index, layer in enumerate(self.cache.layers):
            empty = rows[f"{HELD}{kinds.index(layer)}"][:, 0] == 0  # (rows,)
            for kind in "kv":
                rows[f"kv_cache_{kind}_{index}"][..., empty, :] = 0
        return rows

    def _fill(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """See Runtime."""
        for name, saved in rows.items():
            whole = np.zeros(self._shape(name), saved.dtype)
            whole[..., : saved.shape[-2], :] = saved
            self._caches[name].write(whole)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a cache, as a state has it: (..., slots, width)."""
        shape = tuple(self._caches[name].get_tensor_details()["shape"])
        return (math.prod(shape), 1) if name.startswith(HELD) else shape

    def _read(self, name: str) -> NDArray[Any]:
        shape, kind = self._shape(name), np.int32 if name.startswith(HELD) else np.float32
        rows: NDArray[Any] = self._caches[name].read(math.prod(shape), kind).reshape(shape)
        return rows


class WebRuntime(TFLiteRuntime):
    """A bundle's web backend, which browsers run by LiteRT.js."""

    backend = "web"


@lru_cache(1)
def environment() -> Environment:
    """LiteRT's environment, one for the process."""
    atexit.register(_end_silently)
    return Environment.create()


def _end_silently() -> None:
    """LiteRT's own end comes after Python's, and writes lines to stderr."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
