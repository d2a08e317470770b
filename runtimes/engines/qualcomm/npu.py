"""Qualcomm's NPU, or its library that emulates one on x86: what ONNX Runtime needs to know of them.

The library computes what the NPU would, in float16. It says nothing about speed.
"""

from __future__ import annotations

import importlib.util
import platform
from typing import Any, Final

from gemma_edge.bundle.accelerators import QUALCOMM
from gemma_edge.errors import InputError

PACKAGE: Final = "onnxruntime_qnn"
PROVIDER: Final = "QNNExecutionProvider"
SIMULATOR: Final = "htp-simulator v79"  # as `judged_on` says it
# of the emulated NPU, which cannot be asked: SM8750, known as Snapdragon 8 Elite
EMULATED: Final = {"htp_arch": "79", "soc_model": "69"}
REAL_MACHINES: Final = ("arm64", "aarch64")  # elsewhere Qualcomm's library emulates the NPU


def is_simulated() -> bool:
    """Whether Qualcomm's library emulates the NPU on this machine."""
    return platform.machine().lower() not in REAL_MACHINES


def has_package() -> bool:
    """Whether ONNX Runtime's package for Qualcomm's NPU is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def settings() -> dict[str, str]:
    """What the provider is told."""
    import onnxruntime_qnn

    # activations in float16: the NPU has no float32
    own = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "enable_htp_fp16_precision": "1"}
    return {**own, "htp_performance_mode": "burst", **(EMULATED if is_simulated() else {})}


def find() -> Any:
    """ONNX Runtime's device of Qualcomm's NPU.

    Raises:
        InputError: its package is not installed, or finds no device.
    """
    if not has_package():
        raise InputError(
            f"`accelerator` {QUALCOMM}: onnxruntime-qnn is not installed: pip install 'gemma-edge[qnn]',"
            " or use `accelerator` cpu",
            field="accelerator",
            value=QUALCOMM,
        )
    import onnxruntime as ort  # type: ignore[import-untyped]
    import onnxruntime_qnn

    devices = _devices()
    if not devices:
        # the library calls its provider by this name, and finds itself under no other
        ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
        devices = _devices()
    if not devices:
        raise InputError(
            f"`accelerator` {QUALCOMM}: this machine has none; use `accelerator` cpu",
            field="accelerator",
            value=QUALCOMM,
        )
    return devices[0]


def _devices() -> list[Any]:
    import onnxruntime as ort

    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
