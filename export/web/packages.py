"""The packages of npm that a site is made of, fetched by npm itself and kept in the user's cache."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_edge import user_cache
from gemma_edge.children import find_program
from gemma_edge.errors import InputError

KIND, KEPT = "npm", "the libraries of a site"  # in the user's cache
TIMEOUT = 600.0  # seconds for one package
LITERT = [f"litert_wasm{kind}_internal.{ending}" for kind in ("", "_threaded", "_compat") for ending in ("js", "wasm")]


@dataclass(frozen=True)
class NpmPackage:
    """A release, and the files that a site takes of it."""

    name: str
    version: str
    licence: str
    sha512: str  # of the archive, base64: npm's `integrity`
    files: Mapping[str, str]  # path in the package -> name in the site

    @property
    def key(self) -> str:
        """Its folder in the user's cache: another one when anything of it changes."""
        return hashlib.sha256(repr((self.sha512, sorted(self.files.items()))).encode()).hexdigest()[:32]


PACKAGES = (
    NpmPackage(
        "@litertjs/core",
        "2.5.3",
        "Apache-2.0",
        "PlGmbMOq9WitX7FO0jhbdJw9GthatsyuCQXjTt/wJZo0FLaw48q4tz8IwqgqCIkviYGr9OFDL1kCnN4nzWoyJQ==",
        {"dist/index.js": "litert.js", **{f"wasm/{name}": name for name in LITERT}},
    ),
    NpmPackage(
        "@litertjs/wasm-utils",
        "2.5.3",
        "Apache-2.0",
        "4fJiw6tBQnIs+0jH/OQ16nYOiSl8/+zZnn5h2ul8aTKHi05sVqZW580Tmk78pC2kT39A9OYBVdFawteZ/sI1kQ==",
        {"dist/index.js": "litert-wasm-utils.js"},
    ),
    NpmPackage(
        "@huggingface/tokenizers",
        "0.2.0",
        "Apache-2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"dist/tokenizers.min.mjs": "tokenizers.js"},
    ),
    NpmPackage(
        "@huggingface/jinja",
        "0.5.11",
        "MIT",
        "YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
        {"dist/index.js": "jinja.js"},
    ),
    NpmPackage(
        "hash-wasm",
        "4.13.0",
        "MIT",
        "GrWl7wsV46fKIXQZB5ebskLZLAmKL6d9RS0fspCxDeQyjoNu1AfTJTMLPOJyfzaQm0ldFiwFN21/w+sE/kgEFQ==",
        {"dist/sha256.umd.min.js": "sha256.js"},
    ),
)


def check_npm() -> None:
    """Refuse to begin where a package is neither kept nor can be fetched.

    Raises:
        InputError: npm is missing, or there is no place to keep packages.
    """
    with user_cache.needed_for(KEPT):
        kept = user_cache.place(KIND)
    for package in PACKAGES:
        if not _is_complete(kept / package.key, package):
            _npm(package)


def _npm(package: NpmPackage) -> str:
    """The program npm, which a package is fetched with."""
    program = find_program("npm")
    if program is None:
        raise InputError(
            f"`backend` web needs {package.name} and other packages of npm, and there is no npm on the PATH; install"
            " Node.js, or use another `backend`",
            field="backend",
            value="web",
        )
    return program


def fetched(package: NpmPackage) -> Path:
    """A folder with the package's files under the site's names.

    Raises:
        InputError: npm is missing or fails, the archive is another one, or there is no place to keep it.
    """
    with user_cache.needed_for(KEPT):
        folder = user_cache.folder(KIND, package.key)
    if not _is_complete(folder, package):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            archive = _packed(package, Path(place))
            _unpack(archive, package, Path(place), folder)
    return folder


def _is_complete(folder: Path, package: NpmPackage) -> bool:
    return all((folder / name).is_file() for name in package.files.values())


def _packed(package: NpmPackage, place: Path) -> Path:
    """The archive, by `npm pack`."""
    release = f"{package.name}@{package.version}"
    hint = "check the network, or use another `backend`"
    try:
        done = subprocess.run(
            [_npm(package), "pack", "--silent", "--ignore-scripts", release],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"npm did not fetch {release} within {TIMEOUT:.0f} s", field="backend", hint=hint) from None
    archive = next(place.glob("*.tgz"), None)
    if done.returncode or archive is None:
        said = " ".join((done.stderr or done.stdout).split())[:300]
        raise InputError(f"npm cannot fetch {release}: {said}", field="backend", hint=hint)
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise InputError(f"npm fetched another {release}: sha512 {found} instead of {package.sha512}", field="backend")
    return archive


def _unpack(archive: Path, package: NpmPackage, place: Path, folder: Path) -> None:
    """Put the wanted files into `folder`, each complete or not at all."""
    with tarfile.open(archive) as tar:
        for path, name in package.files.items():
            content = tar.extractfile(f"package/{path}")
            if content is None:
                raise RuntimeError(f"{package.name} {package.version} has no {path}")
            with content, (place / name).open("wb") as out:
                shutil.copyfileobj(content, out)
            (place / name).replace(folder / name)
