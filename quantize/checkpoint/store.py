"""The quantized checkpoint: a Hugging Face folder in compressed-tensors' `pack-quantized` layout, read slice by slice.

transformers and vLLM load the folder. That layout has no place for two things, which lie in files of our own beside it: the
quantized table and a quantized head of its own (TABLE_FILE; transformers and vLLM use the float ones), and the scales of an
int8 KV cache (kv_scales.py). writer.py writes the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma_edge.bundle.codec import shown, typed_value
from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import (
    FLOATS,
    HEAD,
    TABLE,
    TABLES,
    Checkpoint,
    Shards,
    Weights,
    finite,
    open_tensors,
    tensor_names,
    weight_shapes,
)
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.quantized import GROUP_MULTIPLE, QuantConfig, QuantizedTensor
from gemma_edge.quantize.checkpoint.gptq_awq import PackedCheckpoint
from gemma_edge.quantize.checkpoint.kv_scales import read_kv_scales
from gemma_edge.quantize.checkpoint.packing import unpack
from gemma_edge.quantize.recipe import Recipe, recipe_name
from gemma_edge.reading import present, read_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

TABLE_FILE = "gemma_edge_table.safetensors"
# PARTS: tensors of one matrix, as compressed-tensors names them. The last two are refused by `_config_of`, by name.
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


class QuantizedCheckpoint(Weights):
    """A folder whose matrices are integers, or float where its recipe left them float."""

    is_quantized = True

    def __init__(self, folder: Path, config: GemmaConfig, shards: Shards) -> None:
        table = folder / TABLE_FILE
        self._table = Shards(folder, [table]) if present(table) else shards
        # a head that only our own file has: to other programs the model is tied
        self.split_table = config.tie_word_embeddings and f"{HEAD}.weight_packed" in self._table
        super().__init__(folder, replace(config, tie_word_embeddings=False) if self.split_table else config, shards)
        config = self.config
        self._shapes = weight_shapes(config)
        self.configs = {name: self._config_of(name) for name in self._shapes}
        self.kv_scales = read_kv_scales(folder, config)

    @classmethod
    def open(cls, folder: Path) -> QuantizedCheckpoint:
        """Check the folder's layout, tensors and shapes. Reads headers only, and the KV scales.

        Raises:
            InputError: another quantization format, or a missing or misshapen tensor.
        """
        quantization = quantization_of(folder)
        if quantization is not None:
            _refuse_other_formats(folder, quantization)
        config, shards, _ = open_tensors(folder, codes="weight_packed")
        shards.refuse_others(tensor_names(config, PARTS), config.hf_class)
        return cls(folder, config, shards)

    def files(self) -> list[Path]:
        """Every file that the weights are read from."""
        return sorted({*self._shards.files(), *self._table.files()})

    def _holder(self, weight: str) -> Shards:
        return self._table if f"{weight}.weight_packed" in self._table else self._shards

    def _config_of(self, weight: str) -> QuantConfig | None:
        holder, (rows, columns) = self._holder(weight), self._shapes[weight]
        if f"{weight}.weight_packed" not in holder:
            self._shards.expect(f"{weight}.weight", (rows, columns))
            return None
        for extra in ("weight_zero_point", "weight_g_idx"):
            if f"{weight}.{extra}" in holder:
                raise InputError(f"{self.folder}: {weight} has a {extra}; only symmetric, ordered groups are supported")
        (packed, packed_type), (scale, scale_type) = (
            holder.header(f"{weight}.{part}") for part in ("weight_packed", "weight_scale")
        )
        if packed_type != "I32" or scale_type not in FLOATS or len(packed) != 2:
            raise InputError(
                f"{self.folder}: {weight} has codes {list(packed)} of {packed_type} and scales of {scale_type};"
                f" supported: two axes of I32, and {', '.join(FLOATS)}"
            )
        bits = packed[1] * 32 // columns
        groups = scale[1] if len(scale) == 2 else 1
        if bits not in (4, 8) or packed != (rows, -(-columns * bits // 32)) or scale[0] != rows or columns % groups:
            raise InputError(
                f"{self.folder}: {weight} has packed shape {list(packed)} and scales {list(scale)};"
                f" a weight of {[rows, columns]} needs 4 or 8 bits and whole groups"
            )
        try:
            return QuantConfig(bits, 0 if groups == 1 else columns // groups)
        except InputError:
            raise InputError(
                f"{self.folder}: {weight} has groups of {columns // groups}, not a multiple of {GROUP_MULTIPLE};"
                " pass the original float folder"
            ) from None

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of a quantized matrix, its integers as stored."""
        config = self.configs[weight]
        assert config is not None, f"{weight} is not quantized"
        packed = self._holder(weight).rows(f"{weight}.weight_packed", start, stop)
        codes = unpack(packed, config.bits, self._shapes[weight][1])
        return QuantizedTensor(codes, self.scale(weight, start, stop), config)

    def scale(self, weight: str, start: int, stop: int) -> Tensor:
        """The scales of some rows of a quantized matrix: (rows, groups), in the type in which they are stored."""
        scale = self._holder(weight).rows(f"{weight}.weight_scale", start, stop).reshape(stop - start, -1)
        finite(scale.float(), f"{weight}.weight_scale", self.folder)
        return scale

    def packed_bytes(self, weight: str, start: int, stop: int) -> Tensor:
        """The codes of some rows, packed as `packing.pack_bytes` packs them: (rows, in * bits / 8) uint8."""
        config = self.configs[weight]
        assert config is not None, f"{weight} is not quantized"
        words = self._holder(weight).rows(f"{weight}.weight_packed", start, stop)
        return words.contiguous().view(torch.uint8)[:, : self._shapes[weight][1] * config.bits // 8]

    def scale_dtype(self, weight: str) -> torch.dtype:
        """The type in which a quantized matrix's scales are stored."""
        return FLOATS[self._holder(weight).header(f"{weight}.weight_scale")[1]]

    def check_scales(self, weights: Iterable[str], dtype: torch.dtype, backend: str) -> None:
        """Check that a backend whose kernels take positive scales only can hold those of some weights.

        Args:
            weights: quantized matrices.
            dtype: the type in which the backend stores their scales. A warning says if it has fewer digits than this folder's.
            backend: its name.

        Raises:
            InputError: a scale is zero or below, or becomes zero in `dtype`.
        """
        coarser = []
        for weight in weights:
            if not (self.scale(weight, 0, self._shapes[weight][0]).to(dtype) > 0).all():
                raise InputError(
                    f"{self.folder}: {weight} has scales that are not above zero, which the {backend} backend's kernels do not"
                    " take; use `backend` onnx, or pass the original float folder",
                    field="backend",
                    value=backend,
                )
            if torch.finfo(self.scale_dtype(weight)).eps < torch.finfo(dtype).eps:
                coarser.append(weight)
        if coarser:
            logger.warning(
                "%s stores such scales in %s: those of %d weights of %s are %s and are rounded (by %.2f %% at most);"
                " the onnx backend keeps them",
                backend,
                str(dtype).removeprefix("torch."),
                len(coarser),
                self.folder,
                str(self.scale_dtype(coarser[0])).removeprefix("torch."),
                50 * torch.finfo(dtype).eps,
            )

    def dtype(self, weight: str) -> torch.dtype:
        """The type in which a matrix is stored in float; float32, which holds every product with a scale, if it is not."""
        name = f"{weight}.weight"
        return FLOATS[self._shards.header(name)[1]] if name in self._shards else torch.float32

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows as float32: code * scale, or the float weight itself."""
        if self.configs[weight] is not None:
            return self.quantized(weight, start, stop).dequantize()
        return self.plain_rows(weight, start, stop)

    def plain_rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows as float32: as stored in float, also where integers lie beside that, as for table and head of this project."""
        if f"{weight}.weight" not in self._shards:
            return self.quantized(weight, start, stop).dequantize()
        return self._floats(f"{weight}.weight", start, stop)


@dataclass(frozen=True)
class _Weights:
    """How compressed-tensors stores some weights."""

    symmetric: bool | None = None
    type: str | None = None


@dataclass(frozen=True)
class _Group:
    """A group of weights that are stored alike, and how their activations are quantized."""

    weights: _Weights | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Groups:
    """The part of compressed-tensors' configuration that is read."""

    config_groups: dict[str, _Group] = field(default_factory=dict)


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a folder; None: it is a float folder.

    Raises:
        InputError: there is no config.json, or the value of the key is not an object.
    """
    quantization = read_json(folder / "config.json").get("quantization_config")
    return None if quantization is None else _typed(folder, quantization, dict[str, Any])


def _typed(folder: Path, quantization: Any, kind: type[T]) -> T:
    return typed_value(
        quantization, kind, folder / "config.json", "pass the original float folder", ("quantization_config",)
    )


def _refuse_other_formats(folder: Path, quantization: dict[str, Any]) -> None:
    stored = quantization.get("quant_method"), quantization.get("format")
    if stored != ("compressed-tensors", "pack-quantized"):
        raise InputError(
            f"{folder} is quantized as {shown(stored[0])} / {shown(stored[1])}; supported: compressed-tensors / pack-quantized,"
            " gptq and awq; or pass the original float folder"
        )
    for key in ("transform_config", "kv_cache_scheme"):
        if quantization.get(key):
            raise InputError(
                f"{folder}: its quantization_config has a {key}, which is not computed; pass the original folder"
            )
    for name, group in _typed(folder, quantization, _Groups).config_groups.items():
        weights = group.weights or _Weights()
        if group.input_activations or group.output_activations or not weights.symmetric or weights.type != "int":
            raise InputError(f"{folder}: {name} is not weight-only symmetric integers; pass the original float folder")


def open_weights(folder: Path, *, lora: Path | None = None) -> Weights:
    """Open a float or an already quantized folder.

    Raises:
        InputError: the folder cannot be used, or a LoRA is given for integers.
    """
    quantization = quantization_of(folder)
    if quantization is None:
        return Checkpoint.open(folder, lora=lora)
    if lora:
        raise InputError(
            f"{folder} is already quantized; a LoRA can only be merged into float weights", field="lora", value=lora
        )
    if quantization.get("quant_method") in ("gptq", "awq"):
        return PackedCheckpoint.open(folder, quantization)
    return QuantizedCheckpoint.open(folder)


def is_quantized_folder(folder: Path) -> bool:
    """Whether a folder holds integers: only such a folder may be replaced by another quantized checkpoint."""
    config = folder / "config.json"
    return (folder / TABLE_FILE).is_file() or (
        config.is_file() and read_json(config).get("quantization_config") is not None
    )


def final_configs(source: Weights, recipe: Recipe) -> dict[str, QuantConfig | None]:
    """What every weight will be: integers that are already there stay, the other weights follow the recipe."""
    by_recipe = recipe.configs(weight_shapes(source.config))
    return {name: source.configs[name] or config for name, config in by_recipe.items()}


def named_by_content(source: Weights, recipe: Recipe) -> Recipe:
    """The recipe under the name of what the weights will be: integers that are already there do not follow the recipe."""
    if not source.is_quantized:
        return recipe
    configs = final_configs(source, recipe)
    linears = [config for weight, config in configs.items() if weight not in TABLES]
    head = configs.get(HEAD, configs[TABLE])
    return replace(recipe, name=recipe_name(linears, configs[TABLE], head, recipe.float_bits))
