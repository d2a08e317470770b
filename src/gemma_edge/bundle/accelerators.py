"""What can compute a bundle: the names that `accelerator` takes. Which backend can be made for which is in backends.py."""

from __future__ import annotations

from typing import Final, Literal, get_args

Accelerator = Literal["cpu", "gpu", "npu:qualcomm", "coreml", "vulkan"]
ACCELERATORS: tuple[Accelerator, ...] = get_args(Accelerator)
CPU: Final = "cpu"
GPU: Final = "gpu"
QUALCOMM: Final = "npu:qualcomm"
COREML: Final = "coreml"
VULKAN: Final = "vulkan"
# DELEGATES: ExecuTorch's names of what computes a program that was lowered for one of these
DELEGATES = {COREML: "CoreMLBackend", VULKAN: "VulkanBackend"}
