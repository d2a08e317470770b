"""The libraries for inference on Android, one for each backend: their classes, rules and native libraries."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolchain import ANDROID, CHAIN, PINS, checked, maven, npm, once, onnxruntime_aar, packed, run, unpacked


@dataclass(frozen=True)
class Engine:
    """One library for inference."""

    backend: str  # of bundles that it runs
    module: str  # of our library, which calls it
    jars: list[Path]  # of its classes
    rules: list[Path]  # that its AARs have for R8
    natives: Callable[[str], list[Path]]  # its native libraries for an ABI


def downloaded_wheel(requirement: str, folder: Path, *flags: object) -> Path:
    """Download a Python package's wheel, which nothing installs."""
    command: list[object] = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--no-deps", "--quiet"]
    run([*command, *flags, "--dest", folder, requirement])
    (wheel,) = folder.glob("*.whl")
    return wheel


def of_aars(aars: list[Path], abi: str) -> list[Path]:
    """The native libraries of unpacked AARs for an ABI."""
    return [path for aar in aars for path in sorted((aar / "jni" / abi).glob("*.so"))]


def rules_of(aars: list[Path]) -> list[Path]:
    """The rules for R8 of unpacked AARs."""
    return [path for aar in aars if (path := aar / "proguard.txt").is_file()]


def onnxruntime(official: Path | None = None) -> Engine:
    """ONNX Runtime, from a file that the caller has or from a package of a third party."""
    aars = unpacked([onnxruntime_aar(official)], "onnxruntime-aar")
    jars = [aar / "classes.jar" for aar in aars]
    return Engine("onnx", "gemma-onnx", jars, rules_of(aars), lambda abi: of_aars(aars, abi))


def executorch() -> Engine:
    """ExecuTorch, from a package of a third party, with fbjni and a loader, which it needs."""
    pin = PINS["executorch"]
    aars = unpacked([next(maven("native_jars").glob("fbjni-*.aar"))], "fbjni-aar")
    package = npm("executorch")
    loader = next(maven("native_jars").glob("nativeloader-*.jar"))

    def natives(abi: str) -> list[Path]:
        folder = package / pin["libraries"] / abi
        checked(folder / "libexecutorch.so", pin["sha256"][abi])
        own = {path.name: path for path in [*sorted(folder.glob("*.so")), *of_aars(aars, abi)]}
        return list(own.values())

    jars = [package / pin["classes"], *(aar / "classes.jar" for aar in aars), loader]
    return Engine("executorch", "gemma-executorch", jars, rules_of(aars), natives)


def litert() -> Engine:
    """LiteRT: a double of its classes, over its C API in LiteRT-LM's library, which comes from Python wheels for Android."""
    pin = PINS["litert"]

    def natives(abi: str) -> list[Path]:
        def fetch(folder: Path) -> None:
            platform = "android_23_" + abi.replace("-", "_")
            wheel = downloaded_wheel(pin["wheel"], folder, "--platform", platform)
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("liblitert-lm.so"))
                (folder / "liblitert-lm.so").write_bytes(archive.read(name))
            wheel.unlink()

        library = once(f"litert-{abi}", [pin["wheel"]], fetch, CHAIN) / "liblitert-lm.so"
        return [checked(library, pin["sha256"][abi])]

    double = packed("litert-double", [ANDROID / "doubles" / "litert" / "target" / "classes"])
    return Engine("tflite", "gemma-litert", [double], [], natives)


# ENGINES: by the backends of bundles that they run
ENGINES: dict[str, Callable[[], Engine]] = {"executorch": executorch, "tflite": litert, "onnx": onnxruntime}
