"""The registry of backends: one entry for each, with what it needs and where its two halves are. No backend is imported here.

A backend's engine (runtimes/engines/base.py's `Runtime`) runs bundles, its exporter (export/backend.py's `Backend`) makes them.
Another package adds a backend by an entry point in the group `gemma_edge.backends` that names a `BackendInfo`; a program by
`register`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_edge.bundle.accelerators import ACCELERATORS, COREML, CPU, GPU, QUALCOMM, VULKAN
from gemma_edge.errors import InputError

if TYPE_CHECKING:  # naming a backend reads no manifest
    from gemma_edge.bundle.manifest import Manifest

log = logging.getLogger(__name__)

ALL = "all"  # the name for every backend with `in_all`
ENTRY_POINTS = "gemma_edge.backends"  # group of the entry points that name a BackendInfo
KV_DTYPES = {8: "int8", 32: "float32"}  # bits of the KV cache's elements -> numpy's name of them


def bits_of(kv_dtype: str) -> int:
    """Inverse of KV_DTYPES."""
    return next(bits for bits, dtype in KV_DTYPES.items() if dtype == kv_dtype)


@dataclass(frozen=True)
class Package:
    """Something that must be installed."""

    module: str  # its import name
    requirement: str  # what pip installs for it: gemma-edge[onnx]
    remark: str = ""  # appended to the command: where to run it

    def how_to_install(self) -> str | None:
        """The command that installs it; None if it is installed."""
        if importlib.util.find_spec(self.module):
            return None
        return f"pip install '{self.requirement}'{self.remark and ' ' + self.remark}"


@dataclass(frozen=True)
class BackendInfo:
    """One backend. Only text and numbers, so that naming a backend imports nothing of it."""

    name: str  # in `backend`, on the command line and in manifests
    engine: str  # "module:class" of the Runtime that runs its bundles
    exporter: str  # "module:attribute" of the Backend that makes them
    runs_with: Package
    made_with: Package | None = None  # None: what it runs with
    kv_dtypes: tuple[str, ...] = ("float32",)  # element types that its KV cache can have
    int8_kv_multiple: int = 1  # an int8 cache needs a `head_dim` that is a multiple of it
    in_all: bool = False  # belongs to ALL
    # accelerators: by accelerator beside the CPU, "module:attribute" of the Backend that makes bundles for it
    accelerators: dict[str, str] = field(default_factory=dict)
    # engines: by accelerator that a bundle was made for, the Runtime that runs it, if that is not `engine`
    engines: dict[str, str] = field(default_factory=dict)

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The accelerators that a bundle of it can be made for."""
        return (CPU, *self.accelerators)

    @property
    def engine_module(self) -> str:
        """Import name of the engine's module."""
        return self.engine.partition(":")[0]

    def how_to_install(self) -> str | None:
        """The command that installs what runs its bundles; None if it is installed."""
        return self.runs_with.how_to_install()

    def how_to_install_for_export(self) -> str | None:
        """The command that installs what makes its bundles; None if it is installed."""
        return (self.made_with or self.runs_with).how_to_install()

    def open(self, bundle: Path, manifest: Manifest, threads: int | None, accelerator: str = CPU) -> Any:
        """Import the engine and open a bundle in it.

        Args:
            bundle, manifest: the folder and its manifest, which holds this backend.
            threads: None takes the target's.
            accelerator: from `choose_accelerator`. An engine that knows only the CPU is not told.

        Returns:
            the `Runtime`.
        """
        told = {} if accelerator == CPU else {"accelerator": accelerator}
        engine = self.engines.get(manifest.backends[self.name].accelerator, self.engine)
        return resolve(engine)(bundle, manifest, threads=threads, **told)

    def load_exporter(self, accelerator: str = CPU) -> Any:
        """Import the exporter for one of `runs_on`: export/backend.py's `Backend`."""
        return resolve({CPU: self.exporter, **self.accelerators}[accelerator])


