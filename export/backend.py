"""The exporting half of a backend, as an abstract class. Each backend has one in its own folder; bundle/backends.py names it.

An exporter is imported to plan an export, so its module holds sizes and refusals, and imports what it lowers with inside
`write` and `check`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gemma_edge.bundle.accelerators import CPU
from gemma_edge.bundle.backends import ALL, registered
from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import HEAD, TABLE, Weights, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.recipe import QuantConfig, Recipe

Configs = Mapping[str, QuantConfig | None]  # weight -> its integers; None: it stays float


TABLE_FIELDS = {TABLE: "table_bits", HEAD: "head_bits"}  # options that decide the bits of these matrices
# WITHOUT_GROUPS: what gives them one scale per channel. With 4 bits they have groups whatever `group_size` says; only a head
# that is calibrated has none.
WITHOUT_GROUPS = {
    TABLE: "`table_bits` 8, or `head_bits` 4",
    HEAD: "`head_bits` 8, or a `quality` that calibrates",
}


@dataclass(frozen=True)
class StoredWeights:
    """A model's weights as they will be stored: what sizes follow from."""

    source: Weights  # float, or quantized already
    configs: Configs
    float_bits: int  # 16 or 32, of the weights that stay float
    kv_dtype: str = "float32"  # of the KV cache: an int8 one has scales among the weights

    @property
    def config(self) -> GemmaConfig:
        """The model's configuration."""
        return self.source.config


@dataclass(frozen=True)
class LoweringTask:
    """What a backend lowers, and where to."""

    checkpoint: QuantizedCheckpoint  # the integers
    cache: CacheGeometry  # with the backend's `slots_behind`
    out: Path  # a folder, in which other backends may have written files of other names
    float_bits: int = 32  # 16 or 32: bits of the weights that stay float
    progress: Callable[[int], None] = lambda done: None  # called with the bytes of weights just written


class Backend(ABC):
    """The exporting half of a backend. Its integers are the quantizer's, unchanged."""

    name: str  # as in its BackendInfo
    # group_size: what 4-bit weights get where the user leaves it open; None: what suits the quality
    group_size: int | None = None
    slot_multiple: int = 1  # the slots of every layer's cache are a multiple of it
    pins: bool = True  # whether its caches can keep the beginning of a text for good
    int8_kv: bool = True  # whether they can be int8, where the backend's can
    # signed_scales: whether its kernels multiply by scales below zero, which llama.cpp's Q4_0 has
    signed_scales: ClassVar[bool] = False

    def refuse_unsupported(self, config: GemmaConfig, configs: Configs, float_bits: int) -> None:
        """Refuse a model with a weight that the backend would compute wrongly, or not at all.

        Raises:
            InputError: names the weight and the nearest choice that works.
        """
        for weight, (_, columns) in weight_shapes(config).items():
            self.refuse_weight(weight, configs[weight], columns, float_bits)

    def refuse_weight(self, weight: str, config: QuantConfig | None, columns: int, float_bits: int) -> None:  # noqa: B027
        """The same for one weight of so many columns. Every weight is accepted here."""

    def refuse_recipe(self, recipe: Recipe, source: Weights) -> None:
        """Refuse a method whose scales the kernels do not take. Scales that are stored already are checked when they are read.

        Raises:
            InputError: names the method.
        """
        if recipe.fixed is not None and not source.is_quantized and not self.signed_scales:
            raise InputError(
                f"`method` {recipe.fixed} makes scales below zero, which the {self.name} backend's kernels do not take;"
                " use `backend` onnx, or another `method`",
                field="method",
                value=recipe.fixed,
            )

    @abstractmethod
    def weights_bytes(self, weights: StoredWeights) -> int:
        """Bytes of the weights in the bundle's files, exactly."""

    def resident_bytes(self, weights: StoredWeights) -> int:
        """Bytes of the weights in the engine's memory. As many as in the file, unless this is overridden."""
        return self.weights_bytes(weights)

    def looked_up_bytes(self, weights: StoredWeights) -> int:
        """Bytes of the file that only look-ups read, a row for each token. They stay in the mapped file. There are none here: a
        table that is also the head is multiplied whole.
        """
        return 0

    def own_ram(self, config: GemmaConfig, cache: CacheGeometry) -> int:
        """Bytes that the engine takes beside weights, KV cache, activations and logits."""
        return 0

    def export_ram(self, weights: StoredWeights) -> int:
        """Bytes that an export takes beside those of every backend."""
        return 0

    def slots_behind(self, prefill_chunk: int) -> int:
        """Slots of a layer's cache that lie behind the end of its ring."""
        return 0

    def stored(self, bundle: Path, settings: Any, config: ModelConfig) -> Weights | None:
        """The weights that a finished bundle holds, read back from this backend's files; None: they cannot be.

        Args:
            bundle, settings: the folder, and the backend's settings in its manifest.
            config: the manifest's.

        Raises:
            InputError: the files are not those of the model.
        """
        return None

    def lower(self, task: LoweringTask) -> dict[str, Any]:
        """Refuse what the backend cannot hold, and write its files into the task's folder.

        Returns:
            the backend's `settings` in the manifest.

        Raises:
            InputError: a weight that the backend cannot compute exactly.
        """
        self.refuse_unsupported(task.checkpoint.config, task.checkpoint.configs, task.float_bits)
        return self.write(task)

    @abstractmethod
    def write(self, task: LoweringTask) -> dict[str, Any]:
        """The part of `lower` that writes, with the same result."""

    @abstractmethod
    def check(self, task: LoweringTask) -> None:
        """Read back what `lower` wrote for the same task, and compare it with the model.

        Raises:
            RuntimeError: names what is not as it should be.
        """


