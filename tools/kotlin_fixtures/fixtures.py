"""Write the answers of Python that the Kotlin tests compare with: `fixtures.py OUT DEMO BUNDLE...`.

`make android-test` runs it when the fixtures are missing or older than their sources.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import model_fixtures
import onnxruntime  # type: ignore[import-untyped]
import tokenizer_fixtures

# ONNXRUNTIME: the version of the Java library. Logits are compared bit for bit, and other versions round differently.
ONNXRUNTIME = "1.29.0"


def main() -> None:
    """Write all fixtures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("demo", type=Path, help="the demo's checkpoint")
    parser.add_argument("bundles", type=Path, nargs="+", help="bundles with an ONNX backend")
    parser.add_argument("--gemma", type=Path, help="folder with Gemma's own tokenizer.json")
    parser.add_argument("--adapted", type=Path, required=True, help="bundle of the adapters")
    parser.add_argument("--adapters", type=Path, required=True, help="folder with adapters of that bundle")
    options = parser.parse_args()
    if onnxruntime.__version__ != ONNXRUNTIME:
        raise SystemExit(
            f"onnxruntime {onnxruntime.__version__} is installed, {ONNXRUNTIME} is needed: run make android-test"
        )
    tokenizer_fixtures.write_tokenizers(options.out / "tokenizers", options.demo, options.gemma)
    for bundle in options.bundles:
        model_fixtures.write_answers(options.out / "models" / bundle.name, bundle)
    adapters = sorted(options.adapters.iterdir())
    for adapter in adapters:
        model_fixtures.write_answers(options.out / "adapters" / adapter.name, options.adapted, adapter=adapter)
    model_fixtures.write_interleaved(options.out, options.adapted, adapters)


if __name__ == "__main__":
    main()
