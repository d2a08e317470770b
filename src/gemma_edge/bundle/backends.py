"""The registry of backends: what each needs to make and to run a bundle, as data. No backend is imported here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError

# backend -> (module, class, the package it needs, the extra that installs it)
RUNTIMES = {
    "onnx": ("gemma_edge.runtimes.engines.onnx", "OnnxRuntime", "onnxruntime", "onnx"),
    "executorch": ("gemma_edge.runtimes.engines.executorch", "ExecuTorchRuntime", "executorch", "executorch"),
    "tflite": ("gemma_edge.runtimes.engines.litert", "TFLiteRuntime", "ai_edge_litert", "tflite"),
    "tflite-runtime": (
        "gemma_edge.runtimes.engines.tflite_runtime",
        "InterpreterRuntime",
        "tflite_runtime",
        "tflite-runtime",
    ),
}
APART = {"tflite-runtime": " in an environment of its own, of Python 3.11 and NumPy 1"}


def how_to_install(backend: str) -> str | None:
    """The command that installs a backend's package; None where it is installed."""
    _, _, package, extra = RUNTIMES[backend]
    if importlib.util.find_spec(package):
        return None
    return f"pip install 'gemma-edge[{extra}]'{APART.get(backend, '')}"


def choose_backend(bundle: Path, manifest: Manifest, backend: str | None = None) -> str:
    """The backend that will run a bundle: the one asked for, else the first that is installed.

    Raises:
        InputError: the bundle does not hold it, or none is installed.
    """
    missing = []
    for name in [backend] if backend else list(manifest.backends):
        if name not in manifest.backends:
            raise InputError(f"{bundle} holds no {name!r} backend, only {', '.join(manifest.backends)}")
        if name not in RUNTIMES:
            raise InputError(
                f"{bundle}: this gemma-edge cannot run the {name!r} backend; it runs {', '.join(RUNTIMES)}"
            )
        command = how_to_install(name)
        if command is None:
            return name
        missing.append(f"{name}: {command}")
    raise InputError(f"no runtime installed for {bundle}: {'; '.join(missing)}")


KV_DTYPES = {8: "int8", 32: "float32"}  # numpy's name of the KV cache's elements, by their bits
# backend -> the module whose `lower` makes its files, imported when it is needed
BACKENDS = {
    "onnx": "gemma_edge.export.onnx.backend",
    "executorch": "gemma_edge.export.executorch.backend",
    "tflite": "gemma_edge.export.tflite.backend",
    "tflite-runtime": "gemma_edge.export.tflite.tflite_runtime",
}
ALL = "all"  # for --backend: these
ALL_BACKENDS = ("onnx", "executorch", "tflite")
MADE_WITH = {"tflite-runtime": "tflite"}  # backends that are made with another one's package, and run somewhere else
INT8_CACHES = ("onnx",)  # backends that can keep the KV cache in int8
# these write a chunk in one piece, for which a ring has as many slots behind its end as a chunk has tokens, less one
UNWRAPPED_CACHES = ("tflite", "tflite-runtime")


def bits_of(kv_dtype: str) -> int:
    """Inverse of KV_DTYPES."""
    return next(bits for bits, dtype in KV_DTYPES.items() if dtype == kv_dtype)
