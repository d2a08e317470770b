"""The quantized checkpoint: a Hugging Face folder in compressed-tensors' `pack-quantized` layout, written and read by slices.

transformers and vLLM load the folder. What that layout cannot say lies in files of ours beside it, where they do not look: a
quantized tied table (TABLE_FILE; they use the plain one), and the scales of an int8 KV cache (kv_scales.py).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import (
    FINAL_NORM,
    FLOATS,
    NORMS,
    TABLE,
    Checkpoint,
    Shards,
    Weights,
    expect_tied,
    finite,
    linear_shapes,
    norm_names,
    row_slices,
    weight_shapes,
)
from gemma_edge.model.config import Gemma2Config, read_json
from gemma_edge.model.hub import copy_companions
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.quantize.checkpoint.kv_scales import KVScales, read_kv_scales, write_kv_scales
from gemma_edge.quantize.checkpoint.packing import pack, unpack
from gemma_edge.quantize.checkpoint.safetensors_writer import Spec, write_safetensors
from gemma_edge.quantize.integers import QuantizedTensor, quantize
from gemma_edge.quantize.recipe import GROUP_MULTIPLE, QuantConfig, Recipe, recipe_name

logger = logging.getLogger(__name__)

TABLE_FILE = "gemma_edge_table.safetensors"


class QuantizedCheckpoint(Weights):
    """A folder whose matrices are integers (or float, where the recipe left them); as `Weights` it is dequantized."""

    def __init__(self, folder: Path, config: Gemma2Config, shards: Shards) -> None:
        super().__init__(folder, config)
        self._shards = shards
        table = folder / TABLE_FILE
        self._table = Shards(folder, [table]) if table.is_file() else shards
        self._shapes = weight_shapes(config)
        self.configs = {name: self._config_of(name) for name in self._shapes}
        self.kv_scales = read_kv_scales(folder, config)  # None: not calibrated

    @classmethod
    def open(cls, folder: Path) -> QuantizedCheckpoint:
        """Check the folder's layout, tensors and shapes. Reads headers only, and the KV scales.

        Raises:
            InputError: another quantization format, or a missing or misshapen tensor.
        """
        quantization = read_json(folder / "config.json").get("quantization_config")
        if quantization is not None:
            _refuse_other_formats(folder, quantization)
        config = Gemma2Config.from_hf(folder)
        shards = Shards(folder)
        for name in norm_names(config):
            shards.expect(name, (config.hidden_size,))
        expect_tied(shards, weight_shapes(config)[TABLE])
        return cls(folder, config, shards)

    def _holder(self, weight: str) -> Shards:
        return self._table if weight == TABLE else self._shards

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
        """The scales alone of rows of a quantized matrix: (rows, groups), in the type in which they are stored."""
        scale = self._holder(weight).rows(f"{weight}.weight_scale", start, stop).reshape(stop - start, -1)
        finite(scale.float(), f"{weight}.weight_scale", self.folder)
        return scale

    def packed_bytes(self, weight: str, start: int, stop: int) -> Tensor:
        """The codes alone, as `packing.pack_bytes` would pack them, but without unpacking: (rows, in * bits / 8) uint8."""
        config = self.configs[weight]
        assert config is not None, f"{weight} is not quantized"
        words = self._holder(weight).rows(f"{weight}.weight_packed", start, stop)
        return words.contiguous().view(torch.uint8)[:, : self._shapes[weight][1] * config.bits // 8]

    def scale_dtype(self, weight: str) -> torch.dtype:
        """Type in which a quantized matrix's scales are stored."""
        return FLOATS[self._holder(weight).header(f"{weight}.weight_scale")[1]]

    def warn_of_rounded_scales(self, weights: Iterable[str], dtype: torch.dtype, backend: str) -> None:
        """Say so where a backend stores the scales of some weights in a type that has fewer digits than this folder's."""
        coarser = [w for w in weights if torch.finfo(self.scale_dtype(w)).eps < torch.finfo(dtype).eps]
        if coarser:
            logger.warning(
                "%s stores such scales in %s: those of %d weights of %s are %s and are rounded (by %.2f %% at most);"
                " --backend onnx keeps them",
                backend,
                str(dtype).removeprefix("torch."),
                len(coarser),
                self.folder,
                str(self.scale_dtype(coarser[0])).removeprefix("torch."),
                50 * torch.finfo(dtype).eps,
            )

    def dtype(self, weight: str) -> torch.dtype:
        """Type in which a float matrix is stored."""
        return FLOATS[self._shards.header(f"{weight}.weight")[1]]

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows as float32: code * scale, or the float weight itself."""
        if self.configs[weight] is not None:
            return self.quantized(weight, start, stop).dequantize()
        return self.plain_rows(weight, start, stop)

    def plain_rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix that is stored plainly, also of a table that has a quantized form beside it."""
        return finite(self._shards.rows(f"{weight}.weight", start, stop).float(), f"{weight}.weight", self.folder)

    def vector(self, name: str) -> Tensor:
        """A norm's weight as float32."""
        return finite(self._shards.rows(name).float(), name, self.folder)


