"""The packages of npm that a site is made of: what is kept, and what is refused in one line. No network: npm is a script here."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from support.checkpoints import DEMO

from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.web import packages
from gemma_edge.export.web.packages import NpmPackage, check_npm, fetched
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.user_cache import VARIABLE


def archive(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def package(content: bytes, **files: str) -> NpmPackage:
    sha512 = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return NpmPackage("@some/thing", "1.0.0", "MIT", sha512, files or {"dist/a.js": "a.js"})


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an `npm` that "packs" the file `archive` beside it and counts its calls; the user's cache is empty."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    home = tmp_path / "bin"
    home.mkdir()
    script = home / "npm"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {home}/calls\ntest -f {home}/archive || {{ echo "npm error 404" >&2; exit 1; }}\n'
        f"cp {home}/archive thing.tgz\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")
    return home


def test_a_package_is_fetched_once_and_only_with_the_right_hash(npm: Path) -> None:
    content = archive({"dist/a.js": b"one", "dist/b.js": b"two"})
    (npm / "archive").write_bytes(content)
    for _ in range(2):
        folder = fetched(package(content))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.js": b"one"}
    assert (npm / "calls").read_text() == "pack --silent --ignore-scripts @some/thing@1.0.0\n"
    other = package(content + b"x")
    with pytest.raises(InputError, match=r"npm fetched another @some/thing@1\.0\.0: sha512 .* instead of"):
        fetched(other)
    assert not [path for path in (npm.parent / "cache/npm" / other.key).iterdir()]


def test_what_npm_says_is_told_in_one_line(npm: Path) -> None:
    with pytest.raises(InputError, match=r"npm cannot fetch @some/thing@1\.0\.0: npm error 404") as refused:
        fetched(package(b""))
    assert "check the network" in str(refused.value) and "\n" not in str(refused.value)


def test_without_npm_an_export_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_edge.export.api import open_model

    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "find_program", lambda name: None)
    with pytest.raises(InputError, match="there is no npm on the PATH; install Node.js"):
        open_model(ExportOptions(model=str(DEMO), target="web"), plan_only=True)
    with pytest.raises(InputError, match="there is no npm on the PATH"):
        check_npm()


def test_without_a_place_for_packages_an_export_is_refused_in_one_line(
    npm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (npm.parent / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(npm.parent / "file"))
    with pytest.raises(
        InputError, match="no place to keep the libraries of a site .* set GEMMA_EDGE_CACHE to a folder"
    ):
        fetched(package(b""))


def test_the_target_takes_one_scale_per_channel_and_refuses_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_edge.export.api import open_model

    monkeypatch.setattr("gemma_edge.export.web.backend.check_npm", lambda: None)
    plan = open_model(ExportOptions(model=str(DEMO), target="web"), plan_only=True)
    assert plan.recipe.name == "int4-channel"
    assert list(plan.plans) == ["web"]
    eight = QuantizeOptions(bits=8)
    assert open_model(ExportOptions(model=str(DEMO), target="web", quantization=eight), plan_only=True)
    with pytest.raises(InputError, match="has groups of 32: LiteRT.js computes them wrongly; use group_size 0"):
        groups = QuantizeOptions(bits=4, group_size=32)
        open_model(ExportOptions(model=str(DEMO), target="web", quantization=groups), plan_only=True)


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        (QuantizeOptions(bits=4, table_bits=4), "use table_bits 8, or head_bits 4"),
        (QuantizeOptions(bits=4, head_bits=4, quality="fast"), "use head_bits 8, or a quality that calibrates"),
    ],
    ids=["table", "head"],
)
def test_a_table_and_a_head_in_groups_are_refused_with_what_helps(
    options: QuantizeOptions, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma_edge.export.api import open_model

    monkeypatch.setattr("gemma_edge.export.web.backend.check_npm", lambda: None)
    with pytest.raises(InputError, match=f"has groups of 32: LiteRT.js computes them wrongly; {way_out}"):
        open_model(ExportOptions(model=str(DEMO), target="web", quantization=options), plan_only=True)
