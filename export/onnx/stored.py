"""Reads the weights of a finished ONNX bundle back: its graph says which bytes of the weights file are which tensor."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.bundle.manifest import confined
from gemma_edge.bundle.settings import OnnxSettings
from gemma_edge.errors import InputError
from gemma_edge.export.gate.stored import BundleWeights, Matrix, Piece
from gemma_edge.model.checkpoint import norm_names, weight_shapes
from gemma_edge.model.config import GemmaConfig

DTYPES = {
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


def stored_weights(bundle: Path, settings: OnnxSettings, config: ModelConfig) -> BundleWeights:
    """The weights of a bundle's `generate` graph.

    Raises:
        InputError: the graph has not every weight of the model.
    """
    path = confined(bundle, settings.generate)
    weights = confined(bundle, settings.weights or settings.generate)
    graphs = [path, *([confined(bundle, settings.feeds)] if settings.feeds else [])]
    pieces = {
        name: Piece(weights, value.const_value.offset or 0, DTYPES[value.const_value.dtype], _shape(value.const_value))
        for each in graphs
        for name, value in ir.load(each).graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    full = GemmaConfig(**vars(config))
    try:
        matrices = {name: _matrix(pieces, name, shape) for name, shape in weight_shapes(full).items()}
        norms = {name: pieces[name].rows().numpy() for name in norm_names(full)}
    except KeyError as error:
        raise InputError(f"{path} has no weight {error}; export the bundle again") from None
    return BundleWeights(bundle, config, matrices, norms)


def _shape(tensor: ir.ExternalTensor) -> tuple[int, ...]:
    return tuple(tensor.shape.numpy())


def _matrix(pieces: dict[str, Piece], weight: str, shape: tuple[int, int]) -> Matrix:
    if f"{weight}.weight_packed" not in pieces:
        return Matrix(pieces[f"{weight}.weight"])
    packed, scale = pieces[f"{weight}.weight_packed"], pieces[f"{weight}.weight_scale"]
    width = int(torch.Size(packed.shape[1:]).numel())
    flat = Piece(packed.path, packed.offset, packed.dtype, (shape[0], width))
    return Matrix(flat, scale.rows, bits=8 * width // shape[1])
