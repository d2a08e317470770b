"""Writes a quantized checkpoint slice by slice, one shard per layer. The layout and its reader are store.py's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_edge.files import write_whole
from gemma_edge.model.checkpoint import (
    FINAL_NORM,
    HEAD,
    TABLE,
    TABLES,
    Weights,
    layer_norms,
    linear_shapes,
    row_slices,
    weight_shapes,
)
from gemma_edge.model.config import GemmaConfig, text_config
from gemma_edge.model.gemma import RMSNorm
from gemma_edge.model.hub import copy_companions
from gemma_edge.model.quantized import QuantConfig, QuantizedTensor
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.quantize.checkpoint.kv_scales import KVScales, write_kv_scales
from gemma_edge.quantize.checkpoint.packing import pack
from gemma_edge.quantize.checkpoint.safetensors_writer import Spec, plain_spec, write_safetensors
from gemma_edge.quantize.checkpoint.store import TABLE_FILE, QuantizedCheckpoint, final_configs
from gemma_edge.quantize.integers import quantize, scale_dtype
from gemma_edge.quantize.recipe import Recipe

HEAD_SLICE_BYTES = 32 << 20  # float32 bytes of the head that are fitted at once: a slice costs a step for each column


@dataclass(frozen=True)
class Fitted:
    """What calibration found."""

    layer_file: Callable[[int], Path]  # a layer's finished shard
    head: Callable[[Tensor], QuantizedTensor] | None = None  # the integers of rows of the head; None: they need no data
    kv_scales: KVScales | None = None  # of an int8 KV cache


def write_quantized(
    source: Weights,
    recipe: Recipe,
    out: Path,
    progress: Callable[[int], None] = lambda done: None,
    *,
    fitted: Fitted | None = None,
) -> QuantizedCheckpoint:
    """Quantize a checkpoint slice by slice into a new folder, one shard per layer.

    Args:
        source: float weights, or integers, which are kept bit for bit.
        recipe: what each float weight becomes.
        out: an empty or new folder.
        progress: called with the number of weights just finished.
        fitted: from calibration/layerwise.py; None: everything is made here, without data, and the scales of an int8 KV cache
            are those that the source has.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = _Work(source, recipe, final_configs(source, recipe), progress, fitted.head if fitted else None)
    names = shard_names(source.config)
    _write_table(work, out, names[0])
    for layer, name in enumerate(names[1:]):
        if fitted is not None:
            shutil.copyfile(fitted.layer_file(layer), out / name)
            progress(sum(rows * columns for rows, columns in linear_shapes(source.config, layer).values()))
        else:
            write_safetensors(out / name, list(_layer_shard(work, layer)))
    kv_scales = fitted.kv_scales if fitted and fitted.kv_scales is not None else source.kv_scales
    if kv_scales is not None:
        write_kv_scales(out, kv_scales)
    index = {tensor: name for name in names for tensor in sorted(SafetensorsFile(out / name).tensors)}
    write_whole(out / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    copy_companions(source.folder, out, text_folder=source.text_folder)
    _write_config(work, out)
    return QuantizedCheckpoint.open(out)


def shard_names(config: GemmaConfig) -> list[str]:
    """The checkpoint's weights files: first table, final norm and head, then one file per layer."""
    count = config.num_hidden_layers + 1
    return [f"model-{shard + 1:05d}-of-{count:05d}.safetensors" for shard in range(count)]


def quantization_config(configs: Mapping[str, QuantConfig | None]) -> dict[str, Any]:
    """compressed-tensors' description of the linears, one group per distinct configuration."""
    groups: dict[QuantConfig, list[str]] = {}
    for name, config in configs.items():
        if config is not None and name not in TABLES:
            groups.setdefault(config, []).append(name)
    plain = [name for name, config in configs.items() if config is None and name not in TABLES]
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
        "ignore": [HEAD, *plain],
    }


def _scheme(config: QuantConfig) -> dict[str, Any]:
    return {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": config.symmetric,
        "strategy": "group" if config.group_size else "channel",
        "group_size": config.group_size or None,
        "dynamic": False,
    }


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of a float matrix when 16 bits are requested: its own type; bfloat16 for float32, whose range it has."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def float_type(source: Weights, weight: str, float_bits: int) -> torch.dtype:
    """The type in which the checkpoint stores a float matrix: the source's, made narrow when `float_bits` is 16."""
    dtype = source.dtype(weight)
    return narrow(dtype) if float_bits == 16 else dtype


def integer_specs(
    weight: str,
    shape: tuple[int, int],
    config: QuantConfig,
    parts: Callable[[], Iterator[QuantizedTensor]],
    scale_dtype: torch.dtype,
) -> list[Spec]:
    """Packed codes, scales and shape of one matrix (out, in), which comes in consecutive slices of rows.

    The scales are kept in one piece until they are written: a small tensor per slice, alive among large ones that come and go,
    would fragment the heap.
    """
    groups = config.groups(shape[1])
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


