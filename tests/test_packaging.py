"""What is declared, built and installed is what lies in the repository, and no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.checkpoints import DEMO, ROOT

from gemma_edge.bundle.backends import registered

TOPS = ("model", "quantize", "export", "runtimes", "evaluate", "bench", "sweep")
LINKS = ROOT / "src" / "gemma_edge"
BUILT_FROM = (*TOPS, "src", "demo/tiny-gemma2/LICENSE.md", "pyproject.toml", "README.md", "LICENSE")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without `__init__.py` imports as a namespace here, and type checkers pass over it."""
    folders = {path.parent for top in TOPS for path in (ROOT / top).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.skipif(not (LINKS / "export").is_symlink(), reason="checkout without symbolic links")
def test_links_for_editors_point_at_the_top_level_folders() -> None:
    assert {path.name: path.resolve() for path in LINKS.iterdir() if path.is_symlink()} == {
        top: ROOT / top for top in TOPS
    }


def test_what_runs_a_bundle_needs_only_light_packages() -> None:
    project = pyproject()["project"]
    names = {Requirement(text).name for text in project["dependencies"] + project["optional-dependencies"]["onnx"]}
    assert names == {"numpy", "click", "rich", "safetensors", "tokenizers", "jinja2", "msgspec", "onnxruntime"}


def test_runtimes_import_neither_torch_nor_a_converter() -> None:
    absent = {info.engine_module for info in registered().values() if info.how_to_install()}
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "runtimes").rglob("[!_]*.py"))
    modules = [f"gemma_edge.{'.'.join(path.with_suffix('').parts)}" for path in files]
    modules = [name for name in modules if name not in absent]
    code = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_requirement_has_a_pin_that_it_allows() -> None:
    project = pyproject()["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {normal(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(str(pin) == f"{pin.name}=={versions[normal(pin.name)]}" for pin in pins), "names and versions only"
    wanted = [Requirement(text) for text in project["dependencies"]]
    # in an environment of its own, where the Makefile takes the pin of NumPy away
    extras = {name: texts for name, texts in project["optional-dependencies"].items() if name != "tflite-runtime"}
    wanted += [Requirement(text) for texts in extras.values() for text in texts]
    for requirement in wanted:
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(versions[normal(requirement.name)]), requirement


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the sdist, and in `again/` the wheel made from the sdist."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in BUILT_FROM:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    build(tree, "sdist", out)
    build(tree, "wheel", out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out)
    build(out / sdist.name.removesuffix(".tar.gz"), "wheel", out / "again")
    return out


def build(tree: Path, kind: str, out: Path) -> None:
    out.mkdir(exist_ok=True)
    code = f"from hatchling import build; build.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)


def contents(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_packages_their_data_and_the_licences(built: Path) -> None:
    files = [*LINKS.glob("**/*.py"), *(path for top in TOPS for path in (ROOT / top).rglob("*.py"))]
    files += [LINKS / "py.typed", *(LINKS / "text" / "data").iterdir(), *LINKS.glob("**/*.j2")]
    files += [
        path for top in TOPS for kind in ("*.j2", "*.html", "*.js", "*.d.ts") for path in (ROOT / top).rglob(kind)
    ]
    expected = {path.relative_to(LINKS if path.is_relative_to(LINKS) else ROOT).as_posix() for path in files}
    found = contents(built)
    assert {name for name in found if ".dist-info/" not in name} == {f"gemma_edge/{path}" for path in expected}
    licences = {name.partition(".dist-info/licenses/")[2] for name in found if "/licenses/" in name}
    assert licences == {"LICENSE", "demo/tiny-gemma2/LICENSE.md", "src/gemma_edge/text/data/LICENSE.md"}


def test_wheel_from_the_sdist_is_the_same(built: Path) -> None:
    assert contents(built / "again") == contents(built)


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_what_is_built_exports_and_runs_the_demo_outside_the_repository(
    built: Path, pattern: str, tmp_path: Path
) -> None:
    """Installed into an environment of its own, which sees this one's packages but not this checkout."""
    (archive,) = built.glob(pattern)
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (site,) = home.glob("lib/python3*/site-packages")
    # a folder that is named here is searched, but its own .pth files, the editable installation's among them, are not read
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", str(archive)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(home), *install], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: object) -> str:
        command = [str(home / "bin" / str(words[0])), *map(str, words[1:])]
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("python", "-c", "import gemma_edge; print(gemma_edge.__file__)").strip()).is_relative_to(home)
    run("gemma-export", DEMO, "--quality", "fast", "--context", 256, "-o", "bundle")
    assert run("gemma-run", "bundle", "--prompt", "And the LORD said unto", "--max-tokens", 8).strip()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("changed", ["Makefile", "pyproject.toml", "constraints.txt"])
def test_setup_runs_again_after_whatever_says_what_is_installed_has_changed(changed: str, tmp_path: Path) -> None:
    """The list of extras stands in the Makefile: after a new one there, `make setup` did nothing."""
    stamp = tmp_path / ".venv" / ".set-up"
    stamp.parent.mkdir()
    stamp.touch()
    for age_s, name in enumerate(("Makefile", "pyproject.toml", "constraints.txt"), 1):
        shutil.copyfile(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (stamp.stat().st_mtime - age_s,) * 2)
    asked = ["make", "--question", ".venv/.set-up"]
    assert subprocess.run(asked, cwd=tmp_path).returncode == 0
    os.utime(tmp_path / changed, (stamp.stat().st_mtime + 1,) * 2)
    assert subprocess.run(asked, cwd=tmp_path).returncode == 1
