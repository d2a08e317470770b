"""The Gradle files for Android Studio, which we cannot run, agree with our own build: pom.xml, pins.toml and tools/apk."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.checkpoints import ROOT

ANDROID = ROOT / "android_demo"
CATALOG = tomllib.loads((ANDROID / "gradle" / "libs.versions.toml").read_text(encoding="utf-8"))
PINS = tomllib.loads((ROOT / "tools" / "apk" / "pins.toml").read_text(encoding="utf-8"))
MODULES = ("app", "gemma", "gemma-executorch", "gemma-litert", "gemma-onnx")
SCRIPTS = [ANDROID / "build.gradle.kts", *(ANDROID / module / "build.gradle.kts" for module in MODULES)]
VERSIONS: dict[str, str] = CATALOG["versions"]


def build_file(module: str) -> str:
    return (ANDROID / module / "build.gradle.kts").read_text(encoding="utf-8")


def said(text: str, pattern: str) -> list[str]:
    """The group of a pattern, for each of its matches."""
    return re.findall(pattern, text)


def pom_versions() -> dict[str, str]:
    """group:artifact -> version of the library's dependencies."""
    space = "{http://maven.apache.org/POM/4.0.0}"
    parent = ElementTree.parse(ANDROID / "pom.xml").getroot()
    properties = {node.tag.removeprefix(space): node.text or "" for node in parent.findall(f"{space}properties/*")}
    versions = {}
    for root in (parent, *(ElementTree.parse(path).getroot() for path in sorted(ANDROID.glob("*/pom.xml")))):
        for node in root.findall(f"{space}dependencies/{space}dependency"):
            group, artifact, version = (
                node.findtext(f"{space}{tag}", "") for tag in ("groupId", "artifactId", "version")
            )
            versions[f"{group}:{artifact}"] = properties.get(version.strip("${}"), version)
    return versions


def constraint(package: str) -> str:
    """The version of a Python package that the tests have passed with."""
    (version,) = said((ROOT / "constraints.txt").read_text(encoding="utf-8"), rf"(?m)^{package}==(\S+)")
    return version


def pinned_versions() -> dict[str, str]:
    """group:artifact -> version of everything in the APK and in its tests."""
    lines = [line for part in PINS.values() for kind in ("exact", "resolved") for line in part.get(kind, [])]
    return {f"{group}:{artifact}": version for group, artifact, version, _ in (line.split(":") for line in lines)}


def test_every_library_of_the_catalog_has_the_version_that_is_built_and_tested() -> None:
    built = pinned_versions() | pom_versions()
    built |= {
        # npm's compiler has the version of the Kotlin plugin, and the desktop jar that of the AAR
        "org.jetbrains.kotlin:kotlin-gradle-plugin": PINS["npm"]["kotlin"].partition("@")[2],
        "com.microsoft.onnxruntime:onnxruntime-android": built["com.microsoft.onnxruntime:onnxruntime"],
        # our build cannot download these; Python's packages of the same release made and verified the bundles
        "org.pytorch:executorch-android": constraint("executorch"),
        "com.google.ai.edge.litert:litert": constraint("ai-edge-litert"),
    }
    catalog = {entry["module"]: VERSIONS[entry["version"]["ref"]] for entry in CATALOG["libraries"].values()}
    assert catalog == {module: built[module] for module in catalog}


def test_what_is_built_twice_has_one_version() -> None:
    """Maven compiles the library and tools/apk compiles the app, both with the versions of the catalog."""
    pinned = pinned_versions()
    different = {module: (version, pinned[module]) for module, version in pom_versions().items() if module in pinned}
    assert different
    assert all(ours == theirs for ours, theirs in different.values()), different
    assert PINS["npm"]["kotlin"] == f"kotlin-compiler@{pom_versions()['org.jetbrains.kotlin:kotlin-stdlib']}"


def test_the_android_plugin_is_of_the_release_whose_tools_build_the_apk() -> None:
    assert VERSIONS["android-gradle-plugin"] == pinned_versions()["com.android.tools.build:apksig"]


def test_sdk_versions_are_the_apks() -> None:
    assert (VERSIONS["min-sdk"], VERSIONS["target-sdk"]) == tuple(
        str(PINS["versions"][key]) for key in ("min_sdk", "target_sdk")
    )
    assert int(VERSIONS["compile-sdk"]) >= int(VERSIONS["target-sdk"])
    # Maven checks the library's classes against this version of Android
    pom = (ANDROID / "pom.xml").read_text(encoding="utf-8")
    assert f"<artifactId>gummy-bears-api-{VERSIONS['min-sdk']}</artifactId>" in pom