def _refuse_other_formats(folder: Path, quantization: dict[str, Any]) -> None:
    found = quantization.get("quant_method"), quantization.get("format")
    if found != ("compressed-tensors", "pack-quantized"):
        raise InputError(
            f"{folder} is quantized as {found[0]} / {found[1]}; supported: compressed-tensors / pack-quantized,"
            " or pass the original float folder"
        )
    for key in ("transform_config", "kv_cache_scheme"):
        if quantization.get(key):
            raise InputError(
                f"{folder}: its quantization_config has a {key}, which is not computed; pass the original folder"
            )
    for name, group in quantization.get("config_groups", {}).items():
        weights = group.get("weights") or {}
        if (
            group.get("input_activations")
            or group.get("output_activations")
            or not weights.get("symmetric")
            or weights.get("type") != "int"
        ):
            raise InputError(f"{folder}: {name} is not weight-only symmetric integers; pass the original float folder")


def open_weights(folder: Path, *, lora: Path | None = None) -> Checkpoint | QuantizedCheckpoint:
    """Open a float or an already quantized folder.

    Raises:
        InputError: the folder cannot be used, or a LoRA is given for integers.
    """
    if "quantization_config" not in read_json(folder / "config.json"):
        return Checkpoint.open(folder, lora=lora)
    if lora:
        raise InputError(f"{folder} is already quantized; a LoRA can only be merged into float weights")
    return QuantizedCheckpoint.open(folder)


def final_configs(source: Checkpoint | QuantizedCheckpoint, recipe: Recipe) -> dict[str, QuantConfig | None]:
    """What every weight will be: integers that are there already stay, the rest follows the recipe."""
    given = source.configs if isinstance(source, QuantizedCheckpoint) else {}
    wanted = recipe.configs(weight_shapes(source.config))
    return {name: given.get(name) or config for name, config in wanted.items()}


def named_by_content(source: Checkpoint | QuantizedCheckpoint, recipe: Recipe) -> Recipe:
    """The recipe, under the name of what the weights will be: integers that are there already are not the recipe's."""
    if not isinstance(source, QuantizedCheckpoint):
        return recipe
    configs = final_configs(source, recipe)
    table = configs.pop(TABLE)
    return replace(recipe, name=recipe_name(configs.values(), table, recipe.float_bits))


def write_quantized(
    source: Checkpoint | QuantizedCheckpoint,
    recipe: Recipe,
    out: Path,
    progress: Callable[[int], None] = lambda done: None,
    *,
    layers: Callable[[int], Path] | None = None,
    kv_scales: KVScales | None = None,
) -> QuantizedCheckpoint:
    """Quantize a checkpoint slice by slice into a new folder, one shard per layer.

    Args:
        source: float weights, or integers, which are kept bit for bit.
        recipe: what each float weight becomes.
        out: an empty or new folder.
        progress: called with the number of weights just finished.
        layers: finished shards of the layers, from layerwise.py; None: they are made here, without data.
        kv_scales: of an int8 KV cache; None takes those that the source has.
    """
    out.mkdir(parents=True, exist_ok=True)
    config, configs = source.config, final_configs(source, recipe)
    names = shard_names(config)
    # the table counts once: here where it stays float, else when its integers are made
    counted = progress if configs[TABLE] is None else lambda done: None
    # written float even where ours is quantized: see the header
    table = [_float_spec(source, TABLE, recipe.float_bits, counted), _norm_spec(source, FINAL_NORM)]
    write_safetensors(out / names[0], table)
    for layer, name in enumerate(names[1:]):
        if layers is not None:
            shutil.copyfile(layers(layer), out / name)
            progress(sum(rows * columns for rows, columns in linear_shapes(config, layer).values()))
        else:
            write_safetensors(out / name, list(_layer_shard(source, recipe, configs, layer, progress)))
    if configs[TABLE] is not None:
        write_safetensors(out / TABLE_FILE, list(_integer_specs(source, recipe, TABLE, configs, progress)))
    if kv_scales is None and isinstance(source, QuantizedCheckpoint):
        kv_scales = source.kv_scales
    if kv_scales is not None:
        write_kv_scales(out, kv_scales)
    index = {tensor: name for name in names for tensor in SafetensorsFile(out / name).tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    copy_companions(source.folder, out)
    raw = read_json(source.folder / "config.json")
    raw.pop("quantization_config", None)
    if any(configs[name] for name in configs if name != TABLE):
        raw["quantization_config"] = quantization_config(configs)
    (out / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    return QuantizedCheckpoint.open(out)


def shard_names(config: Gemma2Config) -> list[str]:
    """The checkpoint's files: the table and the final norm, then a layer each."""
    count = config.num_hidden_layers + 1
    return [f"model-{shard + 1:05d}-of-{count:05d}.safetensors" for shard in range(count)]


def quantization_config(configs: dict[str, QuantConfig | None]) -> dict[str, Any]:
    """compressed-tensors' description of the linears, one group per distinct configuration."""
    groups: dict[QuantConfig, list[str]] = {}
    for name, config in configs.items():
        if config is not None and name != TABLE:
            groups.setdefault(config, []).append(name)
    plain = [name for name, config in configs.items() if config is None and name != TABLE]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 and not plain else names,
                "weights": _scheme(config),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for i, (config, names) in enumerate(groups.items())
        },
        "ignore": ["lm_head", *plain],
    }


