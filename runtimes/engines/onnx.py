"""ONNX Runtime on the CPU: the KV cache is written in place, one binding serves every step.

The graphs are made by export/onnx; docs/export/bundle-format.md is their contract. A local layer's window slides inside
GroupQueryAttention, a global layer's in moving_rows.py, where the beginning of a text can be kept. Only rows that were written
are read, so positions never end and a reset leaves the buffers as they are. How a window slides decides what can be taken back:
see `_holds`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # type: ignore[import-untyped]

from gemma_edge.bundle.entries import BackendEntry
from gemma_edge.bundle.manifest import Manifest, intact
from gemma_edge.bundle.settings import OnnxSettings
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.adapter import HINT, SIDES, Adapter, adapted_identity, is_factor
from gemma_edge.runtimes.engines.base import Buffers, Runtime
from gemma_edge.runtimes.engines.load import in_library, refuse_older, thread_count
from gemma_edge.runtimes.engines.moving_rows import MovingRows
from gemma_edge.runtimes.engines.state import State

log = logging.getLogger(__name__)

# The first CPU GroupQueryAttention with sliding_window_cache
OLDEST_ONNXRUNTIME = (1, 29)

WEIGHTS_IN = "session.model_external_initializers_file_folder_path"  # onnxruntime's key for the weights' folder

# onnxruntime's exceptions share no base class
ERRORS = (
    RuntimeError,  # from binding a buffer
    ValueError,  # for bytes that are not text
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True)
class _Loaded:
    """One graph, with the cache already bound."""

    role: str  # generate or score
    adapted: str  # digest of the adapters' graph; "": the bundle's own graph
    session: ort.InferenceSession
    binding: ort.IOBinding


class OnnxRuntime(Runtime):
    """A bundle's ONNX backend.

    `generate` and `score` are two graphs over the same weights and the same cache. onnxruntime packs the weights of each
    into memory of its own, so only one is open at a time: `score` closes `generate`, and the next `prefill` or `decode` closes
    `score`. Switching costs a load; the cache survives it.
    """

    def __init__(self, bundle: Path, manifest: Manifest, *, threads: int | None) -> None:
        """Open the `generate` graph.

        Args:
            bundle, manifest: the folder and what it says of itself.
            threads: None takes the target's; no more than the machine has are used.

        Raises:
            InputError: onnxruntime is too old, or the files are not what the manifest says.
        """
        entry: BackendEntry[OnnxSettings] = manifest.backends["onnx"]
        super().__init__(bundle, manifest, entry.cache, entry.identity)
        self._graphs = entry.settings.roles
        refuse_older("onnxruntime", ort.__version__, OLDEST_ONNXRUNTIME)
        self.threads = thread_count(threads, manifest)
        cache = self.cache
        with in_library(bundle, f"has no KV cache of {cache.bytes} bytes here", ()):
            self._rows = {
                f"{index}.{kind}": _lazy_zeros((1, cache.kv_heads, layer.slots, cache.head_dim), np.dtype(cache.dtype))
                for index, layer in enumerate(cache.layers)
                for kind in ("key", "value")
            }
        self._moving = MovingRows(cache, self._rows) if cache.pinned else None
        self._past_rows = np.zeros(1, np.int64)
        self._cache = {name: ort.OrtValue.ortvalue_from_numpy(rows) for name, rows in self._rows.items()}
        self._input_pos = np.zeros(1, np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._logits: Logits = np.zeros((1, 1, self.vocab_size), np.float32)
        self._values = {
            "input_pos": ort.OrtValue.ortvalue_from_numpy(self._input_pos),
            "token": ort.OrtValue.ortvalue_from_numpy(self._token),
            "past_rows": ort.OrtValue.ortvalue_from_numpy(self._past_rows),
            "logits": ort.OrtValue.ortvalue_from_numpy(self._logits),
        }
        self._base_identity = entry.identity
        self._graphs_of: Adapter | None = None  # an adapter whose graphs are used; they also compute without one
        self._loaded: _Loaded | None = None
        self._scores_only = False
        self._open("generate")

    def use_adapter(self, adapter: Adapter | None) -> None:
        """See Runtime. The first adapter costs a load of the graph, a switch to another one only the copying of its factors."""
        if adapted_identity(self._base_identity, adapter) == self.identity:
            return
        if adapter is not None and adapter.manifest.base != self._base_identity:
            raise InputError(
                f"the adapter {adapter.folder} was made for another bundle than {self.bundle}",
                field="adapter",
                value=adapter.folder,
                hint="make it again with gemma-export adapter and this bundle as `base`",
            )
        self.reset()
        before = (self.adapter, self._graphs_of)
        try:
            self._take(adapter, adapter or self._graphs_of)
        except InputError:
            self._take(*before)
            raise

    def _take(self, adapter: Adapter | None, graphs_of: Adapter | None) -> None:
        """Compute with an adapter, in the graphs of one, from now on."""
        self.adapter, self._graphs_of = adapter, graphs_of
        self.identity = adapted_identity(self._base_identity, adapter)
        loaded = self._loaded
        if self._open("score" if self._scores_only else "generate") is loaded:
            self._bind_factors(loaded)

    def _bind_factors(self, loaded: _Loaded) -> None:
        """Give a graph that takes factors those of the adapter, and factors of rank 0 for what it does not change."""
        inputs = {node.name: node.shape for node in loaded.session.get_inputs() if is_factor(node.name)}
        factors = self.adapter.by_input if self.adapter else {}
        for name, value in factors.items():
            shape = inputs.get(name, [])
            if [size for size in shape if isinstance(size, int)] != [value.shape[SIDES.index(name.rpartition(".")[2])]]:
                raise InputError(f"{name} of the adapter has shape {list(value.shape)}, its graph has {shape}; {HINT}")
        for name, shape in inputs.items():
            value = factors.get(name, _no_factor(shape))
            loaded.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """See Runtime; the logits belong to the caller."""
        if self._scores_only and not every_position and len(ids) > 1:
            return self._forward(ids, every_position=True)[-1:].copy()
        every_position = every_position or self._scores_only
        loaded = self._open("score" if every_position else "generate")
        binding = loaded.binding
        self._input_pos[0] = self.position
        tokens = self._values["token"]
        if len(ids) == 1:
            self._token[0, 0] = ids[0]
        else:
            tokens = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids[None]))  # (1, T)
        # bound again each time, which costs 2 us; the local names keep the memory alive while the graph runs
        binding.bind_ortvalue_input("input_ids", tokens)
        if self._moving:
            self._past_rows[0] = self._moving.make_room(self.position, len(ids))
            bias = ort.OrtValue.ortvalue_from_numpy(self._moving.bias(self.position, len(ids), self.pinned))
            binding.bind_ortvalue_input("attention_bias", bias)
        if not every_position:
            self._run(loaded)
            last: Logits = self._logits[0].copy()  # (1, V)
            return last
        logits: Logits = np.empty((len(ids), self._logits.shape[-1]), np.float32)
        output = ort.OrtValue.ortvalue_from_numpy(logits[None])  # (1, T, V)
        binding.bind_ortvalue_output("logits", output)
        self._run(loaded)
        return logits

    def _run(self, loaded: _Loaded) -> None:
        with in_library(self.bundle / self._graphs[loaded.role], "does not run", ERRORS):
            loaded.session.run_with_iobinding(loaded.binding)

    def _clear(self) -> None:
        """At position 0 no row of the cache is read before it is written."""
        if self._moving:
            self._moving.clear()

    def _holds(self, position: int, written: int) -> bool:
        """See Runtime. The window is contiguous and moved down in steps, depending only on the highest position written.

        A layer of C slots and window W drops G = C - W + 1 rows at a time: ceil(max(T - C, 0) / G) times after T tokens. With as
        many drops at both positions every row is where it was; else rows are lost, and others would be read in their place.
        """
        if self._moving and not self._moving.holds(position, written):
            return False
        for layer in [layer for layer in self.cache.layers if not layer.pinned]:
            step = layer.slots - layer.window + 1
            drops = {-(-max(0, total - layer.slots) // step) for total in (position, written)}
            if len(drops) > 1:
                return False
        return True

    def _buffers(self) -> Buffers:
        """See Runtime."""
        return dict(self._rows)

    def snapshot(self) -> State:
        """See Runtime."""
        if self._moving:
            self._moving.settle(self.position, self._written)
        return super().snapshot()

    def restore(self, state: State) -> None:
        """See Runtime."""
        super().restore(state)
        if self._moving and state.rows:
            self._moving.settled(state.position, state.written)

    def prepare_decode_many(self) -> None:
        """Use the graph with logits at every position for everything from now on. A prompt pays for the head at each token."""
        self._scores_only = True
        self._open("score")

    def _open(self, role: str) -> _Loaded:
        """The graph of that role, after closing the other one."""
        adapted = self._graphs_of.graph_digest(role) if self._graphs_of else ""
        if self._loaded is not None and (self._loaded.role, self._loaded.adapted) == (role, adapted):
            return self._loaded
        self._loaded = None
        if role not in self._graphs:
            raise InputError(f"{self.bundle}: the onnx backend has no {role!r} graph; export the bundle again")
        own = intact(self.bundle, self.manifest.files, self._graphs[role])
        path = self._graphs_of.graph(role) if self._graphs_of else own
        if "weights" in self._graphs:
            intact(self.bundle, self.manifest.files, self._graphs["weights"])
        log.info("loading %s with %d threads", path, self.threads)
        with in_library(path, "is damaged, or is not a graph of this bundle", ERRORS):
            options, graph = session_options(self.threads), path if path == own else path.read_bytes()
            if path != own:  # a graph without a place of its own finds its weights in the bundle
                options.add_session_config_entry(WEIGHTS_IN, str(self.bundle.resolve()))
            session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], enable_fallback=0)
            self._check_contract(path, session)
        binding = session.io_binding()
        binding.bind_ortvalue_input("input_pos", self._values["input_pos"])
        if self._moving:
            binding.bind_ortvalue_input("past_rows", self._values["past_rows"])
        binding.bind_ortvalue_output("logits", self._values["logits"])
        for name, value in self._cache.items():
            # the same buffer on both sides: the graph writes in place
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._loaded = _Loaded(role, adapted, session, binding)
        self._bind_factors(self._loaded)
        return self._loaded

    def _check_contract(self, path: Path, session: ort.InferenceSession) -> None:
        """Names, types and shapes of the graph against the manifest: a buffer of another shape would crash the process."""
        shapes: dict[str, list[Any]] = {"input_ids": [1, None], "input_pos": [1]}
        types = {"input_ids": "tensor(int64)", "input_pos": "tensor(int64)", "logits": "tensor(float)"}
        for name, value in self._cache.items():
            for side in ("past_key_values", "present"):
                shapes[f"{side}.{name}"] = value.shape()
                types[f"{side}.{name}"] = value.data_type()
        shapes["logits"] = [1, None, self._logits.shape[-1]]
        if self._moving:
            shapes |= {"past_rows": [1], "attention_bias": [1, 1, None, None]}
            types |= {"past_rows": "tensor(int64)", "attention_bias": "tensor(float)"}
        nodes = {node.name: node for node in (*session.get_inputs(), *session.get_outputs())}
        if self._graphs_of:
            nodes = {name: node for name, node in nodes.items() if not is_factor(name)}
        if nodes.keys() != shapes.keys():
            odd = sorted(nodes.keys() ^ shapes.keys())
            raise InputError(f"{path} is not a graph of this bundle: {odd[0]} is only in one of them; export it again")
        for name, shape in shapes.items():
            node = nodes[name]
            same = len(node.shape) == len(shape) and all(
                expected is None or not isinstance(size, int) or size == expected
                for size, expected in zip(node.shape, shape, strict=True)
            )
            if not same or node.type != types[name]:
                raise InputError(
                    f"{path}: {name} is {node.type} {node.shape}, the manifest says {types[name]} {shape};"
                    " export the bundle again"
                )


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros whose pages cost memory only once the cache reaches them: in small pages, where the system would take 2 MB ones."""
    buffer = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    # Linux; a kernel built without huge pages refuses the advice, and does not need it
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _no_factor(shape: list[int | str]) -> NDArray[np.float32]:
    """A factor of rank 0: the product with it is zero."""
    return np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)


def session_options(threads: int) -> ort.SessionOptions:
    """What every session of a bundle is opened with."""
    # before the session, which sends events on Windows
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # 4 is fatal: errors are raised anyway
    # Activations go back to the system after each step. Measured with Gemma 2 2B's shapes and 4 layers: 12 to 40 MiB less
    # RSS when generating, 500 MiB less when scoring, no difference in speed above the noise.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options
