"""Run Android Lint on the app without Gradle and the Android SDK: its sources, resources and manifest. Errors end it.

`make android-lint` compiles the library first. Lint reads the app as a project file describes it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from xml.sax.saxutils import quoteattr

from build_apk import APP, GEMMA_CLASSES, Libraries, libraries, link, sources
from toolchain import ANDROID, BUILD, PINS, SHORT, class_path, framework, maven, once

CONFIG = ANDROID / "app" / "lint.xml"
FOLDER = BUILD / "lint"  # neither it nor its parent has a Gradle file, at which Lint would refuse


def sdk() -> Path:
    """As much of an Android SDK as Lint looks at: the platform's classes."""
    platform = f"android-{PINS['versions']['target_sdk']}"

    def make(folder: Path) -> None:
        home = folder / "platforms" / platform
        home.mkdir(parents=True)
        (home / "android.jar").symlink_to(framework())
        (home / "source.properties").write_text(f"Pkg.Revision=1\nAndroidVersion.ApiLevel={platform[8:]}\n")

    return once("lint-sdk", [platform, framework().name], make)


def project(linked: Libraries, resources: Path) -> str:
    """The project file."""
    modules = [
        ("manifest", "file", APP / "AndroidManifest.xml"),
        ("merged-manifest", "file", resources / "AndroidManifest.xml"),
        # Lint takes files one by one; the view bindings are there because they name the layouts
        *(("src", "file", path) for path in [*sources(APP / "kotlin"), *sources(resources / "java")]),
        ("resource", "file", APP / "res"),
        *(("classpath", "jar", path) for path in [framework(), *linked.jars, *GEMMA_CLASSES, resources / "R.jar"]),
    ]
    lines = [f"    <{tag} {key}={quoteattr(str(path))} />" for tag, key, path in modules]
    aars = [f'    <aar file="{linked.plain / aar.name}.aar" extracted="{aar}" />' for aar in linked.aars]
    return "\n".join(
        [
            "<project>",
            f'  <root dir="{APP}" />',
            f'  <sdk dir="{sdk()}" />',
            f'  <module name="app" android="true" library="false" compile-sdk-version="{PINS["versions"]["target_sdk"]}"',
            '      javaLanguage="17">',
            *lines,
            *aars,
            "  </module>",
            "</project>",
        ]
    )


def main() -> None:
    """Write the project file, run Lint and print its report.

    Raises:
        SystemExit: Lint has found an error, or did not run.
    """
    try:
        jars = sorted(maven("lint").glob("*.jar"))
    except SystemExit as error:
        print(f"android-lint: skipped, Lint's packages cannot be had here: {error}")
        return
    linked = libraries([])
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    description, text = FOLDER / "project.xml", FOLDER / "report.txt"
    description.write_text(project(linked, link(linked)), encoding="utf-8")
    java = ["java", "-Xmx2g", *SHORT, "-cp", class_path(jars), "com.android.tools.lint.Main"]
    flags = ["--offline", "--nowarn", "--exitcode", "--quiet", "--config", CONFIG, "--text", text]
    command = [*java, "--project", *map(str, [description, *flags])]
    environment = {**os.environ, "ANDROID_USER_HOME": str(FOLDER / "home")}
    result = subprocess.run(command, text=True, capture_output=True, check=False, env=environment)
    report = text.read_text(encoding="utf-8") if text.is_file() else ""
    print(report or result.stdout[-3000:])
    if result.returncode or not report:
        raise SystemExit(f"{result.stderr[-3000:]}\nLint ended with {result.returncode}")


if __name__ == "__main__":
    main()
