"""Reads the weights of a finished `.tflite` back: those that its signature for answers reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.bundle.manifest import confined
from gemma_edge.bundle.settings import SignatureSettings
from gemma_edge.errors import InputError
from gemma_edge.export.gate.stored import BundleWeights, Matrix, Piece
from gemma_edge.export.tflite.check import TFLite, Use
from gemma_edge.export.tflite.graph import CODES
from gemma_edge.export.tflite.packing import SIGNS
from gemma_edge.export.tflite.seams import DECODE
from gemma_edge.model.checkpoint import FINAL_NORM, HEAD_NORMS, weight_shapes
from gemma_edge.model.config import GemmaConfig

BITS = {kind: bits for bits, kind in CODES.items()}


def stored_weights(bundle: Path, settings: SignatureSettings, config: ModelConfig) -> BundleWeights:
    """The weights of a bundle's model.

    Raises:
        InputError: the file has not every weight of the model.
    """
    file, full = TFLite(confined(bundle, settings.program)), GemmaConfig(**vars(config))
    subgraph, shapes = file.subgraph(DECODE), weight_shapes(full)
    uses = {use.weight.name.decode(): use for use in file.uses(subgraph)}
    names, factors = _norms_in_order(full), list(_factors(file, subgraph))
    if missing := shapes.keys() - uses.keys() or (len(names) != len(factors) and {FINAL_NORM}):
        raise InputError(f"{file.path} has no weight {sorted(missing)[0]}; export the bundle again")
    matrices = {name: _matrix(file, uses[name], shape) for name, shape in shapes.items()}
    return BundleWeights(bundle, config, matrices, dict(zip(names, factors, strict=True)))


def _matrix(file: TFLite, use: Use, shape: tuple[int, int]) -> Matrix:
    bits, offset = BITS.get(use.weight.type), file.model.buffers[use.weight.buffer].offset
    if bits is None:
        return Matrix(Piece(file.path, offset, torch.float32, shape))
    codes = Piece(file.path, offset, torch.uint8, (shape[0], shape[1] * bits // 8))
    return Matrix(codes, _scales(file, use, shape[0]), bits, SIGNS[bits])


def _scales(file: TFLite, use: Use, rows: int) -> Callable[[int, int], Tensor]:
    if use.scales is None:
        values = np.asarray(use.weight.quantization.scale, np.float32)
    else:
        blocks = use.weight.quantization.detailsType
        values = np.frombuffer(file.content(use.scales), np.float16 if blocks else np.float32)
    scale = torch.from_numpy(values.astype(np.float32)).view(rows, -1)
    return lambda start, stop: scale[start:stop]


def _norms_in_order(config: GemmaConfig) -> list[str]:
    """Every norm in the order in which the decoder applies them."""
    norms = config.norms
    heads = HEAD_NORMS if config.qk_norm else ()
    inner = [norms.before_attention, *heads, norms.after_attention, norms.before_mlp, norms.after_mlp]
    layers = range(config.num_hidden_layers)
    return [*(f"model.layers.{layer}.{name}.weight" for layer in layers for name in inner if name), FINAL_NORM]


def _factors(file: TFLite, subgraph: object) -> Iterator[NDArray[np.float32]]:
    """What each norm multiplies by: x / root, then that constant."""
    steps = list(subgraph.operators)  # type: ignore[attr-defined]
    products = [step for step in steps if file.name_of(step) == "MUL"]
    for root in (step.outputs[0] for step in steps if file.name_of(step) == "RSQRT"):
        (normed,) = (step.outputs[0] for step in products if root in step.inputs)
        (last,) = (step for step in products if normed in step.inputs)
        (factor,) = (index for index in last.inputs if index != normed)
        yield np.frombuffer(file.content(subgraph.tensors[factor]), np.float32)  # type: ignore[attr-defined]
