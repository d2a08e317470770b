"""ExecuTorch on the CPU: the KV cache is a buffer of the program, written in place.

The program is made by export/executorch; docs/export/executorch.md is its contract. Its ring has no end, and whatever was not
written since a reset is masked, so a reset leaves the cache as it is. ExecuTorch's Python package comes with torch; a phone has
neither.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.bundle.accelerators import CPU, DELEGATES
from gemma_edge.bundle.entries import BackendEntry
from gemma_edge.bundle.geometry import PINNED_UNIT
from gemma_edge.bundle.manifest import Manifest, intact
from gemma_edge.bundle.settings import ExecuTorchSettings
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.memory import MappedTable
from gemma_edge.runtimes.engines.base import Buffers, Runtime
from gemma_edge.runtimes.engines.load import in_library, refuse_older, thread_count
from gemma_edge.runtimes.engines.structure.pte import check_program

log = logging.getLogger(__name__)

OLDEST_EXECUTORCH = (1, 5)
# ERRORS: what ExecuTorch's Python binding raises; a ValueError means bytes that are not text.
ERRORS = (RuntimeError, KeyError, ValueError, TypeError, IndexError)
OPERATORS = ("kernels/quantized/*quantized_ops_aot_lib.*", "extension/llm/custom_ops/*custom_ops_aot_lib.*")


class ExecuTorchRuntime(Runtime):
    """A bundle's ExecuTorch backend.

    The program has one method that generates, and one that gives logits at every position. Each packs the weights for itself and
    has caches of its own, so only one is loaded at a time: `score` closes the first one, and the next `prefill` or `decode` the
    second one. The caches are carried over, so that nothing is forgotten.
    """

    def __init__(self, bundle: Path, manifest: Manifest, *, threads: int | None, accelerator: str = CPU) -> None:
        """Load the method that generates.

        Args:
            bundle, manifest: the folder and what it says of itself.
            threads: None takes the target's; no more than the machine has are used. A process has one pool of them.
            accelerator: what the bundle was made for: its delegates run nowhere else.

        Raises:
            InputError: executorch is too old or lacks the delegates, or the file is not what the manifest says.
        """
        entry: BackendEntry[ExecuTorchSettings] = manifest.backends["executorch"]
        super().__init__(bundle, manifest, entry.cache, entry.identity)
        refuse_older("executorch", metadata.version("executorch"), OLDEST_EXECUTORCH)
        _check_delegates(bundle, entry.accelerator, accelerator)
        self.threads = thread_count(threads, manifest)
        self.computes_on = accelerator
        self._program = entry.settings.program
        self._path = bundle / self._program
        self._methods = entry.settings.methods
        with _silent():
            self._library = load_library()
            self._library._unsafe_reset_threadpool(self.threads)
        self._role = ""
        self._method: Any = None
        self._scores_only = False
        self._table: MappedTable
        self._open("generate")

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """See Runtime; the logits belong to the caller."""
        self._open("score" if every_position or self._scores_only else "generate")
        logits = self._run(ids, self.position)
        self._table.count(len(ids))
        return logits if every_position else logits[-1:]

    def _clear(self) -> None:
        """Nothing to do: at position 0 every slot of the cache that was written before is masked."""

    def _buffers(self) -> Buffers:
        """See Runtime; of the method that is loaded."""
        buffers: Buffers = {}
        with in_library(self._path, "does not run", ERRORS):
            for name in (f"{kind}_{index}" for index in range(len(self.cache.layers)) for kind in ("key", "value")):
                buffer = self._method.get_attribute(name)  # (K, S, 1, D), the program's own memory
                buffers[name] = buffer.view(self.cache.kv_heads, -1, self.cache.head_dim).numpy()  # (K, S, D)
        return buffers

    def prepare_decode_many(self) -> None:
        """Use the method with logits at every position for everything from now on. A prompt pays for the head at each token."""
        self._scores_only = True
        self._open("score")
        self._at_once = self.scored_at_once

    def _open(self, role: str) -> None:
        """Load the method of that role, after closing the other one."""
        if role == self._role:
            return
        carried = self.snapshot().rows if self._role else {}
        self._method, self._role = None, ""
        log.info("loading %s of %s with %d threads", role, self._path, self.threads)
        intact(self.bundle, self.manifest.files, self._program)
        with in_library(self._path, "is damaged, or is not a program of this bundle", ERRORS), _silent():
            check_program(self._path)
            program = self._library._load_program(
                str(self._path), program_verification=self._library.Verification.InternalConsistency
            )
            method = program.load_method(getattr(self._methods, role))
            self._check_contract(method.method_meta(), role)
        self._table = MappedTable(self._path)  # the linears are packed in memory now
        self._method, self._role = method, role
        for name, rows in carried.items():
            self._buffers()[name][..., : self._written, :] = rows

    def _run(self, ids: NDArray[np.int64], position: int) -> Logits:
        """One chunk through the loaded method."""
        import torch

        tokens = torch.from_numpy(np.ascontiguousarray(ids[None]))  # (1, T)
        with in_library(self._path, "does not run", ERRORS):
            place = torch.tensor([position + self.pinned * PINNED_UNIT])
            (logits,) = self._method.call((tokens, place))  # (1, T or 1, V)
        rows: Logits = logits[0].numpy()
        return rows

    def _check_contract(self, meta: Any, role: str) -> None:
        """Sizes of inputs and output against the manifest."""
        shapes = [tuple(meta.input_tensor_meta(index).sizes()) for index in range(meta.num_inputs())]
        expected = [(1, self.scored_at_once if role == "score" else self.cache.prefill_chunk), (1,)]
        if shapes != expected:
            raise InputError(f"{self._path} takes {shapes}, the manifest says {expected}; export the bundle again")
        if not meta.num_attributes():
            raise InputError(f"{self._path} does not name its caches; export the bundle again")
        (*_, size) = meta.output_tensor_meta(0).sizes()
        if size != self.vocab_size:
            raise InputError(
                f"{self._path} gives {size} logits, the vocabulary has {self.vocab_size}; export the bundle again"
            )


def has_delegates(accelerator: str) -> bool:
    """Whether the ExecuTorch of this machine can run programs that were made for an accelerator."""
    return accelerator == CPU or bool(load_library()._is_available(DELEGATES[accelerator]))


def _check_delegates(bundle: Path, made_for: str, accelerator: str) -> None:
    """Refuse a program whose delegates are not here, or an accelerator that they do not run on."""
    if accelerator != made_for:
        raise InputError(
            f"`accelerator` {accelerator}: the executorch backend of {bundle} runs on {made_for} only",
            field="accelerator",
            value=accelerator,
            hint=f"export it with `accelerator` {accelerator}",
        )
    if not has_delegates(made_for):
        raise InputError(
            f"{bundle} was made for {made_for}, and the ExecuTorch of this machine has no {DELEGATES[made_for]}",
            field="accelerator",
            value=made_for,
            hint="run it where it has, or export it with `accelerator` cpu",
        )


def load_library() -> Any:
    """ExecuTorch's own binding, with the operators of caches and of quantized tables, which it does not register by itself.

    Its package's modules for this (`portable_lib`, `custom_ops`) bring the whole exporter along: 230 MB and 3 s.
    """
    import torch

    load: Any = torch.ops.load_library
    library = importlib.import_module("executorch.extension.pybindings._C")
    (root,) = importlib.import_module("executorch").__path__
    for pattern in OPERATORS:
        (path,) = Path(root).glob(pattern)
        load(path)
    return library


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the library's lines about processors and thread pools off stderr. Exceptions come through."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
