"""Write and check the APK as a zip file.

Files that Android maps into memory are stored uncompressed and aligned; all others are compressed. Sign.java signs.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

# PAGE: Android 15's largest memory page, in bytes. A library that is mapped from the APK begins at a multiple of it.
PAGE = 16384
# WORD: the alignment of every other stored file, in bytes.
WORD = 4
# ZIP_HEADER: bytes of a local file header before the name.
ZIP_HEADER = 30


def _alignment(name: str) -> int | None:
    """The alignment of an entry's data in bytes; None for an entry that is compressed."""
    if name.endswith(".so"):
        return PAGE
    return WORD if name == "resources.arsc" else None


def write_apk(out: Path, linked: Path, files: dict[str, Path]) -> None:
    """Write an unsigned APK.

    Args:
        out: the file to write.
        linked: the manifest and resources that aapt2 linked.
        files: all other files, by their names in the APK.
    """
    with zipfile.ZipFile(linked) as base, zipfile.ZipFile(out, "w") as apk:
        for entry in base.infolist():
            _add(apk, entry.filename, base.read(entry), stored=entry.compress_type == zipfile.ZIP_STORED)
        for name, path in files.items():
            _add(apk, name, path.read_bytes(), stored=False)


def _add(apk: zipfile.ZipFile, name: str, data: bytes, *, stored: bool) -> None:
    # a fixed date, so that the same inputs give the same bytes
    info = zipfile.ZipInfo(name, (2010, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    alignment = _alignment(name) or (WORD if stored else None)
    info.compress_type = zipfile.ZIP_DEFLATED if alignment is None else zipfile.ZIP_STORED
    if alignment is not None:
        assert apk.fp is not None
        start = apk.fp.tell() + ZIP_HEADER + len(name.encode())
        info.extra = b"\0" * (-start % alignment)  # zeros in the extra field, as zipalign writes them
    apk.writestr(info, data)


def check_apk(path: Path, abis: tuple[str, ...]) -> None:
    """Check what Android requires of the native libraries in an APK.

    Raises:
        SystemExit: a library is compressed, is not aligned in the file, or has segments that are not aligned for pages of
            16 KiB; or the APK holds libraries for other ABIs than `abis`.
    """
    data = path.read_bytes()
    with zipfile.ZipFile(path) as apk:
        entries = apk.infolist()
    for entry in entries:
        if not entry.filename.endswith(".so"):
            continue
        name_length, extra_length = struct.unpack_from("<HH", data, entry.header_offset + 26)
        start = entry.header_offset + ZIP_HEADER + name_length + extra_length
        if entry.compress_type != zipfile.ZIP_STORED or start % PAGE:
            raise SystemExit(f"{path}: {entry.filename} is not stored at a multiple of {PAGE} bytes")
        if _segment_alignment(data[start : start + entry.file_size]) % PAGE:
            raise SystemExit(f"{path}: {entry.filename} was linked for smaller pages than {PAGE} bytes")
    libraries = {name.split("/")[1] for entry in entries if (name := entry.filename).startswith("lib/")}
    if libraries != set(abis):
        raise SystemExit(f"{path} holds libraries for {sorted(libraries)}, {sorted(abis)} are expected")


def _segment_alignment(elf: bytes) -> int:
    """The smallest alignment of the loaded segments of a 64-bit library, in bytes.

    Source: elf.h, Elf64_Ehdr and Elf64_Phdr.
    """
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    load = 1
    kinds = [(struct.unpack_from("<I", elf, table + i * size)[0], table + i * size) for i in range(count)]
    return min(int(struct.unpack_from("<Q", elf, at + 48)[0]) for kind, at in kinds if kind == load)
