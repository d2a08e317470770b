"""SwiftShader: a Vulkan driver that computes on the CPU what a GPU would. It comes with Chromium.

It shows whether a bundle made for a GPU computes the right numbers where there is no GPU. It says nothing about speed, and it
computes in float32 whatever a real GPU would take.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

VARIABLE = "GEMMA_EDGE_SWIFTSHADER"  # a folder with SwiftShader's ICD: GPU bundles run there
NAME = "swiftshader"  # as `judged_on` says it
ICD, LOADER = "vk_swiftshader_icd.json", "libvulkan.so.1"
PLACES = ("/usr/lib/chromium", "/usr/lib/chromium-browser", "/opt/google/chrome", "/usr/lib64/chromium-browser")
DRIVERS = "VK_ICD_FILENAMES"  # Vulkan's own variable: the drivers that it may use
# NODES: files in /dev that drivers of real GPUs make
NODES = ("dri/renderD*", "nvidia[0-9]*", "kgsl-3d0", "mali0", "dxg")


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU, or the user has named a driver. Outside of Linux nobody looks."""
    named = os.environ.get(DRIVERS) or sys.platform != "linux"
    return bool(named) or any(any(Path("/dev").glob(pattern)) for pattern in NODES)


def swiftshader() -> Path | None:
    """The folder of an installed SwiftShader."""
    return next((folder for folder in map(Path, PLACES) if (folder / ICD).is_file()), None)


def gpu_name() -> str:
    """What is behind the accelerator gpu in this process. Where VARIABLE names SwiftShader, Vulkan finds it from now on."""
    folder = os.environ.get(VARIABLE)
    if folder:
        os.environ[DRIVERS] = str(Path(folder) / ICD)
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # without one the loader complains
        loader = Path(folder) / LOADER
        if loader.is_file():  # the library is looked up by its name alone, which finds one that is loaded already
            ctypes.CDLL(str(loader), mode=ctypes.RTLD_GLOBAL)
    return NAME if NAME in os.environ.get(DRIVERS, "").lower() else "gpu"
