"""Test the app on the JVM with Robolectric, offline.

The tests use the classes and resources of the APK and answer with the real model on ONNX Runtime. Each test class runs
in a JVM of its own, because a JVM that ran several classes, with native graphics and ONNX Runtime, ended in a
segmentation fault.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from apk_zip import write_apk
from build_apk import GEMMA_CLASSES, PACKAGE, asset_files, compile_app, gemma_files, libraries, link, sources
from toolchain import ANDROID, BUILD, SHORT, class_path, framework, jars_of, kotlinc, maven, once, unpacked

TESTS = ANDROID / "app" / "src" / "test" / "kotlin"


def properties(resource_apk: Path, resources: Path) -> str:
    """The properties file in which Robolectric expects a build system to name the app's files."""
    return "\n".join(
        [
            f"android_resource_apk={resource_apk}",
            f"android_merged_manifest={resources / 'AndroidManifest.xml'}",
            f"android_custom_package={PACKAGE}",
        ]
    )


def test_classes() -> list[str]:
    """The names of all test classes."""
    tests = [path for path in sources(TESTS) if path.stem.endswith("Test")]
    return [".".join(path.relative_to(TESTS).with_suffix("").parts) for path in tests]


def run_class(name: str, junit: list[str]) -> None:
    """Run one test class and print its result.

    Args:
        name: of the class.
        junit: the command that runs JUnit, without the class.

    Raises:
        SystemExit: a test failed.
    """
    print(f"-- {name}", flush=True)
    result = subprocess.run(
        [*junit, name], capture_output=True, text=True, check=False, env={**os.environ, "TZ": "UTC"}
    )
    lines = result.stdout.splitlines()
    if result.returncode:
        print("\n".join(lines[:80]), flush=True)
        raise SystemExit(f"{result.stderr[-2000:]}\n{name} failed with {result.returncode}")
    print("\n".join(line for line in lines if line.startswith("OK")), flush=True)


def main() -> None:
    """Compile and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="the bundle that the app comes with")
    parser.add_argument("--screenshots", type=Path, default=BUILD / "screenshots", help="folder for the screenshots")
    parser.add_argument("--only", help="the one test class to run; default: all")
    options = parser.parse_args()
    linked = libraries([])
    resources = link(linked)
    app = compile_app(linked, resources)
    test_libraries = maven("test")
    test_aars = unpacked(sorted(test_libraries.glob("*.aar")), "test-aars")
    # ONNX Runtime's classes come from the desktop jar instead of the AAR: that one has native libraries for this machine
    jars = [app, *GEMMA_CLASSES, resources / "R.jar", *linked.common, *jars_of(test_libraries, test_aars)]
    with_assets = BUILD / "test.ap_"
    write_apk(with_assets, resources / "app.ap_", asset_files(options.bundle))

    def compile_tests(folder: Path) -> None:
        kotlinc(sources(TESTS), jars, folder / "classes")
        config = folder / "classes" / "com" / "android" / "tools" / "test_config.properties"
        config.parent.mkdir(parents=True)
        config.write_text(properties(with_assets, resources), encoding="utf-8")

    inputs = [*sources(TESTS), app, *gemma_files(), Path(__file__)]
    classes = once("test-classes", inputs, compile_tests) / "classes"
    options.screenshots.mkdir(parents=True, exist_ok=True)
    flags = {
        "robolectric.offline": "true",
        "robolectric.dependency.dir": maven("test_sdk"),
        "gemma.screenshots": options.screenshots.resolve(),
        "gemma.demo.bundle": options.bundle.resolve(),
    }
    for name in test_classes() if options.only is None else [options.only]:
        command = ["java", "-Xmx2g", *SHORT, *(f"-D{key}={value}" for key, value in flags.items())]
        run_class(name, [*command, "-cp", class_path([classes, *jars, framework()]), "org.junit.runner.JUnitCore"])


if __name__ == "__main__":
    main()
