"""Run the Kotlin library on Android's own native libraries under a JVM: `run_tests.py FIXTURES DEMO_BUNDLE`.

loader.c maps the libraries unchanged into the process and binds what they take from Android's C library to glibc. On this
machine's x86_64 all tests of the engines run, and Python's answers must come bit for bit. On arm64, where kernels with other
instructions compute, logits are compared. The answers of Python are in FIXTURES/BACKEND; ONNX Runtime's tests on x86_64 take
those of `make android-test`, which are from the same version.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import arm64
import check_api
import engines
import parity
from libraries import LITERT, TOOLS, Abi, gathered, host_libraries
from toolchain import ANDROID, BUILD, class_path, java_home, maven, once, packed, run

X86_64 = Abi("x86_64", "x86_64", ("cc",))
# ROUNDED: bundles whose logits differ from Python's in the last bits on ONNX Runtime for Android.
ROUNDED = ("random-gemma3",)
CHECK_STATES = TOOLS.parent / "kotlin_fixtures" / "check_states.py"
Flags = dict[str, Path | str]


@dataclass(frozen=True)
class Host:
    """A JVM that loads Android's libraries of one ABI."""

    abi: Abi
    jvm: list[object]  # the command that starts it
    flags: Flags  # its system properties
    litert: Path  # the library that LiteRT's double calls

    def run(self, classes: str, flags: Flags, *arguments: object) -> str:
        """Run a class, and return its output.

        Args:
            classes: the class path.
            flags: more system properties.
            arguments: the class and its arguments.

        Raises:
            SystemExit: the class ended with an error.
        """
        properties = [f"-D{key}={value}" for key, value in (self.flags | flags).items()]
        environment = {**os.environ, "BIONIC_LITERT": str(self.litert)}
        return run([*self.jvm, *properties, "-cp", classes, *arguments], env=environment)


def host(abi: Abi, used: list[engines.Engine], jvm: list[object], demo: Path) -> Host:
    """The JVM for an ABI.

    Args:
        abi: Android's ABI.
        used: the engines whose libraries it loads.
        jvm: the command that starts it.
        demo: the demo's bundle, which tests open.
    """
    android = gathered(abi, used)
    libraries = host_libraries(abi, android)
    flags: Flags = {"java.library.path": libraries, "onnxruntime.native.path": libraries}
    flags |= {"gemma.demo.bundle": demo, "gemma.adapters": BUILD / "adapters" / "made"}
    return Host(abi, jvm, flags, android / LITERT)


def missing() -> str:
    """Why the tests cannot run here; empty if they can."""
    tools = [name for name in ("cc", "nm", "java", "mvn", "npm") if shutil.which(name) is None]
    if os.uname().machine != X86_64.machine:
        return f"this machine is {os.uname().machine}, the libraries are for {X86_64.machine}"
    return f"no {', '.join(tools)}" if tools else ""


def classes_of(engine: engines.Engine) -> list[Path]:
    """The classes of the library, its tests, the engine and JUnit."""
    modules, kinds = ("gemma", engine.module), ("classes", "test-classes")
    own = [ANDROID / module / "target" / kind for module in modules for kind in kinds]
    return [*own, *engine.jars, *sorted(maven("native_test").glob("*.jar"))]


def tests_of(engine: engines.Engine) -> list[str]:
    """The names of an engine's test classes: those for native libraries, or all of ONNX Runtime's."""
    folder = ANDROID / engine.module / "src" / "test" / "kotlin"
    end = "Test.kt" if engine.backend == "onnx" else "NativeTest.kt"
    paths = sorted(path for path in folder.rglob("*.kt") if path.name.endswith(end))
    return [path.read_text(encoding="utf-8").split()[1] + "." + path.stem for path in paths]


def onnx_fixtures(fixtures: Path) -> Path:
    """The answers of Python from ONNX Runtime that Android's library gives bit for bit."""
    folder = fixtures / "suite"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "models").mkdir(parents=True)
    for model in sorted((BUILD / "fixtures" / "models").iterdir()):
        if model.name not in ROUNDED:
            (folder / "models" / model.name).symlink_to(model)
    for name in ("tokenizers", "adapters", "interleaved.json"):
        (folder / name).symlink_to(BUILD / "fixtures" / name)
    return folder