def test_modules_and_names_are_those_of_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools" / "apk"), *sys.path])
    import build_apk

    settings = (ANDROID / "settings.gradle.kts").read_text(encoding="utf-8")
    modules = said(settings, r'":([\w-]+)"')
    assert sorted(modules) == sorted(MODULES)
    app = build_file("app")
    for key in ("namespace", "applicationId"):
        assert said(app, rf'{key} = "([\w.]+)"') == [build_apk.PACKAGE]
    assert said(app, r"versionCode = (\d+)") == [build_apk.VERSION_CODE]
    assert said(app, r'versionName = "([\d.]+)"') == [build_apk.VERSION_NAME]
    abis = said(app, r"abiFilters \+= listOf\((.*?)\)")
    assert said(abis[0], r'"([\w-]+)"') == list(build_apk.ABIS)
    assert said(app, r'project\(":([\w-]+)"\)') == list(build_apk.MODULES)
    for module in MODULES:
        (namespace,) = said(build_file(module), r'namespace = "([\w.]+)"')
        root = ANDROID / module / "src" / "main" / "kotlin"
        packages = {path: path.read_text(encoding="utf-8").split()[1] for path in root.rglob("*.kt")}
        assert packages == {path: ".".join(path.parent.relative_to(root).parts) for path in packages}
        assert all(f"{package}.".startswith(f"{namespace}.") for package in packages.values())


def test_the_manifest_leaves_its_package_to_the_build() -> None:
    """The Android plugin refuses a package in a source manifest, so every class in it is named with its package."""
    manifest = ElementTree.parse(ANDROID / "app" / "src" / "main" / "AndroidManifest.xml").getroot()
    assert "package" not in manifest.attrib
    name = "{http://schemas.android.com/apk/res/android}name"
    activities = [node.attrib[name] for node in manifest.iter("activity")]
    for activity in activities:
        path = ANDROID / "app" / "src" / "main" / "kotlin" / Path(*activity.split(".")).with_suffix(".kt")
        assert path.is_file(), activity
    (application,) = (node.attrib[name] for node in manifest.iter("application"))
    package, _, class_name = application.rpartition(".")
    sources = (ANDROID / "app" / "src" / "main" / "kotlin" / Path(*package.split("."))).glob("*.kt")
    assert any(f"class {class_name} " in path.read_text(encoding="utf-8") for path in sources)


def test_both_builds_generate_view_bindings() -> None:
    assert "viewBinding = true" in build_file("app")
    assert "write_bindings(" in (ROOT / "tools" / "apk" / "build_apk.py").read_text(encoding="utf-8")


def test_every_file_that_is_named_is_there() -> None:
    for module in MODULES:
        names = said(build_file(module), r'"([\w./-]+\.pro)"')
        assert names
        assert all((ANDROID / module / name).is_file() for name in names)
    (demo,) = said(build_file("app"), r'rootDir\.resolve\("\.\./([\w/-]+)"\)')
    assert f"BUNDLE := {demo}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_entry_of_the_catalog_is_used_and_every_use_is_an_entry() -> None:
    used = {name for script in SCRIPTS for name in said(script.read_text(encoding="utf-8"), r"libs\.([a-z.]+)")}
    accessors = {name.replace("-", ".") for name in CATALOG["libraries"]}
    accessors |= {f"plugins.{name.replace('-', '.')}" for name in CATALOG["plugins"]}
    refs = {entry["version"]["ref"] for kind in ("libraries", "plugins") for entry in CATALOG[kind].values()}
    accessors |= {f"versions.{name.replace('-', '.')}.get" for name in VERSIONS.keys() - refs}
    assert used == accessors
    assert refs <= VERSIONS.keys()


def test_the_rules_keep_the_engines_that_the_library_finds_by_name() -> None:
    registry = ANDROID / "gemma" / "src" / "main" / "kotlin" / "gemma" / "edge" / "engine" / "Engine.kt"
    source = registry.read_text(encoding="utf-8")
    names, modules = said(source, r'"(gemma\.edge\.\w+\.\w+)", "gemma\.edge:'), said(source, r'"gemma\.edge:([\w-]+)"')
    assert sorted(modules) == [module for module in sorted(MODULES) if "gemma-" in module]
    for name, module in zip(names, modules, strict=True):
        package, _, class_name = name.rpartition(".")
        folder = ANDROID / module / "src" / "main" / "kotlin" / Path(*package.split("."))
        assert any(f"class {class_name} : Engine" in path.read_text(encoding="utf-8") for path in folder.glob("*.kt"))
        rules = (ANDROID / module / "consumer-rules.pro").read_text(encoding="utf-8")
        assert f"-keep class {name} {{ <init>(); }}\n" in rules


def test_both_builds_shrink_by_the_same_rules() -> None:
    scripts = (ROOT / "tools" / "apk" / "build_apk.py").read_text(encoding="utf-8")
    (rules,) = said(build_file("app"), r'"([\w./-]+\.pro)"')
    assert f'ANDROID / "app" / "{rules}"' in scripts
    for module in MODULES[1:]:
        assert said(build_file(module), r'"([\w./-]+\.pro)"') == ["consumer-rules.pro"]
    assert 'ANDROID / module / "consumer-rules.pro" for module in linked.modules' in scripts
