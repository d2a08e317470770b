"""Write what the Kotlin tests compare with: `fixtures.py OUT DEMO BUNDLE... [--gemma FOLDER]`. See Makefile, android-fixtures."""

from __future__ import annotations

import argparse
from pathlib import Path

import model_fixtures
import onnxruntime  # type: ignore[import-untyped]
import tokenizer_fixtures

ONNXRUNTIME = "1.29.0"  # the newest Java release; results differ between releases by more than nothing


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("demo", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--gemma", type=Path, help="a folder with Gemma's own tokenizer.json")
    options = parser.parse_args()
    if onnxruntime.__version__ != ONNXRUNTIME:
        raise SystemExit(
            f"onnxruntime {onnxruntime.__version__} here, {ONNXRUNTIME} is needed: run make android-fixtures"
        )
    tokenizer_fixtures.write_tokenizers(options.out / "tokenizers", options.demo, options.gemma)
    for bundle in options.bundles:
        model_fixtures.write_answers(options.out / "models" / bundle.name, bundle)


if __name__ == "__main__":
    main()
