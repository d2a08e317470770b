"""Every sh and python block of the docs is run as a reader would run it, in a folder as `make demo` leaves it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from support.checkpoints import ROOT

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.bundle.schema import manifest_schema
from gemma_edge.bundle.settings import SETTINGS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("demo/**/*.md")),
    *sorted(ROOT.glob("src/gemma_edge/text/**/*.md")),
]
KOTLIN = sorted((ROOT / "android_demo").glob("*/src/**/*.kt"))  # make android-test compiles all of it
RUN = {"sh": ["sh", "-eu", "-c"], "python": [sys.executable, "-c"]}
NOT_CODE = {"", "text", "json", "toml"}
MAX_NOT_RUN = 13
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,}) *(?P<info>.*)$")


class Block(NamedTuple):
    line: int  # of its first line, counted from 1
    language: str
    no_run: str | None  # why it is not run, None: it is
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            continue
        language, _, rest = opening["info"].partition(" ")
        assert not rest or rest.startswith("no-run"), f"{page}:{number}: {rest!r} is no mark that is known"
        body = []
        for _, inner in lines:
            if inner.strip() == opening["marks"]:
                break
            body.append(inner.removeprefix(opening["indent"]))
        no_run = rest.removeprefix("no-run").strip() if rest else None
        yield Block(number + 1, language, no_run, "\n".join(body))


def clean_environment(home: Path) -> dict[str, str]:
    """This one, with the commands under test in front, nothing of make's, no network for the hub, and caches in `home`."""
    dropped = ("MAKE", "MFLAGS", "HF_", "XDG_", "GEMMA_EDGE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(command: list[str], folder: Path, what: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise AssertionError(f"{what} ended with {done.returncode}:\n{command[-1]}\n---\n{done.stdout[-4000:]}")
    return done.stdout


@pytest.fixture(scope="session")
def after_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy in which `make demo` was run: the real target, without the installation before it."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "demo", folder / "demo")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".venv").symlink_to(sys.prefix)
    printed = run(["make", "--old-file=setup", "demo"], folder, "make demo")
    assert "gemma-export demo/tiny-gemma2 --target android --bits 4" in printed
    assert "passed the quick gate" in printed
    assert list((folder / ".cache" / "gemma-edge" / "calibration").iterdir())  # of this home, not of the user's
    return folder


@pytest.fixture(scope="session")
def pages(after_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future[None]]]:
    """Every page being run, two at a time: nearly all of it is commands starting up, each on one core."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {page: pool.submit(run_page, page, after_demo, tmp_path_factory.mktemp(page.stem)) for page in PAGES}


def run_page(page: Path, after_demo: Path, folder: Path) -> None:
    """The blocks of a page in order, in a copy of what `make demo` left."""
    todo = [block for block in blocks(page) if block.language in RUN and block.no_run is None]
    if todo:
        shutil.copytree(after_demo, folder, symlinks=True, dirs_exist_ok=True)
    for block in todo:
        run([*RUN[block.language], block.text], folder, f"{page.name}:{block.line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, pages: dict[Path, Future[None]]) -> None:
    pages[page].result()


@pytest.mark.parametrize(
    "block", ["```sh\nfalse\ntrue\n```", "```sh\ntrue\n```\n\n```python\nraise SystemExit(3)\n```"]
)
def test_a_block_that_fails_is_noticed(block: str, tmp_path: Path) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "empty"
    folder.mkdir()
    page.write_text(f"# Title\n\n{block}\n")
    with pytest.raises(AssertionError, match=r"page\.md:\d+ ended with [13]"):
        run_page(page, folder, tmp_path / "work")


def test_no_block_escapes_by_its_language() -> None:
    """`bash`, `console`, `py` and the like would not be run."""
    found = {block.language for page in PAGES for block in blocks(page)}
    assert found <= RUN.keys() | NOT_CODE | {"kotlin"}


def test_kotlin_blocks_are_lines_of_files_that_are_compiled() -> None:
    sources = [path.read_text(encoding="utf-8") for path in KOTLIN]
    found = [(page, block) for page in PAGES for block in blocks(page) if block.language == "kotlin"]
    assert found
    for page, block in found:
        assert block.no_run is None, f"{page}:{block.line}: a kotlin block is compiled"
        assert any(f"\n{block.text}\n" in f"\n{source}" for source in sources), (
            f"{page}:{block.line}: no source holds it"
        )


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    skipped = [block for page in PAGES for block in blocks(page) if block.no_run is not None]
    assert all(len(block.no_run or "") > 10 for block in skipped)
    assert len(skipped) <= MAX_NOT_RUN


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_prose_wraps_at_120_columns(page: Path) -> None:
    """Code, rows of tables and pictures may be longer: they cannot break."""
    inside, long = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        inside ^= FENCE.match(line) is not None
        if not inside and len(line) > 120 and not line.startswith(("|", "![", "```", "~~~")):
            long.append(number)
    assert long == []


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page}: {target}"


def test_every_key_of_the_manifest_is_documented() -> None:
    page = (ROOT / "docs" / "export" / "bundle-format.md").read_text(encoding="utf-8")
    assert {key for key in property_names(manifest_schema()) - set(SETTINGS) if f"`{key}`" not in page} == set()


def test_every_key_of_a_real_manifest_is_documented(after_demo: Path) -> None:
    page = (ROOT / "docs" / "export" / "bundle-format.md").read_text(encoding="utf-8")
    manifest = json.loads(Manifest.load(after_demo / "out" / "tiny-gemma2").to_json())
    found = keys({key: value for key, value in manifest.items() if key not in ("files", "tools")})
    assert {key for key in found if f"`{key}`" not in page} == {"onnx"}


def property_names(schema: object) -> set[str]:
    """Every key that a JSON Schema names, at any depth."""
    if isinstance(schema, list):
        return {name for inner in schema for name in property_names(inner)}
    if not isinstance(schema, dict):
        return set()
    return set(schema.get("properties", {})) | {name for inner in schema.values() for name in property_names(inner)}


def keys(value: object) -> set[str]:
    """Keys of nested objects."""
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys(inner)}
    if isinstance(value, list):
        return {key for inner in value for key in keys(inner)}
    return set()
