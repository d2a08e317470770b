"""`lower`: a quantized checkpoint becomes an ONNX Runtime bundle's files. Runs on ONNX Runtime 1.29 and later."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.onnx import graph
from gemma_edge.export.onnx.check import check_graph
from gemma_edge.export.onnx.seams import make_layers
from gemma_edge.export.onnx.weights import blobs_of, float_dtypes, write_weights
from gemma_edge.model.config import Gemma2Config
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint

WEIGHTS = "model.onnx.data"
FILES = {"generate": "generate.onnx", "score": "score.onnx", "genai": "genai.onnx", "weights": WEIGHTS}
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: activations are rounded to int8 per block
FLOAT_ACTIVATIONS = 0


def lower(
    checkpoint: QuantizedCheckpoint,
    geometry: CacheGeometry,
    out: Path,
    *,
    float_bits: int = 32,
    accuracy_level: int = INT8_ACTIVATIONS,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Write graphs, weights and genai's configuration into `out`, and check what the graphs hold.

    Args:
        accuracy_level: of MatMulNBits: INT8_ACTIVATIONS, or FLOAT_ACTIVATIONS (exact, slower).
        progress: called with the bytes of weights just written.

    Returns:
        the backend's entry in the manifest.

    Raises:
        RuntimeError: a graph is not what it should be.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    config, configs = checkpoint.config, checkpoint.configs
    blobs = blobs_of(checkpoint, configs, float_bits, int8_kv=geometry.dtype == "int8")
    layers = make_layers(configs, float_dtypes(checkpoint, configs, float_bits), accuracy_level)
    generate = graph.trace(config, geometry, layers)
    graph.attach_weights(generate, blobs, WEIGHTS)
    write_weights(checkpoint, blobs, out / WEIGHTS, progress)
    models = {
        "generate": generate,
        "score": graph.score_graph(generate),
        "genai": graph.genai_graph(generate, config),
    }
    for role, model in models.items():
        graph.save(model, out / FILES[role])
        check_graph(out / FILES[role], config, configs, geometry, blobs, windowed=role != "genai")
    text = json.dumps(genai_config(config, geometry), indent=1)
    (out / "genai_config.json").write_text(text + "\n", encoding="utf-8")
    return {**FILES, "accuracy_level": accuracy_level, "min_onnxruntime": "1.29"}


def genai_config(config: Gemma2Config, geometry: CacheGeometry) -> dict[str, Any]:
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
            "type": "gemma2",
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
