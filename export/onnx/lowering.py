"""Writes and checks an ONNX Runtime bundle's files. They run on ONNX Runtime 1.29 and later."""

from __future__ import annotations

import json
import logging
from typing import Any

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.backend import LoweringTask
from gemma_edge.export.onnx import graph, plain
from gemma_edge.export.onnx.check import check_graph
from gemma_edge.export.onnx.plain_check import check_static_graph
from gemma_edge.export.onnx.weights import Blob, write_weights
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import Layers

WEIGHTS = "model.onnx.data"
GRAPHS = {"generate": "generate.onnx", "score": "score.onnx", "genai": "genai.onnx"}
FILES = {**GRAPHS, "weights": WEIGHTS}
STATIC_FILES = {**{role: f"{role}.onnx" for role in plain.ROLES}, "weights": WEIGHTS}


def write_files(task: LoweringTask, blobs: list[Blob], layers: Layers) -> dict[str, str | None]:
    """Write graphs, weights and genai's configuration into `task.out`.

    Args:
        task: of `Backend.lower`.
        blobs: layout of the weights file.
        layers: what the graphs' linears and embedding become.

    Returns:
        the names of the files, by role.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    config, cache, out = task.checkpoint.config, task.cache, task.out
    generate = graph.trace(config, cache, layers)
    graph.attach_weights(generate, blobs, WEIGHTS)
    write_weights(task.checkpoint, blobs, out / WEIGHTS, task.progress)
    models = {
        "generate": generate,
        "score": graph.score_graph(generate),
        "genai": graph.genai_graph(generate, config),
    }
    for role, model in models.items():
        graph.save(model, out / FILES[role])
    text = json.dumps(genai_config(config, cache), indent=1)
    (out / "genai_config.json").write_text(text + "\n", encoding="utf-8")
    return {**FILES}


def write_static_files(task: LoweringTask, blobs: list[Blob], layers: Layers) -> dict[str, str | None]:
    """The same for the graphs of plain.py, of which genai runs none."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    config = task.checkpoint.config
    write_weights(task.checkpoint, blobs, task.out / WEIGHTS, task.progress)
    for role, held in plain.weights_of(config, blobs).items():
        model = plain.trace_role(role, config, task.cache, layers)
        graph.attach_weights(model, held, WEIGHTS)
        graph.save(model, task.out / STATIC_FILES[role])
    return {**STATIC_FILES, "genai": None}


def check_files(task: LoweringTask, blobs: list[Blob]) -> None:
    """Compare the graphs in `task.out` with the model; raises what check.py raises."""
    config, configs = task.checkpoint.config, task.checkpoint.configs
    for role in GRAPHS:
        check_graph(task.out / FILES[role], config, configs, task.cache, blobs, windowed=role != "genai")


def check_static_files(task: LoweringTask, blobs: list[Blob]) -> None:
    """The same for the graphs of plain.py; raises what plain_check.py raises."""
    config, configs = task.checkpoint.config, task.checkpoint.configs
    for role, held in plain.weights_of(config, blobs).items():
        check_static_graph(task.out / STATIC_FILES[role], role, config, configs, task.cache, held)


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
