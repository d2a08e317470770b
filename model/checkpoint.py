"""Reads a Hugging Face folder tensor by tensor, never the whole model. safetensors only: pickle files are refused."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.bundle.codec import shown
from gemma_edge.errors import InputError
from gemma_edge.model.config import HEAD as HEAD
from gemma_edge.model.config import TABLE as TABLE
from gemma_edge.model.config import TABLES as TABLES
from gemma_edge.model.config import Gemma2Config
from gemma_edge.model.gemma2 import DecoderLayer, Gemma2
from gemma_edge.model.lora import Lora
from gemma_edge.model.quantized import QuantConfig, QuantizedTensor
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.reading import present, read_json
from gemma_edge.text.tokenizer import TOKENIZER_FILE

FINAL_NORM = "model.norm.weight"
# PREFIX: begins every name but the head's. COMPUTED: ends the names of tensors that old versions of transformers saved and
# that nothing reads.
PREFIX, HEAD_STEM, COMPUTED = "model.", "lm_head.", (".rotary_emb.inv_freq",)
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SLICE_BYTES = 4 << 20  # float32 bytes of a weight that are computed at once, so that they stay in the CPU caches


def linear_shapes(config: Gemma2Config, layer: int) -> dict[str, tuple[int, int]]:
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


def weight_shapes(config: Gemma2Config) -> dict[str, tuple[int, int]]:
    """Every matrix, the table first, then a head of its own: name without `.weight` -> (out, in)."""
    shapes = dict.fromkeys((TABLE, config.head), (config.vocab_size, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        shapes |= linear_shapes(config, layer)
    return shapes


def norm_names(config: Gemma2Config) -> list[str]:
    """Every norm's tensor, each (hidden_size,)."""
    layers = range(config.num_hidden_layers)
    return [f"model.layers.{i}.{norm}.weight" for i in layers for norm in NORMS] + [FINAL_NORM]


