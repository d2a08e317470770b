"""Reads a Hugging Face folder tensor by tensor, never the whole model. safetensors only: pickle files are refused."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.bundle.entries import VocabularyEntry
from gemma_edge.errors import InputError
from gemma_edge.model.config import HEAD as HEAD
from gemma_edge.model.config import TABLE as TABLE
from gemma_edge.model.config import TABLES as TABLES
from gemma_edge.model.config import GemmaConfig, is_multimodal
from gemma_edge.model.gemma import DecoderLayer, Gemma
from gemma_edge.model.gguf.tensors import INTEGERS
from gemma_edge.model.lora import NO_LORA, Lora
from gemma_edge.model.quantized import QuantConfig, QuantizedTensor
from gemma_edge.model.shards import FLOATS as FLOATS
from gemma_edge.model.shards import Shards as Shards
from gemma_edge.reading import present
from gemma_edge.text.chat import TEMPLATE_FILE
from gemma_edge.text.tokenizer import TOKENIZER_FILE

logger = logging.getLogger(__name__)

FINAL_NORM = "model.norm.weight"
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
SLICE_BYTES = 4 << 20  # float32 bytes of a weight that are computed at once, so that they stay in the CPU caches


def linear_shapes(config: GemmaConfig, layer: int) -> dict[str, tuple[int, int]]:
    """(out, in) of one layer's linears, by their name in the checkpoint without `.weight`."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def weight_shapes(config: GemmaConfig) -> dict[str, tuple[int, int]]:
    """Every matrix, the table first, then a head of its own: name without `.weight` -> (out, in)."""
    shapes = dict.fromkeys((TABLE, config.head), (config.vocab_size, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        shapes |= linear_shapes(config, layer)
    return shapes


def layer_norms(config: GemmaConfig) -> dict[str, int]:
    """The norms of every layer and their sizes, by their name in the block without `.weight`."""
    heads = dict.fromkeys(HEAD_NORMS, config.head_dim) if config.qk_norm else {}
    return dict.fromkeys(config.norms.names, config.hidden_size) | heads


def norm_sizes(config: GemmaConfig) -> dict[str, int]:
    """Every norm's tensor and its size."""
    layers = range(config.num_hidden_layers)
    inner = {f"model.layers.{i}.{norm}.weight": size for i in layers for norm, size in layer_norms(config).items()}
    return inner | {FINAL_NORM: config.hidden_size}


def norm_names(config: GemmaConfig) -> list[str]:
    """Every norm's tensor."""
    return list(norm_sizes(config))


def tensor_names(config: GemmaConfig, parts: Iterable[str] = ("weight",)) -> set[str]:
    """Every tensor that a folder of the model may hold, a copy of the table as the head included.

    Args:
        config: the model's.
        parts: what a matrix may be stored as, by the ends of the tensors' names.
    """
    matrices = {f"{name}.{part}" for name in weight_shapes(config) for part in parts}
    return {*matrices, f"{HEAD}.weight", *norm_names(config)}


class Weights(ABC):
    """A model's matrices and norms, read piece by piece as float32. A matrix may be stored as integers: it is dequantized, and
    the integers themselves can be read too.

    `weight` is everywhere a matrix's name without `.weight`.
    """

    is_quantized = False  # whether the folder is a quantized checkpoint
    split_table = (
        False  # whether the head is another rounding of the table, and not a matrix of its own in the original
    )
    vocabulary: VocabularyEntry | None = None  # which tokens of the original are left; None: all
    configs: dict[str, QuantConfig | None]  # the integers of every matrix; None: it is float
    kv_scales: dict[int, tuple[Tensor, Tensor]] | None = (
        None  # by layer: scales of an int8 cache's K and V, (K, D) each
    )

    def __init__(self, folder: Path, config: GemmaConfig, shards: Shards) -> None:
        self.folder, self.config, self._shards = folder, config, shards
        self.origin = shards.origin  # what messages name: the folder, or a GGUF file
        self.text_folder = folder  # where tokenizer and chat template are; an adapter may bring its own
        self.configs = dict.fromkeys(weight_shapes(config))

    @property
    def num_parameters(self) -> int:
        """Weights of the original, in which a split table is one matrix."""
        config = self.config
        return config.num_parameters - self.split_table * config.vocab_size * config.hidden_size

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that the weights are read from."""

    @abstractmethod
    def dtype(self, weight: str) -> torch.dtype:
        """The type in which a float matrix is stored."""

    def float_bytes(self, weight: str) -> int:
        """How many bytes a matrix takes in its file that is stored in float, or in a GGUF file."""
        return math.prod(weight_shapes(self.config)[weight]) * self.dtype(weight).itemsize

    @abstractmethod
    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as float32, in memory of their own."""

    def vector(self, name: str) -> Tensor:
        """A norm's weight as float32.

        Raises:
            InputError: a value is NaN or infinite.
        """
        return self._floats(name)

    def _floats(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor that is stored in float, as float32; InputError if one is not finite."""
        return finite(self._shards.rows(name, start, stop).float(), name, self.origin)

    def plain_rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as float32, from its float copy where it is also stored as integers, as the tied table is."""
        return self.rows(weight, start, stop)

    def keeps(self, weight: str, config: QuantConfig, method: str) -> bool:
        """Whether a matrix is stored as the integers that it shall become, which `quantized` then gives.

        Args:
            weight: the matrix.
            config, method: the integers that it shall become, and how they would be made of floats.
        """
        return self.configs[weight] is not None

    def rounded(self, weight: str) -> str | None:
        """What a GGUF file calls the integers that a matrix of `configs` None is made from; None: it is float in every file."""
        return None

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of a matrix that is stored as integers (see `configs` and `keeps`), as they are stored."""
        raise RuntimeError(f"{weight} is float")

    def scale_dtype(self, weight: str) -> torch.dtype:
        """The type in which the scales of a matrix's integers are stored."""
        raise RuntimeError(f"{weight} is float")

    def matrix(self, weight: str) -> Tensor:
        """A whole matrix as float32. It is read in slices, so that intermediate tensors stay small, and in the CPU caches."""
        shape = weight_shapes(self.config)[weight]
        out = torch.empty(shape)
        for start, stop in row_slices(shape):
            out[start:stop] = self.rows(weight, start, stop)
        return out

    def load_layer(self, layer: int) -> DecoderLayer:
        """One block in float32."""
        with torch.device("meta"):
            block = DecoderLayer(self.config, layer)
        prefix = f"model.layers.{layer}."
        state = {name.removeprefix(prefix) + ".weight": self.matrix(name) for name in linear_shapes(self.config, layer)}
        state |= {f"{norm}.weight": self.vector(f"{prefix}{norm}.weight") for norm in layer_norms(self.config)}
        block.load_state_dict(state, strict=True, assign=True)
        return block

    def load(self) -> Gemma:
        """The whole model in float32: 4 bytes per parameter, for small models and tests."""
        with torch.device("meta"):
            model = Gemma(self.config)
        state = {f"{name}.weight": self.matrix(name) for name in weight_shapes(self.config)}
        state |= {name: self.vector(name) for name in norm_names(self.config)}
        model.load_state_dict(state, strict=True, assign=True)
        return model


def row_slices(shape: tuple[int, int], slice_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive row slices of about `slice_bytes` in float32, or SLICE_BYTES."""
    rows, columns = shape
    step = max(1, (slice_bytes or SLICE_BYTES) // (4 * columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


class Checkpoint(Weights):
    """The float weights of a Gemma folder, with an adapter merged on the way when one is given."""

    def __init__(self, folder: Path, config: GemmaConfig, shards: Shards, lora: Lora) -> None:
        super().__init__(folder, config, shards)
        self._lora = lora
        if lora.folder is None:
            return
        if present(lora.folder / TOKENIZER_FILE):
            self.text_folder = lora.folder
        elif present(lora.folder / TEMPLATE_FILE):
            logger.warning(
                "%s is not used: the adapter has no %s beside it; copy the model's there",
                lora.folder / TEMPLATE_FILE,
                TOKENIZER_FILE,
            )

    @classmethod
    def open(cls, folder: Path, *, lora: Path | None = None) -> Checkpoint:
        """Check the folder: configuration, files, every tensor's shape and type. Reads headers only.

        Raises:
            InputError: names the file, key or tensor at fault.
        """
        config, shards, adapter = open_tensors(folder, lora)
        for name, shape in weight_shapes(config).items():
            shards.expect(f"{name}.weight", shape)
        shards.refuse_others(tensor_names(config), config.hf_class)
        return cls(folder, config, shards, adapter)

    def files(self) -> list[Path]:
        """Every file that the weights are read from, and all others of the adapter."""
        adapter = self._lora.folder.iterdir() if self._lora.folder else ()
        return sorted({*self._shards.files(), *adapter})

    def dtype(self, weight: str) -> torch.dtype:
        """The narrowest type that holds a matrix exactly: as stored, float32 once a LoRA is merged into it."""
        if weight in self._lora.pairs:
            return torch.float32
        return FLOATS[self._shards.header(f"{weight}.weight")[1]]

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as float32, LoRA merged.

        Raises:
            InputError: a value is NaN or infinite.
        """
        return finite(self._lora.rows(self._shards, weight, start, stop), f"{weight}.weight", self.origin)

    def keeps(self, weight: str, config: QuantConfig, method: str) -> bool:
        """See Weights: a matrix of a GGUF file that no adapter changes, in a type whose integers every method agrees on."""
        return weight not in self._lora.pairs and INTEGERS.get(self.rounded(weight) or "") == (method, config)

    def float_bytes(self, weight: str) -> int:
        """See Weights."""
        return super().float_bytes(weight) if weight in self._lora.pairs else self._shards.nbytes(f"{weight}.weight")

    def rounded(self, weight: str) -> str | None:
        """See Weights."""
        return self._shards.rounded(f"{weight}.weight")

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """See Weights.

        Raises:
            InputError: a scale is NaN or infinite.
        """
        if self.rounded(weight) not in INTEGERS:
            return super().quantized(weight, start, stop)
        part = self._shards.quantized(f"{weight}.weight", start, stop)
        finite(part.scale.float(), f"{weight}.weight", self.origin)
        return part

    def scale_dtype(self, weight: str) -> torch.dtype:
        """See Weights."""
        return torch.float16 if self.rounded(weight) in INTEGERS else super().scale_dtype(weight)


def adaptable_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all that an adapter may change, the head included, by names without `.weight`."""
    shapes: dict[str, tuple[int, ...]] = {**weight_shapes(config), HEAD: weight_shapes(config)[TABLE]}
    return shapes | {name.removesuffix(".weight"): (size,) for name, size in norm_sizes(config).items()}


def open_tensors(
    folder: Path, lora: Path | None = None, *, codes: str | None = None
) -> tuple[GemmaConfig, Shards, Lora]:
    """The configuration of a folder, its tensors with those that an adapter replaces, and the adapter.

    Args:
        folder: the model's.
        lora: an adapter's.
        codes: ends the name of a matrix's integers, where the folder may hold some.

    Raises:
        InputError: names the file, key or tensor at fault.
    """
    config, shards, adapter = GemmaConfig.from_hf(folder), Shards(folder, multimodal=is_multimodal(folder)), NO_LORA
    if lora is not None:
        adapter = Lora.open(lora, adaptable_shapes(config))
        shards, config = adapter.over(shards), config.resized(adapter.vocab_size or config.vocab_size, lora)
    config = replace(config, tie_word_embeddings=_is_tied(config, shards, adapter, codes))
    for name, size in norm_sizes(config).items():
        shards.expect(name, (size,))
    return config, shards, adapter


def _is_tied(config: GemmaConfig, shards: Shards, lora: Lora, codes: str | None) -> bool:
    """Whether the head is the table, as the tensors decide it.

    The head is a matrix of its own if the folder stores a head that differs from the table. transformers does the same, whatever
    config.json says. Both are compared as the adapter makes them; a head or a table of integers differs from the other one.

    Raises:
        InputError: config.json announces a head that is not stored, or the head is stored in another shape.
    """
    name, table, shape = f"{HEAD}.weight", f"{TABLE}.weight", (config.vocab_size, config.hidden_size)
    if f"{HEAD}.{codes}" in shards or (name in shards and f"{TABLE}.{codes}" in shards):
        return False
    if name not in shards:
        if not config.tie_word_embeddings:
            raise InputError(
                f"{shards.origin}: tie_word_embeddings is false, but its weights hold no {name}",
                hint="set it to true in config.json if the head is the table, else save the model with its head",
            )
        return True
    for stored in (name, table):
        shards.expect(stored, shape)
    slices = row_slices(shape)
    return all(torch.equal(lora.rows(shards, HEAD, *part), lora.rows(shards, TABLE, *part)) for part in slices)


def finite(values: Tensor, name: str, folder: Path) -> Tensor:
    """The values, unless one of them is NaN or infinite (InputError)."""
    # a sum over NaN or infinity is never finite, and it costs a twentieth of checking each value
    if not math.isfinite(values.sum().item()) and not values.isfinite().all():
        raise InputError(f"{folder}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
    return values