def resolve(place: str) -> Any:
    """The object that "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


_ENGINES, _EXPORT = "gemma_edge.runtimes.engines", "gemma_edge.export"
_LITERT = Package("ai_edge_litert", "gemma-edge[tflite]")
_TFLITE_RUNTIME = Package(
    "tflite_runtime", "gemma-edge[tflite-runtime]", "in an environment of its own, of Python 3.11 and NumPy 1"
)
_BUILT_IN = (
    BackendInfo(
        "onnx",
        f"{_ENGINES}.onnx:OnnxRuntime",
        f"{_EXPORT}.onnx.backend:BACKEND",
        Package("onnxruntime", "gemma-edge[onnx]"),
        kv_dtypes=("int8", "float32"),
        int8_kv_multiple=16,  # ONNX Runtime: "head_size must be a multiple of 16 for an 8-bit KV cache"
        in_all=True,
        accelerators={QUALCOMM: f"{_EXPORT}.onnx.backend:STATIC"},
        engines={QUALCOMM: f"{_ENGINES}.qualcomm.static:StaticOnnxRuntime"},
    ),
    BackendInfo(
        "executorch",
        f"{_ENGINES}.executorch:ExecuTorchRuntime",
        f"{_EXPORT}.executorch.backend:BACKEND",
        Package("executorch", "gemma-edge[executorch]"),
        in_all=True,
        accelerators={
            COREML: f"{_EXPORT}.executorch.backend:COREML_BACKEND",
            VULKAN: f"{_EXPORT}.executorch.backend:VULKAN_BACKEND",
        },
    ),
    BackendInfo(
        "tflite",
        f"{_ENGINES}.litert:TFLiteRuntime",
        f"{_EXPORT}.tflite.backend:LITERT",
        _LITERT,
        in_all=True,
        accelerators={GPU: f"{_EXPORT}.tflite.backend:LITERT_GPU"},
    ),
    # a static site around a model for LiteRT.js; here LiteRT runs the same file
    BackendInfo("web", f"{_ENGINES}.litert:WebRuntime", f"{_EXPORT}.web.backend:BACKEND", _LITERT),
    BackendInfo(
        "tflite-runtime",
        f"{_ENGINES}.tflite_runtime:InterpreterRuntime",
        f"{_EXPORT}.tflite.backend:TFLITE_RUNTIME",
        runs_with=_TFLITE_RUNTIME,
        made_with=_LITERT,
    ),
)
_registered: dict[str, BackendInfo] = {info.name: info for info in _BUILT_IN}


def register(info: BackendInfo) -> None:
    """Add a backend for this process and for the gates that it starts.

    Raises:
        ValueError: another backend has its name.
    """
    if registered().get(info.name, info) != info:
        raise ValueError(f"there is another backend {info.name!r}")
    _registered[info.name] = info


def registered() -> dict[str, BackendInfo]:
    """Every backend by its name: the built-in ones first, then those that were registered, then those of entry points."""
    return {
        **_registered,
        **{name: info for name, info in _entry_points(tuple(sys.path)).items() if name not in _registered},
    }


@lru_cache(1)
def _entry_points(path: tuple[str, ...]) -> dict[str, BackendInfo]:
    """The backends of the packages on sys.path. One that cannot be used is left out with a warning."""
    infos: dict[str, BackendInfo] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            info = entry.load()
        except (ImportError, AttributeError) as error:
            log.warning("the backend %s of %s cannot be used: %s", entry.name, entry.value, error)
            continue
        if not isinstance(info, BackendInfo) or info.name in _registered:
            log.warning(
                "the backend %s of %s is left out: no BackendInfo, or a name that is taken", entry.name, entry.value
            )
            continue
        infos[info.name] = info
    return infos


def choose_backend(bundle: Path, manifest: Manifest, backend: str | None = None) -> str:
    """The backend that will run a bundle: the requested one, else the first one that is installed.

    Raises:
        InputError: the bundle does not hold it, or none is installed.
    """
    known, missing = registered(), []
    for name in [backend] if backend else list(manifest.backends):
        if name not in manifest.backends:
            raise InputError(
                f"{bundle} holds no {name!r} backend, only {', '.join(manifest.backends)}",
                field="backend",
                value=name,
            )
        if name not in known:
            raise InputError(f"{bundle}: this gemma-edge cannot run the {name!r} backend; it runs {', '.join(known)}")
        command = known[name].how_to_install()
        if command is None:
            return name
        missing.append(f"{name}: {command}")
    raise InputError(f"no runtime installed for {bundle}: {'; '.join(missing)}")


def choose_accelerator(bundle: Path, manifest: Manifest, backend: str, accelerator: str | None = None) -> str:
    """What will compute a backend of a bundle: the requested accelerator, else the one that it was made for.

    Raises:
        InputError: it was not made for the requested one. The CPU runs every bundle.
    """
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise InputError(field="accelerator", value=accelerator, allowed=ACCELERATORS)
    made_for = manifest.backends[backend].accelerator
    chosen = accelerator or made_for
    if chosen not in (runs_on := registered()[backend].runs_on):
        raise InputError(
            f"{bundle}: this gemma-edge cannot run the {backend} backend on the {chosen}",
            field="accelerator",
            value=chosen,
            hint=f"use `accelerator` {' or '.join(runs_on)}",
        )
    if chosen not in (CPU, made_for):
        raise InputError(
            f"`accelerator` {chosen}: the {backend} backend of {bundle} was made for the {made_for}",
            field="accelerator",
            value=chosen,
            hint=f"export it with `accelerator` {chosen}",
        )
    return chosen


def refuse_accelerator(accelerator: str, backends: Iterable[str]) -> None:
    """Refuse to make a backend for an accelerator that it cannot use.

    Raises:
        InputError: names the first backend that cannot, and those that can.
    """
    if accelerator not in ACCELERATORS:
        raise InputError(field="accelerator", value=accelerator, allowed=ACCELERATORS)
    known = registered()
    for name in backends:
        if accelerator not in known[name].runs_on:
            able = [other for other, info in known.items() if accelerator in info.runs_on]
            raise InputError(
                f"`accelerator` {accelerator}: the {name} backend is made for {' or '.join(known[name].runs_on)} only",
                field="accelerator",
                value=accelerator,
                hint=f"use `backend` {' or '.join(able)}" if able else "no backend can use it yet",
            )
