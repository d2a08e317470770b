"""Download what the APK is made of, in the exact versions of pins.toml, with Maven's and npm's own clients.

Each version is downloaded once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ANDROID = Path(__file__).parents[2] / "android_demo"
BUILD = ANDROID / "build"
CHAIN = BUILD / "toolchain"
PINS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("pins.toml").read_text(encoding="utf-8"))
MAVEN = ["mvn", "-B", "-q"]
# SHORT: for programs that end before the JVM's second compiler would have paid.
SHORT = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
<modelVersion>4.0.0</modelVersion><groupId>gemma.edge</groupId><artifactId>{name}</artifactId><version>1</version><packaging>pom</packaging>
<dependencies>{dependencies}</dependencies>
<build><plugins><plugin><groupId>org.apache.maven.plugins</groupId><artifactId>maven-dependency-plugin</artifactId><version>3.8.1</version>
<configuration><artifactItems>{items}</artifactItems></configuration></plugin></plugins></build>
</project>
"""


def run(command: Sequence[object], **options: Any) -> str:
    """Run a program and return its output.

    Raises:
        SystemExit: the program failed; the message holds its last lines.
    """
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    if result.returncode:
        last = "\n".join(result.stdout.splitlines()[-30:])
        raise SystemExit(f"{last}\n{' '.join(map(str, command[:3]))[:200]} ... failed with {result.returncode}")
    output: str = result.stdout
    return output


def digest(parts: Iterable[object]) -> str:
    """A short hash of the parts: a file counts by its contents, anything else by its text."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return sha256.hexdigest()[:16]


def once(name: str, inputs: Iterable[object], make: Callable[[Path], None], under: Path = BUILD) -> Path:
    """The folder `name`, filled by `make` unless it was filled from the same inputs before.

    Args:
        name: of the folder.
        inputs: what the contents depend on.
        make: fills the folder, which is empty.
        under: where the folder lies.
    """
    folder, stamp = under / name, under / f".{name}.stamp"
    expected = digest(inputs)
    if not (folder.is_dir() and stamp.is_file() and stamp.read_text() == expected):
        shutil.rmtree(folder, ignore_errors=True)
        stamp.unlink(missing_ok=True)
        folder.mkdir(parents=True)
        make(folder)
        stamp.write_text(expected)
    return folder


def maven(name: str) -> Path:
    """The folder with the artifacts of a section of the pins."""
    section = PINS[name]
    coordinates = [line.split(":") for line in section.get("exact") or section["resolved"]]
    tags = ("groupId", "artifactId", "version", "type")
    parts = [
        "".join(f"<{tag}>{escape(part)}</{tag}>" for tag, part in zip(tags, line, strict=True)) for line in coordinates
    ]
    exact = "exact" in section

    def fetch(folder: Path) -> None:
        pom = folder.parent / f"{name}.pom.xml"
        items = "".join(f"<artifactItem>{part}</artifactItem>" for part in parts) if exact else ""
        dependencies = "" if exact else "".join(f"<dependency>{part}</dependency>" for part in parts)
        pom.write_text(POM.format(name=name, items=items, dependencies=dependencies), encoding="utf-8")
        goal = "dependency:copy" if exact else "dependency:copy-dependencies"
        run([*MAVEN, "-f", pom, goal, f"-DoutputDirectory={folder}", "-DincludeScope=runtime"])

    return once(name, [section], fetch, CHAIN)


def npm(name: str, only: str | None = None) -> Path:
    """The folder with an npm package of the pins, unpacked.

    Args:
        name: of the pin.
        only: the one entry to unpack; None unpacks all.
    """
    package = PINS["npm"][name]

    def fetch(folder: Path) -> None:
        output = run(["npm", "pack", "--silent", package], cwd=folder)
        archive = folder / output.split()[-1]
        with tarfile.open(archive) as tar:
            members = [tar.getmember(only)] if only else tar.getmembers()
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 of Debian 12 has none
            tar.extractall(folder, members)
        archive.unlink()

    return once(name, [package, only], fetch, CHAIN)


def onnxruntime_aar() -> Path:
    """ONNX Runtime's Android library, from a package of a third party."""
    entry, sha256 = PINS["onnxruntime"]["entry"], PINS["onnxruntime"]["sha256"]
    return checked(npm("onnxruntime", entry) / entry, sha256, "do not use the file, or pass --onnx-aar FILE")


def checked(path: Path, sha256: str, way_out: str = "do not use the file") -> Path:
    """A file with the pinned hash.

    Raises:
        SystemExit: the file has another one.
    """
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != sha256:
        raise SystemExit(f"{path}: sha256 {actual}, but {sha256} is pinned; {way_out}")
    return path


def aapt2() -> Path:
    """The resource compiler."""
    library = next(maven("framework").glob("apktool-lib-*.jar"))

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(library) as jar:
            (folder / "aapt2").write_bytes(jar.read("prebuilt/linux/aapt2"))
        (folder / "aapt2").chmod(0o755)

    return once("aapt2", [library.name], unpack, CHAIN) / "aapt2"


def framework() -> Path:
    """The platform's classes and resources."""
    return next(maven("framework").glob("android-all-*.jar"))


def unpacked(archives: Sequence[Path], name: str) -> list[Path]:
    """The folders of some AARs, unpacked, in the same order."""

    def unpack(folder: Path) -> None:
        for archive in archives:
            with zipfile.ZipFile(archive) as aar:
                aar.extractall(folder / archive.stem)

    folder = once(name, [(archive.name, archive.stat().st_size) for archive in archives], unpack, CHAIN)
    return [folder / archive.stem for archive in archives]


def packed(name: str, folders: Sequence[Path]) -> Path:
    """A jar of the classes in some folders."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]

    def pack(out: Path) -> None:
        run(["jar", "cf", out / f"{name}.jar", *(part for folder in folders for part in ("-C", folder, "."))])

    return once(f"jar-{name}", files, pack) / f"{name}.jar"


def jars_of(libraries: Path, aars: Sequence[Path]) -> list[Path]:
    """The jars in a folder and those of unpacked AARs."""
    jars = sorted(libraries.glob("*.jar"))
    for aar in aars:
        jars += [path for path in (aar / "classes.jar", *sorted(aar.glob("libs/*.jar"))) if path.is_file()]
    return jars


def class_path(jars: Iterable[Path]) -> str:
    """Some jars in one text, as the Java tools take a class path."""
    return os.pathsep.join(map(str, jars))


def kotlinc(sources: Sequence[Path], jars: Sequence[Path], out: Path) -> None:
    """Compile Kotlin for Android into `out`, a jar or a folder."""
    compiler = npm("kotlin") / "package" / "bin" / "kotlinc"
    flags = ["-Xjdk-release=17", "-jvm-target", "17", "-nowarn", "-Xnullability-annotations=@android.annotation:ignore"]
    command = ["bash", compiler, *flags, "-classpath", class_path([*jars, framework()]), "-d", out, *sources]
    run(command, env={**os.environ, "JAVA_OPTS": " ".join(["-Xmx1500m", *SHORT])})


def java_home() -> Path:
    """The folder of the JDK on the path."""
    properties = run(["java", "-XshowSettings:properties", "-version"])
    line = next(line for line in properties.splitlines() if "java.home" in line)
    return Path(line.partition("=")[2].strip())
