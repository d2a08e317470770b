"""Robolectric tests of the app on the JVM, offline: the APK's classes and resources, and the runtime itself behind them.

One JVM for each test class: native graphics and ONNX Runtime's library in one JVM ended in a segmentation fault.
Screenshots are written where --screenshots says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from apk_zip import write_apk
from build_apk import GEMMA_CLASSES, PACKAGE, asset_files, compile_app, libraries, link, sources
from toolchain import ANDROID, BUILD, class_path, framework, jars_of, kotlinc, maven, once, unpacked

TESTS = ANDROID / "app" / "src" / "test" / "kotlin"


def properties(resource_apk: Path, resources: Path) -> str:
    """What Robolectric asks of a build system."""
    return "\n".join(
        [
            f"android_resource_apk={resource_apk}",
            f"android_merged_manifest={resources / 'AndroidManifest.xml'}",
            f"android_custom_package={PACKAGE}",
        ]
    )


def main() -> None:
    """Compile and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="the bundle that the app starts with")
    parser.add_argument("--screenshots", type=Path, default=BUILD / "screenshots")
    parser.add_argument("--only", help="a test class")
    options = parser.parse_args()
    linked = libraries(None)
    resources = link(linked)
    app = compile_app(linked, resources)
    test_libraries = maven("test")
    test_aars = unpacked(sorted(test_libraries.glob("*.aar")), "test-aars")
    # the Android library's classes stay out: the desktop's are the same and have natives for this machine
    app_jars = jars_of(linked.plain, [aar for aar in linked.aars if aar != linked.onnxruntime])
    jars = [app, GEMMA_CLASSES, resources / "R.jar", *app_jars, *jars_of(test_libraries, test_aars)]
    with_assets = BUILD / "test.ap_"
    write_apk(with_assets, resources / "app.ap_", asset_files(options.bundle))

    def compile_tests(folder: Path) -> None:
        kotlinc(sources(TESTS), jars, folder / "classes")
        config = folder / "classes" / "com" / "android" / "tools" / "test_config.properties"
        config.parent.mkdir(parents=True)
        config.write_text(properties(with_assets, resources), encoding="utf-8")

    inputs = [*sources(TESTS), app, *sources(GEMMA_CLASSES), Path(__file__)]
    classes = once("test-classes", inputs, compile_tests) / "classes"
    options.screenshots.mkdir(parents=True, exist_ok=True)
    flags = {
        "robolectric.offline": "true",
        "robolectric.dependency.dir": maven("test_sdk"),
        "gemma.screenshots": options.screenshots.resolve(),
        "gemma.demo.bundle": options.bundle.resolve(),
    }
    found = [
        ".".join(path.relative_to(TESTS).with_suffix("").parts) for path in sources(TESTS) if path.stem.endswith("Test")
    ]
    for name in found if options.only is None else [options.only]:
        command = ["java", "-Xmx2g", *(f"-D{key}={value}" for key, value in flags.items())]
        command += ["-cp", class_path([classes, *jars, framework()]), "org.junit.runner.JUnitCore", name]
        print(f"-- {name}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TZ": "UTC"})
        tail = (
            done.stdout.splitlines()
            if done.returncode
            else [line for line in done.stdout.splitlines() if line.startswith("OK")]
        )
        print("\n".join(tail[:80]), flush=True)
        if done.returncode:
            raise SystemExit(f"{done.stderr[-2000:]}\n{name} failed with {done.returncode}")


if __name__ == "__main__":
    main()
