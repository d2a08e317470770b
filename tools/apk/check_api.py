"""Compare our double of a library's classes with the library: `check_api.py DOUBLE AAR_OR_JAR`.

The modules for ExecuTorch and LiteRT are compiled against doubles in android_demo/doubles. Every public name and signature
of a double must be in the library too. `make android-api EXECUTORCH_AAR=FILE LITERT_AAR=FILE` runs this on official files.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from toolchain import ANDROID, run, unpacked

MODIFIERS = re.compile(r"\b(final|native|synchronized|abstract|open) ")
# OURS: classes of the double that the library need not have: its native code, and what Kotlin makes.
OURS = re.compile(r"Native$|Kt$|\$(WhenMappings|DefaultImpls|EntriesMappings)")

# BY_NAME: members that gemma-litert calls by their name, because releases of the library differ in their types.
BY_NAME = re.compile(r"public \S+ (?=getDimensions\(\))")
# MADE: constructors of classes that only the double calls by their types.
MADE = re.compile(r"(TensorType\$Layout|CompiledModel\$GpuOptions)\(")


def class_names(classes: Path) -> list[str]:
    """The names of the classes in a folder, as javap takes them."""
    names = [".".join(path.relative_to(classes).with_suffix("").parts) for path in classes.rglob("*.class")]
    return sorted(name for name in names if not OURS.search(name))


def members(classes: Path, names: list[str]) -> set[str]:
    """The public members of some classes, each behind the name of its class."""
    lines = run(["javap", "-public", "-cp", classes, *names]).splitlines()
    found, owner = set(), ""
    for line in (MODIFIERS.sub("", raw.strip()) for raw in lines):
        if line.endswith("{"):
            owner = re.split(r" (?:extends|implements) |[<{]", line)[0].split()[-1]
            found.add(owner)
        elif line.endswith(";") and not MADE.search(line):
            found.add(f"{owner}: {BY_NAME.sub('', line.removesuffix(';'))}")
    return found


def real_classes(library: Path) -> Path:
    """The jar with the classes of a library, which is an AAR or a jar itself."""
    if library.suffix != ".aar":
        return library
    (folder,) = unpacked([library], f"api-of-{library.stem}")
    return folder / "classes.jar"


def missing(double: Path, library: Path) -> list[str]:
    """The names and signatures of a double that a library lacks.

    Raises:
        SystemExit: the library lacks a whole class, or is no archive of classes.
    """
    names = class_names(double)
    assert names, double
    return sorted(members(double, names) - members(real_classes(library), names))


def check(name: str, library: Path) -> None:
    """Compare the double of this name with a library.

    Raises:
        SystemExit: a name or a signature is not in the library.
    """
    if not library.is_file():
        raise SystemExit(f"{library}: no such file")
    double = ANDROID / "doubles" / name / "target" / "classes"
    if lacks := missing(double, library):
        raise SystemExit(f"{library} lacks what android_demo/doubles/{name} has:\n" + "\n".join(lacks))
    print(f"{library.name} has every name and signature of android_demo/doubles/{name}")


if __name__ == "__main__":
    check(sys.argv[1], Path(sys.argv[2]))
