"""Writes and checks an ONNX Runtime bundle's files. They run on ONNX Runtime 1.29 and later."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.onnx import graph, plain
from gemma_edge.export.onnx.check import check_graph
from gemma_edge.export.onnx.plain_check import check_static_graph
from gemma_edge.export.onnx.weights import Blob, write_weights
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import Layers
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint

WEIGHTS = "model.onnx.data"
GRAPHS = {"generate": "generate.onnx", "score": "score.onnx", "genai": "genai.onnx"}
FILES = {**GRAPHS, "weights": WEIGHTS}
STATIC_FILES = {**{role: f"{role}.onnx" for role in plain.ROLES}, "weights": WEIGHTS}


def write_files(
    checkpoint: QuantizedCheckpoint,
    cache: CacheGeometry,
    out: Path,
    blobs: list[Blob],
    layers: Layers,
    progress: Callable[[int], None],
) -> None:
    """Write graphs, weights and genai's configuration into `out`.

    Args:
        checkpoint, cache, out, progress: as of `Backend.lower`.
        blobs: layout of the weights file.
        layers: what the graphs' linears and embedding become.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    config = checkpoint.config
    generate = graph.trace(config, cache, layers)
    graph.attach_weights(generate, blobs, WEIGHTS)
    write_weights(checkpoint, blobs, out / WEIGHTS, progress)
    models = {
        "generate": generate,
        "score": graph.score_graph(generate),
        "genai": graph.genai_graph(generate, config),
    }
    for role, model in models.items():
        graph.save(model, out / FILES[role])
    text = json.dumps(genai_config(config, cache), indent=1)
    (out / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def write_static_files(
    checkpoint: QuantizedCheckpoint,
    cache: CacheGeometry,
    out: Path,
    blobs: list[Blob],
    layers: Layers,
    progress: Callable[[int], None],
) -> None:
    """Write the graphs of plain.py and the weights into `out`; arguments as of `write_files`."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    config = checkpoint.config
    write_weights(checkpoint, blobs, out / WEIGHTS, progress)
    for role, held in plain.weights_of(config, blobs).items():
        model = plain.trace_role(role, config, cache, layers)
        graph.attach_weights(model, held, WEIGHTS)
        graph.save(model, out / STATIC_FILES[role])


def check_static_files(checkpoint: QuantizedCheckpoint, cache: CacheGeometry, out: Path, blobs: list[Blob]) -> None:
    """Compare the graphs in `out` with the model; raises what check.py raises."""
    for role, held in plain.weights_of(checkpoint.config, blobs).items():
        check_static_graph(out / STATIC_FILES[role], role, checkpoint.config, checkpoint.configs, cache, held)


def check_files(checkpoint: QuantizedCheckpoint, cache: CacheGeometry, out: Path, blobs: list[Blob]) -> None:
    """Compare the graphs in `out` with the model; raises what check.py raises."""
    for role in GRAPHS:
        path = out / FILES[role]
        check_graph(path, checkpoint.config, checkpoint.configs, cache, blobs, windowed=role != "genai")


def genai_config(config: GemmaConfig, geometry: CacheGeometry) -> dict[str, Any]:
    """onnxruntime-genai's `genai_config.json` for genai.onnx. Source: its builders/base.py, `make_genai_config`."""
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": FILES["genai"],
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    return {
        "model": {
            "bos_token_id": config.bos_token_id,
            "context_length": geometry.context,
            "decoder": decoder,
            "eos_token_id": list(config.eos_token_id),
            "pad_token_id": 0,
            "type": config.architecture,
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": geometry.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
