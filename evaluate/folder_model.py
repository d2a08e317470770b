"""A Hugging Face folder as something to evaluate: float weights, or the integers that gemma-export wrote; or a GGUF file, whose
weights are dequantized. It needs torch.

The windows go through the model layer by layer (model/layerwise.py), with one layer's weights in memory at a time. Only tasks
load the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gemma_edge.bundle.entries import CalibrationEntry, ModelEntry, RecipeEntry, TargetEntry
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.manifest import Manifest, state_identity, typed_config
from gemma_edge.evaluate.model import Model
from gemma_edge.logits import Logits
from gemma_edge.model import layerwise as reference
from gemma_edge.model.checkpoint import Weights, weight_shapes
from gemma_edge.model.hub import resolve
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.progress import Progress
from gemma_edge.quantize.calibration.layerwise import stream_error
from gemma_edge.quantize.checkpoint.store import TABLE_FILE, QuantizedCheckpoint, open_weights
from gemma_edge.reading import present
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.text.tokenizer import TOKENIZER_FILE, Tokenizer
from gemma_edge.text.windows import Window

# GROUP_TOKENS: how many tokens' hidden states are in memory at once; for Gemma 2 2B they take 75 MB.
GROUP_TOKENS = 8192
# CHUNK: how many tokens are fed in one call when the whole model is loaded.
CHUNK = 128


class CheckpointModel:
    """A `Model`: the weights of a folder or of a GGUF file, and what they predict."""

    kind, backend = "folder", "torch"

    def __init__(self, path: Path) -> None:
        """Check the folder or file; only headers are read.

        Raises:
            InputError: it is no Gemma model, or cannot be read.
        """
        self.path, folder = path, resolve(str(path))
        quantized_table = present(folder / TABLE_FILE)
        self.weights = QuantizedCheckpoint.open(folder) if quantized_table else open_weights(folder)
        self.config = typed_config(self.weights.config.to_json())
        self.context = self.weights.config.max_position_embeddings
        shapes = weight_shapes(self.weights.config)
        self.size = sum(self._bytes(name, shape) for name, shape in shapes.items())
        self.bits_per_weight: float | None = 8 * self.size / sum(rows * columns for rows, columns in shapes.values())

    def _bytes(self, name: str, shape: tuple[int, int]) -> int:
        """Bytes of one matrix as it is stored: its scales are counted, too."""
        rows, columns = shape
        weights = self.weights
        config = weights.configs[name]
        if config is None:
            return weights.float_bytes(name)
        groups = columns // config.group_size if config.group_size else 1
        return rows * columns * config.bits // 8 + rows * groups * weights.scale_dtype(name).itemsize

    def steps(self, windows: Sequence[Window]) -> int:
        """How many layers the groups of windows go through, and how many blocks of logits follow."""
        layers = self.weights.config.num_hidden_layers
        pieces = sum(-(-window.scored // reference.HEAD_POSITIONS) for window in windows)
        return layers * sum(1 for _ in _groups(windows)) + pieces

    def rows(self, windows: Sequence[Window], progress: Callable[[int], None]) -> Iterator[tuple[Window, int, Logits]]:
        """See `Model.rows`."""
        for group in _groups(windows):
            sequences = [torch.tensor(window.ids[:-1]) for window in group]
            states = reference.final_states(self.weights, sequences, self.context, progress)
            for window, x in zip(group, states, strict=True):
                for start in range(window.first, len(x), reference.HEAD_POSITIONS):
                    rows = x[start : start + reference.HEAD_POSITIONS]
                    yield window, start, reference.logits(self.weights, rows).numpy()
                    progress(1)

    @torch.no_grad()
    def layer_errors(self, original: Model | None, ids: Sequence[int], progress: Progress) -> list[float]:
        """How far the residual stream is from the original's after each layer.

        Args:
            original: the model that this one was made from; [] is returned unless it is a folder of the same shape.
            ids: (T,) tokens that are fed to both.
            progress: shows how far the work is.

        Returns:
            one number per layer, see `stream_error`.
        """
        if not isinstance(original, CheckpointModel):
            return []
        shape = (original.config.num_hidden_layers, original.config.hidden_size)
        if shape != (self.config.num_hidden_layers, self.config.hidden_size):
            return []
        sequence = [torch.tensor(ids)]
        ours = reference.blocks(self.weights, sequence, self.context)
        theirs = reference.blocks(original.weights, sequence, original.context)
        errors = []
        with progress(f"layers of {self.path}", self.weights.config.num_hidden_layers, False) as advance:
            for (x,), (y,) in zip(ours, theirs, strict=True):
                errors.append(stream_error(x, y))
                advance(1)
        return errors

    def runtime(self) -> Runtime:
        """The whole model, loaded as float32."""
        return CheckpointRuntime(self.weights)

    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer; None where it has no tokenizer.json."""
        if not present(self.weights.folder / TOKENIZER_FILE):
            return None
        return Tokenizer.of_folder(self.weights.folder, self.config)


class CheckpointRuntime(Runtime):
    """A folder behind the interface of a bundle's runtime. It takes 4 bytes of memory per parameter."""

    def __init__(self, weights: Weights) -> None:
        config = weights.config
        context = config.max_position_embeddings
        cache = CacheGeometry(context, CHUNK, config.num_key_value_heads, config.head_dim, "float32", ())
        manifest = _manifest(weights)
        identity = state_identity("torch", manifest.config, cache, manifest.files)
        super().__init__(weights.folder, manifest, cache, identity)
        self._model = weights.load()
        self._ring = RingCache(config, context=context, chunk=CHUNK)

    @torch.no_grad()
    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """See `Runtime`: logits (T, V), or (1, V) of the last position."""
        x = self._model.model(torch.from_numpy(ids)[None], torch.tensor([self.position]), self._ring)
        logits: Logits = self._model.head(x if every_position else x[:, -1:])[0].numpy()
        return logits

    def _clear(self) -> None:
        """Nothing to do: at position 0 no slot of the ring is read before it is written."""


def _manifest(weights: Weights) -> Manifest:
    """The parts of a manifest that a runtime reads."""
    config = weights.config
    return Manifest(
        model=ModelEntry(weights.folder.name, config.architecture, weights.num_parameters, lora=None),
        config=typed_config(config.to_json()),
        recipe=RecipeEntry("folder", (), 32, (), CalibrationEntry()),
        target=TargetEntry("torch", ram_bytes=0, threads=1),
        backends={},
        files={},
        tokenizer=False,
        tools={},
        verification={},
        created="",
    )


def _groups(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Groups of consecutive windows: together at most GROUP_TOKENS long, or one window that is longer than that."""
    group: list[Window] = []
    tokens = 0
    for window in windows:
        if group and tokens + len(window.ids) > GROUP_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(window)
        tokens += len(window.ids)
    if group:
        yield group
