"""Run the Kotlin library on Android's own native libraries under this machine's JVM: `run_tests.py FIXTURES DEMO_BUNDLE`.

loader.c maps the libraries unchanged into the process and binds what they take from Android's C library to glibc. The answers
of Python that the tests compare with are in FIXTURES/BACKEND; for ONNX they are those of `make android-test`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from proxy import proxy_source
from toolchain import (
    ANDROID,
    BUILD,
    CHAIN,
    PINS,
    class_path,
    java_home,
    maven,
    npm,
    once,
    onnxruntime_aar,
    run,
    unpacked,
)

TOOLS = Path(__file__).parent
ABI = "x86_64"
SOURCES = [TOOLS / name for name in ("loader.c", "loader.h", "shim.c", "litert_glue.c")]
# ROUNDED: bundles whose logits differ from Python's in the last bits on ONNX Runtime for Android.
ROUNDED = ("random-gemma3",)
CC = ["cc", "-D_GNU_SOURCE", "-O1", "-w", "-fPIC", "-shared"]


@dataclass(frozen=True)
class Engine:
    """One engine: what its tests need, and which tests run."""

    module: str
    fixtures: Path
    jars: list[Path]
    tests: tuple[str, ...]
    environment: dict[str, str]


def missing() -> str:
    """Why the tests cannot run here; empty if they can."""
    tools = [name for name in ("cc", "nm", "java", "mvn", "npm") if shutil.which(name) is None]
    if os.uname().machine != ABI:
        return f"this machine is {os.uname().machine}, the libraries are for {ABI}"
    return f"no {', '.join(tools)}" if tools else ""


def checked(path: Path, pin: str) -> Path:
    """A file with the pinned hash.

    Raises:
        SystemExit: the file has another one.
    """
    actual, expected = hashlib.sha256(path.read_bytes()).hexdigest(), PINS[pin]["sha256"]
    if actual != expected:
        raise SystemExit(f"{path}: sha256 {actual}, but {expected} is pinned; do not use the file")
    return path


def litert_library() -> Path:
    """LiteRT's library, from a Python wheel for Android."""
    pin = PINS["litert"]

    def fetch(folder: Path) -> None:
        flags = ["--platform", pin["platform"], "--only-binary=:all:", "--no-deps", "--quiet", "--dest", folder]
        run([sys.executable, "-m", "pip", "download", *flags, pin["wheel"]])
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("liblitert-lm.so"))
            (folder / "liblitert-lm.so").write_bytes(archive.read(name))
        wheel.unlink()

    return checked(once("litert", [pin], fetch, CHAIN) / "liblitert-lm.so", "litert")


def gathered(name: str, folders: list[Path]) -> Path:
    """One folder with the libraries of several ones, because a library finds what it needs beside itself."""
    files = [path for folder in folders for path in sorted(folder.glob("*.so"))]

    def copy(folder: Path) -> None:
        for path in files:
            shutil.copy(path, folder)

    return once(name, [(path.name, path.stat().st_size) for path in files], copy)


def host_libraries(libraries: list[Path]) -> Path:
    """The folder for `java.library.path`: the loader, stand-ins for Android's libraries, native code of LiteRT's double."""
    headers = java_home() / "include"
    flags: list[object] = [*CC, f"-I{TOOLS}", f"-I{headers}", f"-I{headers / 'linux'}"]

    def build(folder: Path) -> None:
        run([*CC, "-o", folder / "libbionicloader.so", TOOLS / "loader.c", TOOLS / "shim.c", "-ldl", "-lm"])
        linked = [f"-L{folder}", "-lbionicloader", "-Wl,-rpath,$ORIGIN"]
        for library in libraries:
            source = folder / f"{library.stem}.c"
            source.write_text(proxy_source(library), encoding="utf-8")
            run([*flags, "-Wl,-Bsymbolic", "-o", folder / library.name, source, *linked])
        run([*flags, "-o", folder / "liblitert_jni.so", TOOLS / "litert_glue.c", *linked])

    return once("native-host", [*SOURCES, TOOLS / "proxy.py", *libraries], build)


