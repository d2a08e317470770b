"""Damage to bundles: a manifest that fits damaged files, as somebody would write it who means harm."""

from __future__ import annotations

import json
from pathlib import Path

from gemma_edge.bundle.manifest import MANIFEST, list_files


def reseal(bundle: Path) -> None:
    """Make the manifest fit the files. A manifest that cannot be parsed stays as it is."""
    path = bundle / MANIFEST
    try:
        data = json.loads(path.read_text())
    except ValueError:
        return
    files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in list_files(bundle).items()}
    path.unlink()  # it may be one with the whole bundle's
    path.write_text(json.dumps({**data, "files": files}))