def _scheme(config: QuantConfig) -> dict[str, Any]:
    strategy = "group" if config.group_size else "channel"
    group_size = config.group_size or None
    return {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": config.symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
    }


def _layer_shard(
    source: Checkpoint | QuantizedCheckpoint,
    recipe: Recipe,
    configs: dict[str, QuantConfig | None],
    layer: int,
    progress: Callable[[int], None],
) -> Iterator[Spec]:
    for weight in linear_shapes(source.config, layer):
        if configs[weight] is None:
            yield _float_spec(source, weight, recipe.float_bits, progress)
        else:
            yield from _integer_specs(source, recipe, weight, configs, progress)
    for norm in NORMS:
        yield _norm_spec(source, f"model.layers.{layer}.{norm}.weight")


def _norm_spec(source: Checkpoint | QuantizedCheckpoint, name: str) -> Spec:
    return plain_spec(name, source.vector(name))


def plain_spec(name: str, values: Tensor) -> Spec:
    """A tensor that is in memory already."""
    return Spec(name, values.dtype, tuple(values.shape), lambda: iter([values]))


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type in which a float matrix is kept when 16 bits are asked for: its own; of float32 that with its range."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def float_type(source: Checkpoint | QuantizedCheckpoint, weight: str, float_bits: int) -> torch.dtype:
    """The type in which a matrix that stays float is kept in the checkpoint: its own, unless 16 bits ask for less."""
    dtype = source.dtype(weight)
    return narrow(dtype) if float_bits == 16 else dtype


def _float_spec(
    source: Checkpoint | QuantizedCheckpoint,
    weight: str,
    float_bits: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Spec:
    """A plain matrix in its stored type."""
    shape, dtype = weight_shapes(source.config)[weight], float_type(source, weight, float_bits)
    read = source.plain_rows if isinstance(source, QuantizedCheckpoint) else source.rows

    def data() -> Iterator[Tensor]:
        for start, stop in row_slices(shape):
            yield read(weight, start, stop).to(dtype)
            progress((stop - start) * shape[1])

    return Spec(f"{weight}.weight", dtype, shape, data)


def _integer_specs(
    source: Checkpoint | QuantizedCheckpoint,
    recipe: Recipe,
    weight: str,
    configs: dict[str, QuantConfig | None],
    progress: Callable[[int], None],
) -> list[Spec]:
    """One matrix, slice by slice: integers that are there already, or made without data."""
    shape, config = weight_shapes(source.config)[weight], configs[weight]
    assert config is not None
    given = source if isinstance(source, QuantizedCheckpoint) and source.configs[weight] is not None else None

    def parts() -> Iterator[QuantizedTensor]:
        for start, stop in row_slices(shape):
            if given is not None:
                yield given.quantized(weight, start, stop)
            else:
                yield quantize(source.rows(weight, start, stop), config, recipe.rule_for(weight).method)
            progress((stop - start) * shape[1])

    return integer_specs(weight, shape, config, parts, given.scale_dtype(weight) if given else torch.bfloat16)


def integer_specs(
    weight: str,
    shape: tuple[int, int],
    config: QuantConfig,
    parts: Callable[[], Iterator[QuantizedTensor]],
    scale_dtype: torch.dtype = torch.bfloat16,
) -> list[Spec]:
    """Packed codes, scales and shape of one matrix (out, in), which comes in consecutive slices of rows.

    The scales are kept until their turn comes, in one piece: a small tensor per slice, alive among large ones that come and go,
    would fragment the heap.
    """
    groups = shape[1] // config.group_size if config.group_size else 1
    scale = torch.empty(shape[0], groups, dtype=scale_dtype)

    def packed() -> Iterator[Tensor]:
        start = 0
        for part in parts():
            scale[start : start + len(part.scale)] = part.scale
            start += len(part.scale)
            yield pack(part.codes, config.bits)

    return [
        Spec(f"{weight}.weight_packed", torch.int32, (shape[0], -(-shape[1] * config.bits // 32)), packed),
        Spec(f"{weight}.weight_scale", scale_dtype, (shape[0], groups), lambda: iter([scale])),
        plain_spec(f"{weight}.weight_shape", torch.tensor(shape)),
    ]
