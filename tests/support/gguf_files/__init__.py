"""GGUF files for tests, written by the gguf package's own writer, with the names and values that llama.cpp's converter gives."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_edge.bundle.entries import LOCAL
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gguf.tensors import OTHERS, block_names
from support.checkpoints import DEMO

gguf = pytest.importorskip("gguf")

LLAMA = {name: each for each, name in OTHERS.items()}
# llama.cpp's names of the architectures, by transformers'
LLAMA_ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}
RAW = json.loads((DEMO / "tokenizer.json").read_text())
PIECES = sorted(RAW["model"]["vocab"], key=RAW["model"]["vocab"].get)
BYTES = range(7, 263)  # the demo's tokens for single bytes


def llama_name(name: str, config: GemmaConfig) -> str:
    """llama.cpp's name of a tensor of a Hugging Face folder; another name stays."""
    if not name.startswith("model.layers."):
        return LLAMA.get(name, name)
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    llama = {ours: each for each, ours in block_names(config.norms).items()}
    return f"blk.{layer}.{llama[part]}.weight"


def kinds() -> list[int]:
    """llama.cpp's types of the demo's tokens."""
    added = {token["id"]: 3 if token["special"] else 4 for token in RAW["added_tokens"]}
    return [added.get(i, 6 if i in BYTES else 1) for i in range(len(PIECES))]


def scores() -> list[float]:
    """As llama.cpp stores them: -1000 for what is no piece of text."""
    return [-float(i - BYTES.stop) if kind == 1 else 0.0 if kind == 6 else -1000.0 for i, kind in enumerate(kinds())]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write(
    folder: Path,
    path: Path,
    kind: str = "F16",
    *,
    skip: tuple[str, ...] = (),
    part: slice = slice(None),
    **changed: Any,
) -> Path:
    """A GGUF file of a Hugging Face folder: matrices of one type, norms as float32 and 1 larger.

    Args:
        folder: the model's.
        path: the file.
        kind: the matrices' type.
        skip: keys of the metadata to leave out.
        part: of the tensors; all of them, unless the file is one of several.
        changed: values of metadata, with `__` for a point.
    """
    config, weights = GemmaConfig.from_hf(folder), load_weights(folder)
    name = LLAMA_ARCHITECTURES[config.architecture]
    values: dict[str, Any] = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": scores(),
        "tokenizer.ggml.token_type": kinds(),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"],
    }
    if LOCAL in config.layer_types:
        values |= {
            f"{name}.attention.sliding_window": config.sliding_window,
            f"{name}.rope.freq_base_swa": config.rotary(config.layer_types.index(LOCAL)).theta,
            f"{name}.attention.sliding_window_pattern": [each == LOCAL for each in config.layer_types],
        }
    if config.attn_logit_softcapping is not None:
        values[f"{name}.attn_logit_softcapping"] = config.attn_logit_softcapping
        values[f"{name}.final_logit_softcapping"] = config.final_logit_softcapping
    if config.rope_factor != 1:
        values |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": config.rope_factor}
    values |= {key.replace("__", "."): value for key, value in changed.items()}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", name))
    for key, value in values.items():
        if key not in skip:
            add(writer, key, value)
    for tensor, stored in list(weights.items())[part]:
        add_tensor(writer, llama_name(tensor, config), stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, key: str, value: Any) -> None:
    """One pair of metadata, in the type that llama.cpp writes."""
    kinds = {str: "string", int: "uint32", float: "float32", list: "array", bool: "bool"}
    kind = kinds[type(value)]
    if kind == "uint32" and not 0 <= value < 1 << 32:
        kind = "uint64" if value > 0 else "int32"
    getattr(writer, f"add_{kind}")(key, value)


def add_tensor(writer: Any, name: str, stored: Tensor, kind: str) -> None:
    values = stored.float().numpy()
    kind = "F32" if "norm" in name else kind
    quantized = gguf.quants.quantize(values + 1 if "norm" in name else values, gguf.GGMLQuantizationType[kind])
    writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType[kind])


def dequantized(folder: Path, out: Path, kind: str) -> Path:
    """A Hugging Face folder whose matrices hold what a type of GGUF's can hold, as float32 or as the float type itself."""
    shutil.copytree(folder, out)
    weights = load_file(folder / "model.safetensors")
    quant, dtype = (
        gguf.GGMLQuantizationType[kind],
        {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32),
    )
    for name, stored in weights.items():
        if "norm" not in name:
            values = gguf.dequantize(gguf.quants.quantize(stored.float().numpy(), quant), quant)
            weights[name] = torch.from_numpy(values.copy()).to(dtype)
        else:
            weights[name] = stored.float() + 1 - 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Damage: mostly to the header, where sizes and types are; now and then the file ends early."""
    header = data.find(b"norm.weight") + 4096  # about where the names of the tensors end
    if draw.random() < 0.1:
        return data[: draw.randrange(len(data))]
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(header if draw.random() < 0.9 else len(data)), draw.choice((1, 4, 8))
        out[at : at + size] = draw.choice((b"\xff" * size, b"\0" * size, draw.randbytes(size)))[: len(out) - at]
    return bytes(out)
