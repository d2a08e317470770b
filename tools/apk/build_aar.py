"""Make a Maven repository of the library, for apps that add it as a dependency: `build_aar.py REPOSITORY URL [--docs]`.

Each module is an AAR for Gradle, with a jar of the same classes for the JVM, its sources, its POM and, with `--docs`, API
docs. `make aar` compiles the classes first, with Maven. A file's checksums lie beside it, as repositories want them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from toolchain import ANDROID, PINS, class_path, maven, once, run

GROUP = "gemma.edge"
MODULES = ("gemma", "gemma-executorch", "gemma-litert", "gemma-onnx")
CATALOG = tomllib.loads((ANDROID / "gradle" / "libs.versions.toml").read_text(encoding="utf-8"))
NAMESPACE = "{http://maven.apache.org/POM/4.0.0}"
# ENGINES: the entry of the catalog with the library that a module's engine calls.
ENGINES = {"gemma-executorch": "executorch-android", "gemma-litert": "litert", "gemma-onnx": "onnxruntime-android"}
METADATA = "META-INF/com/android/build/gradle/aar-metadata.properties"
POM = """<?xml version="1.0" encoding="UTF-8"?>
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>{group}</groupId>
  <artifactId>{module}</artifactId>
  <version>{version}</version>
  <packaging>aar</packaging>
  <name>{module}</name>
  <description>{description}</description>
  <url>{url}</url>
  <licenses>
    <license>
      <name>Apache-2.0</name>
      <url>https://www.apache.org/licenses/LICENSE-2.0.txt</url>
    </license>
  </licenses>
  <developers>
    <developer>
      <name>The gemma-edge contributors</name>
      <url>{url}</url>
    </developer>
  </developers>
  <scm>
    <connection>scm:git:{url}</connection>
    <url>{url}</url>
  </scm>
  <dependencies>
{dependencies}
  </dependencies>
</project>
"""
DEPENDENCY = """    <dependency>
      <groupId>{group}</groupId>
      <artifactId>{artifact}</artifactId>
      <version>{version}</version>
      <scope>{scope}</scope>
    </dependency>"""


def version() -> str:
    """The library's version."""
    return ElementTree.parse(ANDROID / "pom.xml").getroot().findtext(f"{NAMESPACE}version", "")


def of_catalog(entry: str) -> tuple[str, str]:
    """The module and the version of a library in the version catalog."""
    library = CATALOG["libraries"][entry]
    return library["module"], CATALOG["versions"][library["version"]["ref"]]


def dependencies(module: str) -> list[tuple[str, str, str]]:
    """What an app gets with a module: coordinates, version and scope."""
    kotlin = CATALOG["versions"]["kotlin"]
    always = [("org.jetbrains.kotlin:kotlin-stdlib", kotlin, "compile")]
    if module == "gemma":
        return [*always, (*of_catalog("coroutines-core"), "compile")]
    return [*always, (f"{GROUP}:gemma", version(), "compile"), (*of_catalog(ENGINES[module]), "runtime")]


def pom(module: str, url: str) -> str:
    """The POM with which a module is published; `url` is the project's address."""
    comment = (ANDROID / module / "pom.xml").read_text(encoding="utf-8").partition("<!--")[2].partition("-->")[0]
    lines = []
    for coordinates, of, scope in dependencies(module):
        group, _, artifact = coordinates.partition(":")
        lines.append(DEPENDENCY.format(group=group, artifact=artifact, version=of, scope=scope))
    description = escape(comment.strip().partition(".")[0] + ".")
    fields = {"group": GROUP, "module": module, "version": version(), "description": description, "url": escape(url)}
    return POM.format(**fields, dependencies="\n".join(lines))


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    """Write an archive whose bytes depend on its files alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, (2010, 1, 1, 0, 0, 0)), files[name], zipfile.ZIP_DEFLATED)


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their names in an archive."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def aar(module: str, classes: Path) -> dict[str, bytes]:
    """The files of a module's AAR."""
    versions = CATALOG["versions"]
    script = (ANDROID / module / "build.gradle.kts").read_text(encoding="utf-8")
    namespace = script.partition('namespace = "')[2].partition('"')[0]
    manifest = f'<manifest xmlns:android="http://schemas.android.com/apk/res/android" package="{namespace}">\n'
    manifest += f'    <uses-sdk android:minSdkVersion="{versions["min-sdk"]}" />\n</manifest>\n'
    metadata = f"aarFormatVersion=1.0\naarMetadataVersion=1.0\nminCompileSdk={versions['min-sdk']}\n"
    files = {"AndroidManifest.xml": manifest, "R.txt": "", METADATA: metadata}
    rules = (ANDROID / module / "consumer-rules.pro").read_bytes()
    return {name: text.encode() for name, text in files.items()} | {
        "classes.jar": classes.read_bytes(),
        "proguard.txt": rules,
    }