def test(engine: engines.Engine, classes: str, here: Host, fixtures: Path) -> None:
    """Run the tests of an engine.

    Raises:
        SystemExit: a test failed.
    """
    answers = onnx_fixtures(fixtures) if engine.backend == "onnx" else fixtures / engine.backend
    shutil.rmtree(answers / "from-kotlin", ignore_errors=True)
    output = here.run(classes, {"gemma.fixtures": answers}, "org.junit.runner.JUnitCore", *tests_of(engine))
    print(engine.module, here.abi.name, *(line for line in output.splitlines() if line.startswith("OK")), flush=True)
    if engine.backend != "onnx":  # make android-test checks those of ONNX Runtime with another Python
        print(run([sys.executable, CHECK_STATES, answers, "--backend", engine.backend]).strip(), flush=True)


def compare(backend: str, classes: str, there: Host, fixtures: Path) -> None:
    """Compare an engine's logits with Python's.

    Raises:
        SystemExit: they differ by more than the rounding of kernels.
    """
    answers = fixtures / "text" / backend
    shutil.rmtree(answers / "from-kotlin", ignore_errors=True)
    there.run(classes, {"gemma.fixtures": answers}, "gemma.edge.engine.WriteLogits", backend)
    print(backend, there.abi.name, parity.compare(answers, backend), flush=True)


def shrunk(used: list[engines.Engine]) -> Path:
    """The classes of an app with all engines, shrunk and renamed by R8 with the rules of the library's modules."""
    parts = sorted({part for engine in used for part in classes_of(engine)})
    rules = [*sorted(ANDROID.glob("gemma*/consumer-rules.pro")), *(path for engine in used for path in engine.rules)]
    rules.append(TOOLS / "app.pro")

    jars = [part if part.is_file() else packed("-".join(part.parts[-3:]), [part]) for part in parts]

    def make(folder: Path) -> None:
        flags = ["--release", "--classfile", "--lib", java_home(), "--output", folder / "shrunk.jar"]
        configurations = [part for path in rules for part in ("--pg-conf", path)]
        r8 = next(maven("tools").glob("r8-*.jar"))
        run(["java", "-Xmx1500m", "-cp", r8, "com.android.tools.r8.R8", *flags, *configurations, *jars])

    return once("shrunk", [*rules, *jars], make) / "shrunk.jar"


def side_by_side(task: Callable[[engines.Engine], None], used: list[engines.Engine]) -> None:
    """Do something with every engine, with as many at once as there are cores: each has a process of its own.

    Raises:
        SystemExit: from a task; the others end first.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(task, used))


def main(fixtures: Path, demo: Path) -> None:
    """Prepare the libraries and run all tests."""
    if reason := missing():
        print(f"android-native-test: skipped, {reason}")
        return
    start = time.monotonic()
    used = [make(None) for make in engines.ENGINES.values()]
    check_api.check("executorch", used[0].jars[0])
    here = host(X86_64, used, ["java", "-Xmx1g"], demo)
    classes = {engine.backend: class_path(classes_of(engine)) for engine in used}
    side_by_side(lambda engine: test(engine, classes[engine.backend], here, fixtures), used)
    small = shrunk(used)
    print(f"shrunk by R8: {small.stat().st_size / 1e6:.2f} MB of classes")
    side_by_side(lambda engine: compare(engine.backend, str(small), here, fixtures), used)
    print(f"{time.monotonic() - start:.0f} s on {X86_64.name}", flush=True)
    system = arm64.debian()
    if system is None:
        print("arm64: skipped, Debian's packages cannot be had here")
        return
    phone = host(arm64.abi(), used, arm64.jvm(system), demo)
    side_by_side(lambda engine: compare(engine.backend, classes[engine.backend], phone, fixtures), used)
    print(f"{time.monotonic() - start:.0f} s with {phone.abi.name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
