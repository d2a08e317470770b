"""Traces the decoder into the graphs of a `.tflite`: one signature per chunk size, over one set of weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.export.graph_signature import InputKind

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.signature import PIN, RESET, Signature
from gemma_edge.export.hollow import hollow
from gemma_edge.export.tflite.graph import Model, Subgraph
from gemma_edge.export.tflite.operators import Lowering, Variable, Weight
from gemma_edge.export.tflite.packing import Packing
from gemma_edge.export.tflite.seams import HELD, Pin, Step, states
from gemma_edge.model.gemma import Gemma, inverse_frequencies
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint

States = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # by name: shape and type
MODULE = "decoder."  # prefix of the decoder's names inside a traced signature


def build_model(
    checkpoint: QuantizedCheckpoint,
    geometry: CacheGeometry,
    packing: Packing,
    signatures: Sequence[Signature],
    *,
    variables: bool,
) -> Model:
    """The graphs of every signature, their weights still missing.

    Args:
        checkpoint, geometry: the model, and the geometry of its caches.
        packing: how weights will lie in the file.
        signatures: what the model can compute.
        variables: caches are variables made by `reset`; False: inputs that come back as outputs.
    """
    model = Model(packing.stored_weights(checkpoint))
    with torch.device("meta"):
        decoder = Gemma(checkpoint.config).eval()
    decoder.load_state_dict({name: hollow(value) for name, value in decoder.state_dict().items()}, assign=True)
    past = states(geometry, fours=packing.held_in_fours)
    for signature in signatures:
        program = trace(decoder, geometry, signature, past)
        add_signature(model, signature.name, program, checkpoint, past if variables else {})
    if variables:
        add_reset(model, past)
        if geometry.pinned:
            held = {name: _hollow_of(*like) for name, like in past.items() if name.startswith(HELD)}
            program = _traced(Pin(geometry), (torch.zeros(1, dtype=torch.int32), held))
            add_signature(model, PIN, program, checkpoint, past)
    return model


def trace(decoder: Gemma, geometry: CacheGeometry, signature: Signature, past: States) -> ExportedProgram:
    """One signature's graph, without weights. `past`: of `states`."""
    caches = {name: _hollow_of(*like) for name, like in past.items()}
    tokens = signature.tokens
    inputs = torch.zeros(1, tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32), caches
    return _traced(Step(decoder, geometry, signature.role, longest=signature.longest), inputs)


def _traced(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(module, inputs, strict=False)


def _hollow_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return hollow(torch.empty(shape, dtype=dtype))


def add_signature(
    model: Model, name: str, program: ExportedProgram, checkpoint: QuantizedCheckpoint, variables: Mapping[str, Any]
) -> None:
    """Lower a traced graph into the model. `variables`: names of the states that are not inputs and outputs."""
    graph = Subgraph(model, name)
    lowering = Lowering(graph)
    inputs = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    needed = _needed(program)
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    outputs = dict(zip(output.args[0], _output_names(program), strict=True))
    assert len(outputs) == len(output.args[0]), "every output is computed by a node of its own"
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                meta = node.meta["val"]
                label = node.name.removeprefix("past_")
                if label in variables:
                    lowering.known[node] = Variable(label)
                else:
                    lowering.known[node] = inputs[label] = graph.tensor(tuple(meta.shape), meta.dtype, label)
            else:
                lowering.known[node] = _parameter(str(spec.target).removeprefix(MODULE), checkpoint)
        elif node.op == "call_function" and node in needed:
            lowering.run(node)
            if (label := outputs.get(node, "")) in variables:
                graph.assign(label, lowering.value(node))
    results = {label: lowering.value(node) for node, label in outputs.items() if label not in variables}
    graph.finish(inputs, results)


def add_reset(model: Model, variables: States) -> None:
    """The signature that makes the variables: all zeros."""
    graph = Subgraph(model, RESET)
    for label, (shape, dtype) in variables.items():
        size = graph.constant(np.array(shape, np.int32))
        zeros = graph.tensor(shape, dtype)
        zero = graph.constant(np.zeros((), np.float32 if dtype == torch.float32 else np.int32))
        graph.op("FILL", [size, zero], [zeros])
        graph.assign(label, zeros)
    graph.finish({}, {})


def _output_names(program: ExportedProgram) -> list[str]:
    spec = program.call_spec.out_spec
    assert spec is not None
    return [str(key) for key in spec.context]


def _needed(program: ExportedProgram) -> set[torch.fx.Node]:
    """The nodes that an output depends on: of the last layer, a prefill needs keys and values only."""
    needed: set[torch.fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _parameter(name: str, checkpoint: QuantizedCheckpoint) -> Weight | Tensor:
    """What a parameter of the decoder becomes: a weight of the file, or a value."""
    buffers = inverse_frequencies(checkpoint.config)
    buffer = name.rpartition(".")[2]
    if buffer in buffers:
        return buffers[buffer]
    weight = name.removesuffix(".weight")
    return Weight(weight) if weight in checkpoint.configs else checkpoint.vector(name)
