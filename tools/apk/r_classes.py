"""A small R class for each library: it has only the names of the library's own R.txt, with the ids of the linked app.

`aapt2 --extra-packages` would copy every id into every class. That is ten times as many fields, and minutes of dexing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path


def _rows(path: Path) -> list[list[str]]:
    """The lines of an R.txt, each as type, kind, name and value."""
    if not path.is_file():
        return []
    rows = [line.split(" ", 3) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if len(row) == 4]


def write_r_classes(app: Path, libraries: list[Path], out: Path) -> None:
    """Write an R.java for the package of every library.

    Args:
        app: the R.txt of the linked app.
        libraries: folders of unpacked AARs.
        out: folder of the Java sources.

    Raises:
        SystemExit: the manifest of a library names no package.
    """
    linked = {(kind, name): (type_, value) for type_, kind, name, value in _rows(app)}
    for library in libraries:
        rows = [row for row in _rows(library / "R.txt") if (row[1], row[2]) in linked]
        if not rows:
            continue
        manifest = (library / "AndroidManifest.xml").read_text(encoding="utf-8")
        match = re.search(r'package="([^"]+)"', manifest)
        if match is None:
            raise SystemExit(f"{library}: its manifest names no package")
        kinds: dict[str, list[str]] = defaultdict(list)
        for _, kind, name, _ in rows:
            type_, value = linked[kind, name]
            kinds[kind].append(f"    public static final {type_} {name.replace('.', '_')} = {value};")
        lines = [f"package {match[1]};", "public final class R {"]
        for kind, fields in kinds.items():
            lines += [f"  public static final class {kind} {{", *fields, "  }"]
        folder = out.joinpath(*match[1].split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "R.java").write_text("\n".join([*lines, "}", ""]), encoding="utf-8")
