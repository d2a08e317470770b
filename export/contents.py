"""What a bundle holds beside its backends' files: tokenizer and chat files, and the manifest."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gemma_edge
from gemma_edge.bundle.codec import convert
from gemma_edge.bundle.entries import BackendEntry, ModelEntry, RecipeEntry, TargetEntry
from gemma_edge.bundle.manifest import Manifest, list_files, typed_config, with_identities
from gemma_edge.export.opened import Opened
from gemma_edge.model import hub
from gemma_edge.model.checkpoint import Weights, weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.text.tokenizer import TOKENIZER_FILE

logger = logging.getLogger(__name__)

TOOLS = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "executorch",
    "torchao",
    "ai-edge-litert",
    "safetensors",
    "tokenizers",
    "numpy",
)


@dataclass(frozen=True)
class Integers:
    """The weights that a bundle is made from."""

    quantized: QuantizedCheckpoint
    learnt: Mapping[str, Any]  # what the manifest says of their calibration; {} without one
    lora: str | None  # name of the adapter that was merged


def copy_tokenizer(source: Weights, bundle: Path) -> bool:
    """Copy tokenizer and chat files; whether the bundle can turn text into tokens."""
    hub.copy_companions(source.folder, bundle, text_folder=source.text_folder)
    if (bundle / TOKENIZER_FILE).is_file():
        return True
    logger.warning("%s has no tokenizer.json: the bundle takes and gives token ids, not text", source.origin)
    return False


def make_manifest(
    opened: Opened, integers: Integers, backends: dict[str, BackendEntry[Any]], bundle: Path, *, has_tokenizer: bool
) -> Manifest:
    """The manifest of a bundle whose files are all written, not verified yet."""
    config, recipe, target = opened.source.config, opened.recipe, opened.target
    made = {
        **recipe.to_json(),
        "parts": parts(integers.quantized, recipe.float_bits),
        "calibration": dict(integers.learnt),
    }
    manifest = Manifest(
        model=ModelEntry(
            opened.name,
            config.architecture,
            opened.source.num_parameters,
            integers.lora,
            opened.source.vocabulary,
        ),
        config=typed_config(config.to_json()),
        recipe=convert(made, RecipeEntry),
        target=TargetEntry(target.name, target.ram_bytes, target.threads),
        backends=backends,
        files=list_files(bundle),
        tokenizer=has_tokenizer,
        tools=tool_versions(),
        verification={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return with_identities(manifest)


def tool_versions() -> dict[str, str]:
    """Versions of the tools that made a bundle, as far as they are installed."""
    versions = {"gemma-edge": gemma_edge.__version__}
    for tool in TOOLS:
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def parts(quantized: QuantizedCheckpoint, float_bits: int) -> list[dict[str, Any]]:
    """What the weights became: one row for each kind of weight, bits and group size."""
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for name, (out_features, in_features) in weight_shapes(quantized.config).items():
        config = quantized.configs[name]
        bits = config.bits if config else float_bits
        group = config.group_size if config else 0
        kind = name.split(".", 3)[-1] if ".layers." in name else name.removeprefix("model.")
        weights = out_features * in_features
        row = rows.setdefault(
            (kind, bits, group), {"part": kind, "bits": bits, "group_size": group, "count": 0, "weights": 0, "bytes": 0}
        )
        row["count"] += 1
        row["weights"] += weights
        row["bytes"] += config.stored_bytes(out_features, in_features) if config else weights * bits // 8
    return list(rows.values())
