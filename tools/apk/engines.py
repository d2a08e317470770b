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
    version: str  # what a benchmark says of libraries that do not tell their own version


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


def engine_of(backend: str, module: str, archives: list[Path], *jars: Path) -> Engine:
    """An engine that consists of AARs, of which the first one has its version in its name, and of jars that they need."""
    aars = unpacked(archives, f"{module}-aars")
    classes = [*(aar / "classes.jar" for aar in aars), *jars]
    return Engine(backend, module, classes, rules_of(aars), lambda abi: of_aars(aars, abi), archives[0].stem)


def onnxruntime(official: Path | None = None) -> Engine:
    """ONNX Runtime, from a file that the caller has or from a package of a third party."""
    return engine_of("onnx", "gemma-onnx", [official or onnxruntime_aar()])


def executorch(official: Path | None = None) -> Engine:
    """ExecuTorch, from a file that the caller has or a package of a third party, with fbjni and a loader, which it needs."""
    pin = PINS["executorch"]
    fbjni = next(maven("native_jars").glob("fbjni-*.aar"))
    loader = next(maven("native_jars").glob("nativeloader-*.jar"))
    if official:
        return engine_of("executorch", "gemma-executorch", [official, fbjni], loader)
    aars = unpacked([fbjni], "fbjni-aar")
    package = npm("executorch")

    def natives(abi: str) -> list[Path]:
        folder = package / pin["libraries"] / abi
        checked(folder / "libexecutorch.so", pin["sha256"][abi])
        own = {path.name: path for path in [*sorted(folder.glob("*.so")), *of_aars(aars, abi)]}
        return list(own.values())

    jars = [package / pin["classes"], *(aar / "classes.jar" for aar in aars), loader]
    return Engine("executorch", "gemma-executorch", jars, rules_of(aars), natives, PINS["npm"]["executorch"])


def litert(official: Path | None = None) -> Engine:
    """LiteRT, from a file that the caller has.

    Without one it is a double of its classes, over its C API in LiteRT-LM's library, which comes from Python wheels for
    Android. The native code between the two is made for a JVM only (tools/native), so this does not run on a phone.
    """
    if official:
        return engine_of("tflite", "gemma-litert", [official])
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
    return Engine("tflite", "gemma-litert", [double], [], natives, pin["wheel"])


# ENGINES: by the backends of bundles that they run
ENGINES: dict[str, Callable[[Path | None], Engine]] = {
    "executorch": executorch,
    "tflite": litert,
    "onnx": onnxruntime,
}