@dataclass(frozen=True)
class Kernels:
    """What kernels with one 8-bit scale per channel, and floats of 32 bits, multiply correctly."""

    backend: str
    owner: str  # the library that they are part of
    bits: tuple[int, ...] = (4, 8)  # of integers
    multiple: int = 2  # columns of a 4-bit group, or of a row without groups, are a multiple of it
    no_groups: str = ""  # why they take no scale per group, as "LiteRT.js computes them wrongly"; empty: they do

    def refuse_weight(self, weight: str, config: QuantConfig | None, columns: int, float_bits: int) -> None:
        """Refuse what they would compute wrongly, or not at all.

        Raises:
            InputError: names the weight and the nearest choice that works.
        """
        if config is None:
            if float_bits == 16:
                raise InputError(
                    f"{weight} in 16 bits: the {self.backend} backend computes floats in 32; use `bits` 32",
                    field="bits",
                    value=16,
                )
            return
        if config.bits not in self.bits:
            field = TABLE_FIELDS.get(weight, "bits")
            raise InputError(
                f"{weight} has {config.bits} bits: {self.owner} multiplies 8 only; use `{field}` 8",
                field=field,
                value=config.bits,
            )
        if config.group_size and self.no_groups:
            raise InputError(
                f"{weight} has groups of {config.group_size}: {self.no_groups};"
                f" use {WITHOUT_GROUPS.get(weight, '`group_size` 0')}",
                field="group_size",
                value=config.group_size,
            )
        if config.bits == 8 and config.group_size:
            raise InputError(
                f"{weight} has 8 bits in groups of {config.group_size}: {self.owner} has 8-bit kernels with one scale per"
                " channel only; use `group_size` 0 for 8 bits, or `backend` onnx",
                field="group_size",
                value=config.group_size,
            )
        if config.bits == 4 and (config.group_size or columns) % self.multiple:
            need = "an even number" if self.multiple == 2 else f"a multiple of {self.multiple}"
            raise InputError(
                f"{weight} has rows of {columns}: {self.owner}'s 4-bit kernels need {need}; use `bits` 8, or `backend` onnx",
                field="bits",
                value=4,
            )


def exporter(name: str, accelerator: str = CPU) -> Backend:
    """The exporting half of a registered backend, for one of the accelerators that it `runs_on`."""
    backend: Backend = registered()[name].load_exporter(accelerator)
    return backend


def choose_backends(requested: str) -> list[str]:
    """The names in a list with commas; ALL means every backend that belongs to it.

    Raises:
        InputError: an unknown name, or a backend whose exporter is not installed.
    """
    known = registered()
    every = [name for name, info in known.items() if info.in_all]
    names = every if requested == ALL else list(dict.fromkeys(requested.split(",")))
    for name in names:
        if name not in known:
            raise InputError(
                f"`backend` {name}; supported: {', '.join(known)}, several with commas, or {ALL}",
                field="backend",
                value=name,
            )
        command = known[name].how_to_install_for_export()
        if command is not None:
            raise InputError(f"`backend` {name} is not installed: {command}", field="backend", value=name)
    return names
