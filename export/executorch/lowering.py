"""Writes a quantized checkpoint as a `.pte` for ExecuTorch's XNNPACK backend and its official LLM runners."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.exir.program import ExecutorchProgramManager
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.executorch.compose import Composed, Embedding
from gemma_edge.export.executorch.kept import kept_template
from gemma_edge.export.executorch.packing import Weight, pieces_of, random_weight
from gemma_edge.export.executorch.pte import write_pte
from gemma_edge.export.executorch.seams import (
    AttendHalf,
    Limits,
    ProjectHalf,
    block_half,
    head_piece,
    linears_of,
    vector_of,
)
from gemma_edge.export.executorch.templates import COMPILE, Called, Lowered, Template
from gemma_edge.logits import scored_at_once
from gemma_edge.model.checkpoint import TABLE
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint

Parts = tuple[Embedding, list[tuple[Called, Called]], list[Called]]  # the table, two delegates a layer, and the head's


def write_program(
    checkpoint: QuantizedCheckpoint,
    cache: CacheGeometry,
    path: Path,
    methods: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    """Write the whole program.

    Args:
        checkpoint, cache, progress: as of `Backend.lower`.
        path: the file.
        methods: `generate` and `score` -> the method's name.

    Raises:
        RuntimeError: a half became something else than one delegate.
    """
    with _quiet():
        write_pte(compose(checkpoint, cache, methods), checkpoint, path, progress)


def compose(
    checkpoint: QuantizedCheckpoint, geometry: CacheGeometry, methods: Mapping[str, str], parts: Parts | None = None
) -> ExecutorchProgramManager:
    """The whole program. With `parts` it is complete; else it is XNNPACK's, its large constants still missing."""
    config = checkpoint.config
    embedding, layers, head = parts or _parts(checkpoint, geometry)
    # memory is planned for the largest call, and a process takes what the larger method needs
    at_once = {"generate": geometry.prefill_chunk, "score": scored_at_once(geometry.prefill_chunk, config.vocab_size)}
    programs = {
        name: _trace(Composed(config, geometry, embedding, layers, head, every_position=role == "score"), at_once[role])
        for role, name in methods.items()
    }
    edge = to_edge_transform_and_lower(
        programs, partitioner=None, constant_methods=runner_contract(config, geometry), compile_config=COMPILE
    )
    return finish(edge)


def finish(edge: EdgeProgramManager) -> ExecutorchProgramManager:
    """The program with its memory planned, its inputs left to the caller."""
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            emit_mutable_buffer_names=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )


def runner_contract(config: GemmaConfig, geometry: CacheGeometry) -> dict[str, Any]:
    """What the official LLM runners read from a program. Source: executorch, extension/llm/runner/llm_runner_helper.cpp."""
    return {
        "get_bos_id": config.bos_token_id,
        "get_eos_ids": list(config.eos_token_id),
        "get_max_seq_len": geometry.prefill_chunk,  # tokens in the largest call
        "get_max_context_len": geometry.context,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_hidden_layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,  # else a prompt is fed token by token
    }


def _parts(checkpoint: QuantizedCheckpoint, geometry: CacheGeometry) -> Parts:
    """XNNPACK's, each kind lowered once."""
    config, configs = checkpoint.config, checkpoint.configs
    generator = torch.Generator().manual_seed(0)
    templates: dict[Any, Template] = {}

    def weight(name: str, rows: int, columns: int) -> Weight:
        return random_weight(configs[name], rows, columns, generator)

    def lowered(kind: type[ProjectHalf] | type[AttendHalf], layer: int) -> Template:
        integers = tuple(configs[name] for name in linears_of(kind, config, layer))
        limits = Limits(geometry.prefill_chunk, geometry.layers[layer].slots if kind is AttendHalf else 0)
        key = (kind, integers, limits)
        if key not in templates:
            templates[key] = kept_template(partial(block_half, kind, config, layer), weight, limits, (config, *key))
        return templates[key]

    def vector(name: str) -> Tensor:
        return vector_of(name, checkpoint.vector)

    def named(template: Template, layer: int) -> Lowered:
        return Lowered(template, f"model.layers.{layer}.", vector)

    layers: list[tuple[Called, Called]] = [
        (named(lowered(ProjectHalf, layer), layer), named(lowered(AttendHalf, layer), layer))
        for layer in range(config.num_hidden_layers)
    ]
    limits = Limits(geometry.prefill_chunk, 0)
    piece = kept_template(partial(head_piece, config), weight, limits, (config, configs[config.head], limits))
    count = pieces_of(config.head, (config.vocab_size, config.hidden_size))
    embedding = Embedding(config.hidden_size, configs[TABLE])
    return embedding, layers, [Lowered(piece, "", checkpoint.vector, piece=index) for index in range(count)]


def _trace(composed: Composed, at_once: int) -> ExportedProgram:
    tokens = Dim("tokens", min=1, max=at_once)
    inputs = torch.zeros(1, min(3, at_once), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        return export(composed.eval(), inputs, dynamic_shapes=({1: tokens}, None), strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' own messages, which are for authors of backends."""
    noisy = [logging.getLogger(name) for name in ("root", "executorch", "torch.export", "torchao")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
