"""Write Python's answers for the engines on Android's own libraries: `native_fixtures.py OUT BUNDLE...`.

`make android-native-test` runs it. Each backend of a bundle has a folder of its own, `OUT/BACKEND/models/BUNDLE`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import model_fixtures

from gemma_edge.bundle.manifest import Manifest


def main(out: Path, bundles: list[Path]) -> None:
    """Write the fixtures of every backend of every bundle."""
    for bundle in bundles:
        for backend in Manifest.load(bundle).backends:
            model_fixtures.write_answers(out / backend / "models" / bundle.name, bundle, backend)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