def publish(module: str, repository: Path, url: str, docs: Path | None) -> None:
    """Write a module into the repository.

    Args:
        module: its name.
        repository: the folder of the repository.
        url: the project's address.
        docs: the folder with the API docs; None leaves them out.
    """
    base = f"{module}-{version()}"
    folder = repository / Path(*GROUP.split(".")) / module / version()
    folder.mkdir(parents=True)
    classes = ANDROID / module / "target" / "classes"
    if not classes.is_dir():
        raise SystemExit(f"no classes in {classes}: run make aar, which compiles them")
    # R8 finds the rules in a jar too
    rules = {f"META-INF/proguard/{module}.pro": (ANDROID / module / "consumer-rules.pro").read_bytes()}
    write_zip(folder / f"{base}.jar", tree(classes))
    write_zip(folder / f"{base}.aar", aar(module, folder / f"{base}.jar"))
    write_zip(folder / f"{base}.jar", tree(classes) | rules)
    write_zip(folder / f"{base}-sources.jar", tree(ANDROID / module / "src" / "main" / "kotlin"))
    if docs:
        write_zip(folder / f"{base}-javadoc.jar", tree(docs))
    (folder / f"{base}.pom").write_text(pom(module, url), encoding="utf-8")
    for path in sorted(folder.iterdir()):
        for kind in ("md5", "sha1", "sha256"):
            digest = hashlib.new(kind, path.read_bytes()).hexdigest()
            path.with_name(f"{path.name}.{kind}").write_text(digest, encoding="utf-8")


def source_set(module: str) -> dict[str, object]:
    """What Dokka is told of a module."""
    libraries = [*maven("native_test").glob("*.jar"), *(ANDROID / "doubles").glob("*/target/classes")]
    others = [] if module == "gemma" else [{"scopeId": "gemma", "sourceSetName": "main"}]
    return {
        "sourceSetID": {"scopeId": module, "sourceSetName": "main"},
        "displayName": module,
        "classpath": [str(path) for path in libraries],
        "sourceRoots": [str(ANDROID / module / "src" / "main" / "kotlin")],
        "dependentSourceSets": others,
        "jdkVersion": 17,
        "analysisPlatform": "jvm",
    }


def api_docs() -> Path:
    """The API docs of all modules, as HTML."""
    jars = sorted(maven("dokka").glob("*.jar"))
    core = [path for path in jars if path.name.startswith(tuple(PINS["dokka"]["core"]))]
    sources = [path for module in MODULES for path in sorted((ANDROID / module / "src" / "main").rglob("*.kt"))]

    def make(folder: Path) -> None:
        configuration = {
            "moduleName": "gemma-edge",
            "moduleVersion": version(),
            "outputDir": str(folder),
            "offlineMode": True,
            "suppressInheritedMembers": True,
            "sourceSets": [source_set(module) for module in MODULES],
            "pluginsClasspath": [str(path) for path in jars if path not in core],
            "pluginsConfiguration": [],
            "modules": [],
        }
        path = folder.with_name("dokka.json")
        path.write_text(json.dumps(configuration, indent=2), encoding="utf-8")
        print(run(["java", "-Xmx1500m", "-cp", class_path(core), Path(__file__).with_name("Dokka.java"), path]).strip())

    return once("api-docs", [PINS["dokka"], *sources], make)


def main() -> None:
    """Write the repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path, help="folder to write into; the library in it is replaced")
    parser.add_argument("url", help="address of the project, for the POMs")
    parser.add_argument("--docs", action="store_true", help="with API docs, which take a minute")
    options = parser.parse_args()
    docs = api_docs() if options.docs else None
    shutil.rmtree(options.repository / Path(*GROUP.split(".")), ignore_errors=True)
    for module in MODULES:
        publish(module, options.repository, options.url, docs)
    print(f"{options.repository}: {', '.join(f'{GROUP}:{module}:{version()}' for module in MODULES)}")


if __name__ == "__main__":
    main()
