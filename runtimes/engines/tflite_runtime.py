"""tflite-runtime on the CPU: the interpreter of 2023.

The caches are variables inside the model (export/tflite/backend.py). signatures.py chooses what is fed to which signature.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tflite_runtime.interpreter import Interpreter, OpResolverType

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.bundle.signature import PIN, RESET, Signature
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.load import in_library
from gemma_edge.runtimes.engines.signatures import ERRORS, SignatureRuntime

OLDEST = (2, 14)


class InterpreterRuntime(SignatureRuntime):
    """A bundle's tflite-runtime backend."""

    def __init__(self, bundle: Path, manifest: Manifest, *, threads: int | None) -> None:
        """Load the model and make the caches; arguments as SignatureRuntime's.

        Raises:
            InputError: tflite-runtime is too old or NumPy too new for it, or the file is not what the manifest says.
        """
        super().__init__(bundle, manifest, "tflite-runtime", threads, package="tflite-runtime", oldest=OLDEST)
        if int(np.__version__.partition(".")[0]) >= 2:
            raise InputError(
                f"tflite-runtime needs a NumPy below 2, here is {np.__version__}; pip install 'gemma-edge[tflite-runtime]'"
            )
        with self._loading():
            # XNNPACK has no kernels for these matrices, and would read all caches at once at the start
            self._model = Interpreter(
                str(self._path),
                num_threads=self.threads,
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
            names = self._model.get_signature_list()
            pin = [PIN] if self.cache.pinned else []
            for name in [*(signature.name for signature in self._signatures), RESET, *pin]:
                if name not in names:
                    raise RuntimeError(f"it has no signature {name}")
            self._runners = {each.name: self._model.get_signature_runner(each.name) for each in self._signatures}
            for signature in self._signatures:
                runner = self._runners[signature.name]
                details = {**runner.get_input_details(), **runner.get_output_details()}
                self._check(signature, {key: detail["shape"] for key, detail in details.items()}, {})
            self._model.get_signature_runner(RESET)()
            self._pin = self._model.get_signature_runner(PIN) if pin else None

    def _mark(self, count: int) -> None:
        """See SignatureRuntime."""
        assert self._pin is not None, "a bundle that keeps nothing pins nothing"
        with in_library(self._path, "does not run", ERRORS):
            self._pin(pinned=np.array([count], np.int32))

    def _call(self, signature: Signature, tokens: NDArray[np.int32], input_pos: NDArray[np.int32]) -> Logits | None:
        """See SignatureRuntime."""
        outputs = self._runners[signature.name](tokens=tokens, input_pos=input_pos)
        logits: Logits | None = outputs["logits"][0] if "logits" in outputs else None
        return logits
