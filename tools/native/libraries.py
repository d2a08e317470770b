"""What a JVM needs to load Android's own native libraries of all engines."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from engines import Engine
from proxy import proxy_source
from toolchain import java_home, once, run

TOOLS = Path(__file__).parent
SOURCES = [TOOLS / name for name in ("loader.c", "loader.h", "shim.c", "litert_glue.c", "proxy.py")]
STAND_INS = ("libfbjni.so", "libexecutorch.so", "libonnxruntime.so", "libonnxruntime4j_jni.so")
LITERT = "liblitert-lm.so"
FLAGS = ["-D_GNU_SOURCE", "-O1", "-w", "-fPIC", "-shared"]


@dataclass(frozen=True)
class Abi:
    """One of Android's ABIs."""

    name: str  # as Android spells it
    machine: str  # as `uname -m` says it
    compiler: tuple[object, ...]  # makes libraries for a JVM on that machine


def gathered(abi: Abi, engines: list[Engine]) -> Path:
    """One folder with Android's libraries of all engines, because a library finds what it needs beside itself."""
    files = [path for engine in engines for path in engine.natives(abi.name)]

    def copy(folder: Path) -> None:
        for path in files:
            shutil.copy(path, folder)

    return once(f"native-libraries-{abi.name}", [(path.name, path.stat().st_size) for path in files], copy)


def host_libraries(abi: Abi, android: Path) -> Path:
    """The folder for `java.library.path`: the loader, stand-ins for Android's libraries, native code of LiteRT's double.

    Args:
        abi: Android's ABI.
        android: the folder of `gathered`.
    """
    libraries = [android / name for name in STAND_INS]
    headers = java_home() / "include"
    includes = [f"-I{TOOLS}", f"-I{headers}", f"-I{headers / 'linux'}"]

    def build(folder: Path) -> None:
        def library(name: str, *arguments: object) -> None:
            run([*abi.compiler, *FLAGS, "-o", folder / name, *arguments])

        library("libbionicloader.so", TOOLS / "loader.c", TOOLS / "shim.c", "-ldl", "-lm")
        linked = [f"-L{folder}", "-lbionicloader", "-Wl,-rpath,$ORIGIN"]
        for path in libraries:
            source = folder / f"{path.stem}.c"
            source.write_text(proxy_source(path, abi.machine), encoding="utf-8")
            library(path.name, *includes, "-Wl,-Bsymbolic", source, *linked)
        library("liblitert_jni.so", *includes, TOOLS / "litert_glue.c", *linked)

    return once(f"native-host-{abi.name}", [*SOURCES, *libraries, abi.compiler], build)
