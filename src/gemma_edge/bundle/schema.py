"""The JSON Schema of `manifest.json`, made from the dataclasses.

`python -m gemma_edge.bundle.schema > docs/export/manifest.schema.json` writes it; a test fails where that file is not up to date.
It holds types and ranges. What the keys must agree on is checked by checks.py only.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from gemma_edge.bundle.entries import BackendEntry
from gemma_edge.bundle.manifest import SCHEMA_VERSION, Manifest
from gemma_edge.bundle.settings import SETTINGS

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def manifest_schema() -> dict[str, Any]:
    """The schema as plain values."""
    entry: Any = BackendEntry
    kinds: list[Any] = [Manifest, *(entry[kind] for kind in SETTINGS.values())]
    (manifest, *backends), definitions = msgspec.json.schema_components(kinds)
    definitions["BackendEntry_Any_"]["properties"]["settings"] = {"type": "object"}
    by_name = definitions["Manifest"]["properties"]["backends"]
    by_name |= {"minProperties": 1, "properties": dict(zip(SETTINGS, backends, strict=True))}
    definitions["Manifest"]["required"].append("schema_version")
    return {
        "$schema": DIALECT,
        "title": f"gemma-edge bundle, schema {SCHEMA_VERSION}",
        **manifest,
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as it lies in docs/."""
    return json.dumps(manifest_schema(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
