"""Who may import whom, read from the sources: lazy imports and those for type checkers count like all others."""

from __future__ import annotations

import ast
import os
from pathlib import Path

from support.checkpoints import ROOT

SOURCE = ROOT / "src" / "gemma_edge"
GROUND = {"", "bundle", "text", "report"}  # "": the modules that lie directly in gemma_edge
# room -> the rooms that its modules may import besides itself
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "bundle": {""},
    "text": {"", "bundle"},
    "report": {"", "bundle"},
    "model": GROUND,
    "quantize": {*GROUND, "model"},
    "runtimes": GROUND,
    "export": {*GROUND, "model", "quantize", "runtimes"},
    "evaluate": {*GROUND, "runtimes", "model", "quantize"},
    "bench": {*GROUND, "runtimes"},
    "sweep": {*GROUND, "model", "quantize", "runtimes", "export", "evaluate", "bench"},
}
PUBLIC = "gemma_edge"
# Public names and the command in front of all commands are resolved lazily, and so may name every room.
LAZY = {PUBLIC, "gemma_edge.public", "gemma_edge.__main__"}
# Only the model of a Hugging Face folder is computed with torch: the rest of `evaluate` runs where no torch is.
WITH_TORCH = "gemma_edge.evaluate.folder_model"
BOUND = 14  # loose files in one folder
LONGEST = 350  # lines of one file


def sources() -> dict[str, Path]:
    """Module -> file."""
    found = {}
    for folder, _, names in os.walk(SOURCE, followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(SOURCE).with_suffix("").parts
            found[".".join([PUBLIC, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of ours that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= whole & modules or {str(node.module)}
            if whole - modules:
                names.add(str(node.module))
    return names & modules


def room(module: str) -> str:
    """The folder at the top that a module lies in; "" for the modules beside them."""
    first = module.split(".")[1:2]
    return first[0] if first and (SOURCE / first[0]).is_dir() else ""


MODULES = sources()
GRAPH = {name: imports(path, set(MODULES)) for name, path in MODULES.items()}


def test_every_room_is_known() -> None:
    assert {room(name) for name in MODULES} == set(MAY_IMPORT)


def test_no_module_imports_upward() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if not {name, other} & LAZY and room(other) not in {room(name), *MAY_IMPORT[room(name)]}
    ]
    assert upward == []


def test_only_the_folder_model_of_evaluate_needs_model_and_quantize() -> None:
    users = {name for name, others in GRAPH.items() if room(name) == "evaluate" and any(map(needs_torch, others))}
    assert users <= {WITH_TORCH}


def needs_torch(module: str) -> bool:
    return room(module) in ("model", "quantize")


def test_no_imports_go_in_a_circle() -> None:
    """Depth first: a module that is met again while its own imports are being followed closes a circle."""
    open_, done = list[str](), set[str]()

    def follow(name: str) -> None:
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for other in sorted(GRAPH[name] - LAZY):
            follow(other)
        open_.pop()
        done.add(name)

    for name in sorted(set(GRAPH) - LAZY):
        follow(name)


def test_folders_and_files_stay_small() -> None:
    folders: dict[Path, int] = {}
    others = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.*")]
    for path in [*MODULES.values(), *others]:
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > BOUND} == {}
    long = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert {path: lines for path, lines in long.items() if lines > LONGEST} == {}