def onnx_fixtures(fixtures: Path) -> Path:
    """The answers of Python from ONNX Runtime that Android's library gives bit for bit."""
    folder = fixtures / "onnx"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "models").mkdir(parents=True)
    (folder / "tokenizers").symlink_to(BUILD / "fixtures" / "tokenizers")
    for model in sorted((BUILD / "fixtures" / "models").iterdir()):
        if model.name not in ROUNDED:
            (folder / "models" / model.name).symlink_to(model)
    return folder


def engines(fixtures: Path, onnxruntime: Path, fbjni: Path) -> list[Engine]:
    """What runs, for every engine."""
    package = npm("executorch")
    loader = next(maven("native_jars").glob("nativeloader-*.jar"))
    double = ANDROID / "doubles" / "litert" / "target" / "classes"
    litert = {"BIONIC_LITERT": str(litert_library())}
    suite = sorted((ANDROID / "gemma-onnx" / "src" / "test" / "kotlin").rglob("*Test.kt"))
    names = tuple(path.read_text(encoding="utf-8").split()[1] + "." + path.stem for path in suite)
    classes = package / PINS["executorch"]["classes"]
    return [
        Engine(
            "gemma-executorch",
            fixtures / "executorch",
            [classes, fbjni / "classes.jar", loader],
            ("gemma.edge.executorch.ExecuTorchNativeTest", "com.example.llm.LlmNativeTest"),
            {},
        ),
        Engine("gemma-litert", fixtures / "tflite", [double], ("gemma.edge.litert.LiteRtNativeTest",), litert),
        Engine("gemma-onnx", onnx_fixtures(fixtures), [onnxruntime / "classes.jar"], names, {}),
    ]


def test(engine: Engine, host: Path, demo: Path) -> None:
    """Run the tests of an engine in a JVM of its own.

    Raises:
        SystemExit: a test failed.
    """
    own = [
        ANDROID / module / "target" / kind
        for module in ("gemma", engine.module)
        for kind in ("classes", "test-classes")
    ]
    jars = [*own, *engine.jars, *sorted(maven("native_test").glob("*.jar"))]
    shutil.rmtree(engine.fixtures / "from-kotlin", ignore_errors=True)
    flags = {
        "java.library.path": host,
        "onnxruntime.native.path": host,
        "gemma.fixtures": engine.fixtures,
        "gemma.demo.bundle": demo,
    }
    properties = [f"-D{key}={value}" for key, value in flags.items()]
    command = ["java", "-Xmx1g", *properties, "-cp", class_path(jars), "org.junit.runner.JUnitCore", *engine.tests]
    output = run(command, env={**os.environ, **engine.environment})
    print(engine.module, *(line for line in output.splitlines() if line.startswith("OK")), flush=True)


def main(fixtures: Path, demo: Path) -> None:
    """Prepare the libraries and run all tests."""
    if reason := missing():
        print(f"android-native-test: skipped, {reason}")
        return
    (onnxruntime,) = unpacked([onnxruntime_aar(None)], "onnxruntime-aar")
    (fbjni,) = unpacked([next(maven("native_jars").glob("fbjni-*.aar"))], "fbjni-aar")
    executorch = npm("executorch") / PINS["executorch"]["libraries"]
    checked(executorch / "libexecutorch.so", "executorch")
    together = gathered("native-libraries", [executorch, fbjni / "jni" / ABI, onnxruntime / "jni" / ABI])
    stand_ins = ("libfbjni.so", "libexecutorch.so", "libonnxruntime.so", "libonnxruntime4j_jni.so")
    host = host_libraries([together / name for name in stand_ins])
    for engine in engines(fixtures.resolve(), onnxruntime, fbjni):
        test(engine, host, demo.resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