def block_specs(
    layer: int,
    block: nn.Module,
    integers: Mapping[str, QuantizedTensor],
    shapes: Mapping[str, tuple[int, int]],
    dtype: Callable[[str], torch.dtype],
) -> list[Spec]:
    """A layer's shard from a block in memory.

    Args:
        layer: its index.
        block: float values of the norms, and of the linears that stay float.
        integers: the other linears, by their name in the block.
        shapes: of the layer's linears, by their whole name.
        dtype: the type in which a float linear is stored, by its whole name.
    """
    prefix = f"model.layers.{layer}."
    specs: list[Spec] = []
    for name, shape in shapes.items():
        tensor = integers.get(name.removeprefix(prefix))
        if tensor is None:
            values = block.get_parameter(f"{name.removeprefix(prefix)}.weight").data
            specs.append(plain_spec(f"{name}.weight", values.to(dtype(name))))
        else:
            parts = partial(iter, [tensor])
            specs += integer_specs(name, shape, tensor.config, parts, tensor.scale.dtype)
    norms = [f"{name}.weight" for name, module in block.named_modules() if isinstance(module, RMSNorm)]
    return specs + [plain_spec(f"{prefix}{norm}", block.get_parameter(norm).data) for norm in norms]


@dataclass(frozen=True)
class _Work:
    """What is written, and from what."""

    source: Weights
    recipe: Recipe
    configs: Mapping[str, QuantConfig | None]  # what every weight becomes
    progress: Callable[[int], None]  # called with the number of weights just finished
    head: Callable[[Tensor], QuantizedTensor] | None  # see Fitted


def _write_table(work: _Work, out: Path, name: str) -> None:
    """Write the table, the final norm and a head of its own, and the integers of table and head into our own file."""
    matrices = dict.fromkeys((TABLE, work.source.config.head))
    quantized = [weight for weight in matrices if work.configs[weight] is not None]
    # a matrix counts once: here where it stays float, else when its integers are made
    uncounted = replace(work, progress=lambda done: None)
    # written float even where ours is quantized: transformers and vLLM use this one
    floats = [
        _float_spec(uncounted if weight in quantized else work, weight)
        for weight in matrices
        if weight == TABLE or not work.source.split_table
    ]
    write_safetensors(out / name, [*floats, _norm_spec(work.source, FINAL_NORM)])
    if quantized:
        write_safetensors(out / TABLE_FILE, [spec for weight in quantized for spec in _integer_specs(work, weight)])


def _write_config(work: _Work, out: Path) -> None:
    raw, family = text_config(work.source.folder)
    raw.pop("quantization_config", None)
    config = work.source.config
    tied = config.tie_word_embeddings or work.source.split_table
    # other programs go by these keys, not by the tensors; an adapter can change both
    for key, value in {"tie_word_embeddings": tied, "vocab_size": config.vocab_size}.items():
        if raw.get(key, family.defaults[key]) != value:
            raw[key] = value
    if any(config for name, config in work.configs.items() if name not in TABLES):
        raw["quantization_config"] = quantization_config(work.configs)
    write_whole(out / "config.json", json.dumps(raw, indent=1) + "\n")


def _layer_shard(work: _Work, layer: int) -> Iterator[Spec]:
    for weight in linear_shapes(work.source.config, layer):
        if work.configs[weight] is None:
            yield _float_spec(work, weight)
        else:
            yield from _integer_specs(work, weight)
    for norm in layer_norms(work.source.config):
        yield _norm_spec(work.source, f"model.layers.{layer}.{norm}.weight")


def _norm_spec(source: Weights, name: str) -> Spec:
    return plain_spec(name, source.vector(name))


def _float_spec(work: _Work, weight: str) -> Spec:
    """A float matrix in the type in which the checkpoint stores it."""
    shape, dtype = weight_shapes(work.source.config)[weight], float_type(work.source, weight, work.recipe.float_bits)

    def data() -> Iterator[Tensor]:
        for start, stop in row_slices(shape):
            yield work.source.plain_rows(weight, start, stop).to(dtype)
            work.progress((stop - start) * shape[1])

    return Spec(f"{weight}.weight", dtype, shape, data)


def _integer_specs(work: _Work, weight: str) -> list[Spec]:
    """One matrix, slice by slice: the integers that the source has, those of a fitted head, or integers made without data."""
    source, shape, config = work.source, weight_shapes(work.source.config)[weight], work.configs[weight]
    assert config is not None
    method = work.recipe.rule_for(weight).method
    keeps = source.keeps(weight, config, method)
    fit = work.head if weight == HEAD and not keeps else None

    def part(start: int, stop: int) -> QuantizedTensor:
        if keeps:
            return source.quantized(weight, start, stop)
        if fit is not None:
            return fit(source.rows(weight, start, stop))
        return quantize(source.rows(weight, start, stop), config, method)

    def parts() -> Iterator[QuantizedTensor]:
        for start, stop in row_slices(shape, HEAD_SLICE_BYTES if fit else None):
            yield part(start, stop)
            work.progress((stop - start) * shape[1])

    kind = source.scale_dtype(weight) if keeps else scale_dtype(method)
    return integer_specs(weight, shape, config, parts, kind)
