"""The tensors of a folder's safetensors or GGUF files by their names in its decoder. Pickle files are refused."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from gemma_edge.bundle.codec import shown
from gemma_edge.errors import InputError
from gemma_edge.model.config import text_config
from gemma_edge.model.families import IMAGE_PREFIXES, text_name
from gemma_edge.model.gguf.folder import is_prepared, pointed
from gemma_edge.model.gguf.tensors import GgufFile
from gemma_edge.model.quantized import QuantizedTensor
from gemma_edge.model.safetensors_reader import SafetensorsFile, StoredTensor, TensorFile
from gemma_edge.reading import present, read_json

logger = logging.getLogger(__name__)

# PREFIX: begins every name but the head's. COMPUTED: ends the names of tensors that old versions of transformers saved and
# that nothing reads.
PREFIX, HEAD_STEM, COMPUTED = "model.", "lm_head.", (".rotary_emb.inv_freq",)
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Shards:
    """Tensors of a folder's files by their names in the model's class of transformers, such as Gemma2ForCausalLM.

    A folder that was saved from Gemma2Model alone has names without `model.`; transformers completes them too.
    """

    def __init__(self, folder: Path, files: list[Path] | None = None, *, multimodal: bool = False) -> None:
        """Read the headers.

        Args:
            folder: the model's.
            files: the files to read; None: those of the model.
            multimodal: an image encoder lies in them too. Its tensors are left out, and a warning says so.
        """
        opened = _opened(folder, files)
        self._is_gguf = isinstance(opened[0], GgufFile)
        # origin: what messages name: the folder, or the GGUF file that it was made from
        self.origin = opened[0].path if self._is_gguf else folder
        stored = {name: StoredTensor(file, name) for file in opened for name in file.tensors}
        # a GGUF file says so by its tensors alone
        if multimodal or (self._is_gguf and any(name.startswith(IMAGE_PREFIXES) for name in stored)):
            decoder = {
                text_name(name): tensor for name, tensor in stored.items() if not name.startswith(IMAGE_PREFIXES)
            }
            count = len(stored) - len(decoder)
            logger.warning(
                "%s: %d tensors of its image encoder are left out; the result takes text only", self.origin, count
            )
            stored = decoder
        base = PREFIX if not any(name.startswith(PREFIX) for name in stored) else ""
        self._tensors = {name if name.startswith(HEAD_STEM) else base + name: tensor for name, tensor in stored.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> StoredTensor:
        """Where a tensor is.

        Raises:
            InputError: the folder has no such tensor.
        """
        if name not in self._tensors:
            raise InputError(f"{self.origin}: tensor {name} is missing from its weights")
        return self._tensors[name]

    def replaced(self, tensors: Mapping[str, StoredTensor]) -> Shards:
        """The same tensors with some of them taken from elsewhere, and with those that are new."""
        other = copy(self)
        other._tensors = {**self._tensors, **tensors}
        return other

    def files(self) -> list[Path]:
        """The files that the tensors are in."""
        return sorted({tensor.file.path for tensor in self._tensors.values()})

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype of a tensor, without reading it.

        Raises:
            InputError: the folder has no such tensor.
        """
        entry = self[name].entry
        return entry.shape, entry.dtype

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor in its file."""
        entry = self[name].entry
        return entry.stop - entry.start

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of a tensor in its stored dtype, in memory of its own."""
        return self[name].rows(start, stop)

    def rounded(self, name: str) -> str | None:
        """The type of a tensor that a GGUF file holds as integers; None: it is float."""
        file = self[name].file
        kind = file.type(self[name].name) if isinstance(file, GgufFile) else None
        return None if kind in FLOATS else kind

    def quantized(self, name: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of a tensor whose type, by `rounded`, is one of INTEGERS, as they are stored."""
        file = self[name].file
        assert isinstance(file, GgufFile)
        return file.quantized(self[name].name, start, stop)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a float tensor is there with this shape.

        Raises:
            InputError: missing, another shape, or no float.
        """
        stored, dtype = self.header(name)
        if stored != shape:
            raise InputError(
                f"{self[name].file.path}: {name} has shape {list(stored)}, config.json asks for {list(shape)}"
            )
        if dtype not in FLOATS:
            raise InputError(f"{self[name].file.path}: {name} is {dtype}; supported: {', '.join(FLOATS)}")

    def refuse_others(self, names: Collection[str], hf_class: str) -> None:
        """Refuse a tensor that is not one of `names`: a bias, a classifier's head, a part of another model.

        Args:
            names: every tensor that the model may have.
            hf_class: the model's class in transformers, for the message.

        Raises:
            InputError: names the first such tensor, and how many there are.
        """
        others = sorted(self._tensors.keys() - set(names))
        others = [name for name in others if not name.endswith(COMPUTED)]
        if others:
            way = "convert the model again" if self._is_gguf else f"save the folder from {hf_class}"
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise InputError(
                f"{self[others[0]].file.path} holds {others[0]}{more}, which {hf_class} does not have; a bundle would not be"
                f" the model that was trained: {way}"
            )


def _opened(folder: Path, files: list[Path] | None) -> Sequence[TensorFile]:
    """The model's files, or those that are given."""
    if files is None and is_prepared(folder):
        _, family = text_config(folder)
        return [GgufFile(path, family.norms) for path in pointed(folder)]
    return [SafetensorsFile(path) for path in files or _shard_paths(folder)]


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