class Shards:
    """Tensors of a folder's safetensors files by their names in Gemma2ForCausalLM.

    A folder that was saved from Gemma2Model alone has names without `model.`; transformers completes them too.
    """

    def __init__(self, folder: Path, files: list[Path] | None = None) -> None:
        self.folder = folder
        opened = [SafetensorsFile(path) for path in files or _shard_paths(folder)]
        stored = {name: file for file in opened for name in file.tensors}
        base = PREFIX if not any(name.startswith(PREFIX) for name in stored) else ""
        self._stored_as = {name if name.startswith(HEAD_STEM) else base + name: name for name in stored}
        self._file_of = {name: stored[stored_name] for name, stored_name in self._stored_as.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def files(self) -> list[Path]:
        """The files that the tensors are in."""
        return sorted({file.path for file in self._file_of.values()})

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype of a tensor, without reading it.

        Raises:
            InputError: the folder has no such tensor.
        """
        if name not in self._file_of:
            raise InputError(f"{self.folder}: tensor {name} is missing from its safetensors files")
        entry = self._file_of[name].tensors[self._stored_as[name]]
        return entry.shape, entry.dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of a tensor in its stored dtype, in memory of its own."""
        return self._file_of[name].rows(self._stored_as[name], start, stop)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a float tensor is there with this shape.

        Raises:
            InputError: missing, another shape, or no float.
        """
        stored, dtype = self.header(name)
        if stored != shape:
            raise InputError(
                f"{self._file_of[name].path}: {name} has shape {list(stored)}, config.json asks for {list(shape)}"
            )
        if dtype not in FLOATS:
            raise InputError(f"{self._file_of[name].path}: {name} is {dtype}; supported: {', '.join(FLOATS)}")

    def refuse_others(self, config: Gemma2Config, parts: Iterable[str] = ("weight",)) -> None:
        """Refuse a tensor that the decoder does not use: a bias, a classifier's head, a part of another model.

        Args:
            config: the model's.
            parts: what a matrix may be stored as, by the ends of the tensors' names.

        Raises:
            InputError: names the first such tensor, and how many there are.
        """
        matrices = {f"{name}.{part}" for name in weight_shapes(config) for part in parts}
        others = sorted(set(self._file_of) - matrices - {f"{HEAD}.weight", *norm_names(config)})
        others = [name for name in others if not name.endswith(COMPUTED)]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise InputError(
                f"{self._file_of[others[0]].path} holds {others[0]}{more}, which Gemma2ForCausalLM does not have; a bundle would"
                " not be the model that was trained: save the folder from Gemma2ForCausalLM"
            )


class Weights(ABC):
    """A model's matrices and norms, read piece by piece as float32. A matrix may be stored as integers: it is dequantized, and
    the integers themselves can be read too.

    `weight` is everywhere a matrix's name without `.weight`.
    """

    is_quantized = False  # whether the folder is a quantized checkpoint
    configs: dict[str, QuantConfig | None]  # the integers of every matrix; None: it is float
    kv_scales: dict[int, tuple[Tensor, Tensor]] | None = (
        None  # by layer: scales of an int8 cache's K and V, (K, D) each
    )

    def __init__(self, folder: Path, config: Gemma2Config, shards: Shards) -> None:
        self.folder, self.config, self._shards = folder, config, shards
        self.text_folder = folder  # where tokenizer and chat template are; an adapter may bring its own
        self.configs = dict.fromkeys(weight_shapes(config))

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that the weights are read from."""

    @abstractmethod
    def dtype(self, weight: str) -> torch.dtype:
        """The type in which a float matrix is stored."""

    @abstractmethod
    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as float32, in memory of their own."""

    def vector(self, name: str) -> Tensor:
        """A norm's weight as float32.

        Raises:
            InputError: a value is NaN or infinite.
        """
        return finite(self._shards.rows(name).float(), name, self.folder)

    def plain_rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as float32, from its float copy where it is also stored as integers, as the tied table is."""
        return self.rows(weight, start, stop)

    def quantized(self, weight: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of a matrix that is stored as integers (see `configs`), as they are stored."""
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
        state |= {f"{norm}.weight": self.vector(f"{prefix}{norm}.weight") for norm in NORMS}
        block.load_state_dict(state, strict=True, assign=True)
        return block

    def load(self) -> Gemma2:
        """The whole model in float32: 4 bytes per parameter, for small models and tests."""
        with torch.device("meta"):
            model = Gemma2(self.config)
        state = {f"{name}.weight": self.matrix(name) for name in weight_shapes(self.config)}
        state |= {name: self.vector(name) for name in norm_names(self.config)}
        model.load_state_dict(state, strict=True, assign=True)
        return model


def row_slices(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive row slices of about SLICE_BYTES in float32."""
    rows, columns = shape
    step = max(1, SLICE_BYTES // (4 * columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


class Checkpoint(Weights):
    """The float weights of a Gemma 2 folder, with a LoRA merged on the way when one is given."""

    def __init__(
        self, folder: Path, config: Gemma2Config, shards: Shards, lora: Lora | None, lora_folder: Path | None
    ) -> None:
        super().__init__(folder, config, shards)
        self._lora, self._lora_folder = lora, lora_folder
        if lora_folder is not None and present(lora_folder / TOKENIZER_FILE):
            self.text_folder = lora_folder

    @classmethod
    def open(cls, folder: Path, *, lora: Path | None = None) -> Checkpoint:
        """Check the folder: configuration, files, every tensor's shape and type. Reads headers only.

        Raises:
            InputError: names the file, key or tensor at fault.
        """
        config, shards = open_tensors(folder)
        for name, shape in weight_shapes(config).items():
            shards.expect(f"{name}.weight", shape)
        shards.refuse_others(config)
        adapter = Lora.open(lora, weight_shapes(config)) if lora else None
        return cls(folder, config, shards, adapter, lora)

    def files(self) -> list[Path]:
        """Every file that the weights are read from, those of the LoRA included."""
        return [*self._shards.files(), *(sorted(self._lora_folder.iterdir()) if self._lora_folder else [])]

    def dtype(self, weight: str) -> torch.dtype:
        """The narrowest type that holds a matrix exactly: as stored, float32 once a LoRA is merged into it."""
        if self._lora and weight in self._lora.pairs:
            return torch.float32
        return FLOATS[self._shards.header(f"{weight}.weight")[1]]

    def rows(self, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix as float32, LoRA merged.

        Raises:
            InputError: a value is NaN or infinite.
        """
        values = self._shards.rows(f"{weight}.weight", start, stop).float()
        if self._lora:
            self._lora.add_to(values, weight, start)
        return finite(values, f"{weight}.weight", self.folder)


def open_tensors(folder: Path) -> tuple[Gemma2Config, Shards]:
    """The configuration of a folder and its tensors, with every norm among them.

    Raises:
        InputError: names the file, key or tensor at fault.
    """
    config, shards = Gemma2Config.from_hf(folder), Shards(folder)
    config = with_stored_head(config, shards)
    for name in norm_names(config):
        shards.expect(name, (config.hidden_size,))
    return config, shards


def with_stored_head(config: Gemma2Config, shards: Shards) -> Gemma2Config:
    """The configuration with `tie_word_embeddings` as the tensors decide it.

    The head is a matrix of its own if the folder stores a head that differs from the table. transformers does the same, whatever
    config.json says.

    Raises:
        InputError: config.json announces a head that is not stored, or the head is stored as integers or in another shape.
    """
    name, table, shape = f"{HEAD}.weight", f"{TABLE}.weight", (config.vocab_size, config.hidden_size)
    if f"{HEAD}.weight_packed" in shards:
        raise InputError(
            f"{shards.folder} holds {HEAD}.weight_packed, a quantized head; only a float head is read",
            hint="quantize the folder again with `lm_head` ignored, or pass the original float folder",
        )
    if name not in shards:
        if not config.tie_word_embeddings:
            raise InputError(
                f"{shards.folder}: tie_word_embeddings is false, but its safetensors files hold no {name}",
                hint="set it to true in config.json if the head is the table, else save the model with its head",
            )
        return config
    for stored in (name, table):
        shards.expect(stored, shape)
    slices = row_slices(shape)
    tied = all(torch.equal(shards.rows(name, *part).float(), shards.rows(table, *part).float()) for part in slices)
    return replace(config, tie_word_embeddings=tied)


def finite(values: Tensor, name: str, folder: Path) -> Tensor:
    """The values, unless one of them is NaN or infinite (InputError)."""
    # a sum over NaN or infinity is never finite, and it costs a twentieth of checking each value
    if not math.isfinite(values.sum().item()) and not values.isfinite().all():
        raise InputError(f"{folder}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
    return values


def _shard_paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if present(single):  # transformers' order: it wins over an index
        return [single]
    if present(index):
        return _indexed(folder, index)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} holds {pickles[0]}, a pickle file; only safetensors are read: save it as safetensors"
        )
    raise InputError(f"{folder} has no model.safetensors; pass a Hugging Face model folder with safetensors weights")


def _indexed(folder: Path, index: Path) -> list[Path]:
    """The files that an index names; each must lie in the folder, or in one below."""
    names = read_json(index, "download it again").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} is damaged: its weight_map does not map tensors to files; download it again")
    paths = {name: folder / name for name in sorted(set(names.values()))}
    for name, path in paths.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not present(path):
            plain = name if name.isprintable() and len(name) < 256 else shown(name)
            raise InputError(f"{folder}: shard {plain} named by {index.name} is missing; download it again")
    return list(paths.values())
