"""A LoRA adapter in PEFT's folder format, merged tensor by tensor. Source: PEFT, `tuners/lora/layer.py` (`get_delta_weight`),
and `utils/save_and_load.py` for the names of its tensors.

An adapter holds updates of linears and tables, and tensors that were trained and saved whole (`modules_to_save`, or a table with
another number of rows). Everything else, DoRA and trained biases among it, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from torch import Tensor

from gemma_edge.bundle.codec import shown, typed_value
from gemma_edge.errors import InputError
from gemma_edge.model import patterns
from gemma_edge.model.config import HEAD, TABLE, TABLES
from gemma_edge.model.families import text_name
from gemma_edge.model.safetensors_reader import SafetensorsFile, StoredTensor
from gemma_edge.model.shards import Shards
from gemma_edge.reading import present, read_json

# ONLY_VALUE: keys of adapter_config.json that change the merged weight, and the values that this file computes.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # "pissa", "olora", "corda" and "lora_ga" also change the base weight, which is then no longer the folder's
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# What PEFT cannot merge either: kinds of LoRA by their key, and kinds of adapters that are not in the weights at all.
NEVER_MERGED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "XLORA",
)
MERGE_FIRST = (
    "merge it with PEFT (merge_and_unload, then save_pretrained) and pass the merged model's folder without `lora`"
)
TRAIN_AGAIN = "PEFT cannot merge it into the weights either, and a bundle holds only weights: train a plain LoRA"

PREFIX = "base_model.model."  # begins the names of an adapter's tensors
HALF = re.compile(r"(?P<weight>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
WHOLE = re.compile(r"(?P<weight>.+?)(?:\.(?P<kind>base_layer|modules_to_save(?:\.default)?))?\.weight")
UNUSED = re.compile(r".+\.original_module\..+")  # the model's own tensor, which one in `modules_to_save` replaces

Rank = Annotated[int, Meta(ge=1, le=1 << 20)]
Alpha = Annotated[float, Meta(ge=-1e6, le=1e6)]


@dataclass(frozen=True)
class Pair:
    """One weight's update: scaling * b @ a."""

    a: Tensor  # (r, in) float32
    b: Tensor  # (out, r) float32
    scaling: float


@dataclass(frozen=True)
class Lora:
    """What an adapter changes, by the names of weights and norms without `.weight`."""

    folder: Path | None = None
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    # bases: tensors under an update; PEFT saves those of table and head. whole: tensors that stand in place of the model's.
    bases: Mapping[str, StoredTensor] = field(default_factory=dict)
    whole: Mapping[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
        """Read an adapter's updates, and the headers of its whole tensors.

        Args:
            folder: the adapter's.
            shapes: of all that the model has, norms and the head included. The adapter may give the tables other rows.

        Raises:
            InputError: no adapter, a kind that is not supported, a weight that the model lacks, or a wrong shape.
        """
        config, found = _config(folder), _read(folder, shapes)
        _check_saved(folder, config, shapes, found.whole)
        lora = cls(folder, {}, found.bases, found.whole)
        rows = lora.vocab_size
        if rows is not None:
            shapes = {**shapes, **{name: (rows, *shapes[name][1:]) for name in TABLES}}
        pairs = {
            weight: _pair(folder, config, found.modules[weight], sides, shapes[weight])
            for weight, sides in found.halves.items()
        }
        if not (pairs or lora.whole):
            raise InputError(f"{folder} holds no LoRA weight")
        return replace(lora, pairs=pairs)

    @property
    def vocab_size(self) -> int | None:
        """The rows of the adapter's table; None: it has none."""
        table = self.whole.get(TABLE) or self.bases.get(TABLE)
        return table.entry.shape[0] if table is not None and table.entry.shape else None

    def over(self, shards: Shards) -> Shards:
        """The model's tensors with the adapter's in their places.

        A head that was tied to the table is a tensor of its own there when the adapter changes one of the two: the other one is
        what it was, as in PEFT.

        Raises:
            InputError: table and head have different numbers of rows.
        """
        head, table = f"{HEAD}.weight", f"{TABLE}.weight"
        shards = shards.replaced({f"{name}.weight": tensor for name, tensor in self.bases.items()})
        if head not in shards and table in shards and any(name in self.pairs or name in self.whole for name in TABLES):
            shards = shards.replaced({head: shards[table]})
        shards = shards.replaced({f"{name}.weight": tensor for name, tensor in self.whole.items()})
        rows = {name: shards.header(f"{name}.weight")[0][:1] for name in TABLES if f"{name}.weight" in shards}
        if len(set(rows.values())) > 1:
            each = " and ".join(f"{name} {list(shape)}" for name, shape in rows.items())
            raise InputError(
                f"{self.folder}: with this adapter the model's tables have different numbers of rows, {each}",
                hint="save the adapter again with save_embedding_layers=True, which stores both",
            )
        return shards

    def rows(self, shards: Shards, weight: str, start: int, stop: int) -> Tensor:
        """Rows of a float matrix as float32, its update added as PEFT adds it."""
        values, pair = shards.rows(f"{weight}.weight", start, stop).float(), self.pairs.get(weight)
        if pair is not None:
            values += (pair.b[start:stop] @ pair.a).mul_(pair.scaling)
        return values


NO_LORA = Lora()


@dataclass
class _Found:
    """The tensors of an adapter by what they are; the keys are those of `Lora`."""

    halves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)  # names in the adapter: others beside an image encoder
    bases: dict[str, StoredTensor] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)


def _read(folder: Path, names: Collection[str]) -> _Found:
    """Sort the tensors of an adapter for a model with these weights and norms."""
    file, found = _file(folder), _Found()
    # the shortest name first: where a tensor is there under two, PEFT loads the one without `modules_to_save`
    for key in sorted(file.tensors, key=len):
        name, tensor = key.removeprefix(PREFIX), StoredTensor(file, key)
        if UNUSED.fullmatch(name):
            continue
        match = HALF.fullmatch(name) or WHOLE.fullmatch(name)
        weight = text_name(match["weight"]) if match else ""
        if match is None or weight not in names:
            known = any(name.startswith(f"{weight}.") for weight in names)
            raise InputError(
                f"{folder}: {key} is not a LoRA of a weight of this model",
                hint=MERGE_FIRST if known else "pass the model that the adapter was trained on",
            )
        if match.re is HALF:
            found.modules[weight] = match["weight"]
            side, half = _half(match, tensor)
            found.halves.setdefault(weight, {})[side] = half
        else:
            (found.bases if match["kind"] == "base_layer" else found.whole).setdefault(weight, tensor)
    return found


def _half(match: re.Match[str], tensor: StoredTensor) -> tuple[str, Tensor]:
    """One half of an update, and which one: A is (r, in), B is (out, r). PEFT stores those of a table transposed."""
    shape, side = tensor.entry.shape, match["side"]
    if len(shape) != 2:
        raise InputError(f"{tensor.file.path}: {tensor.name} has shape {list(shape)}; half a LoRA has two axes")
    values = tensor.rows().float()
    return ("BA"["AB".index(side)], values.T) if match["embedding"] else (side, values)


def _pair(folder: Path, config: _Adapter, weight: str, sides: Mapping[str, Tensor], shape: tuple[int, ...]) -> Pair:
    if set(sides) != {"A", "B"}:
        raise InputError(f"{folder}: {weight} has only lora_{next(iter(sides))}; the other half is missing")
    a, b = sides["A"], sides["B"]
    if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{folder}: {weight} has a LoRA of {list(b.shape)} x {list(a.shape)}, the weight is {list(shape)}"
        )
    return Pair(a, b, _scaling(config, weight, a.shape[0]))


def _check_saved(
    folder: Path, config: _Adapter, shapes: Mapping[str, tuple[int, ...]], whole: Mapping[str, StoredTensor]
) -> None:
    """Refuse an adapter in which a trained module of the model is missing."""
    for weight in shapes:
        parts = weight.split(".")
        modules = [".".join(parts[: end + 1]) for end in range(len(parts))]
        named = [name for name in config.modules_to_save or () if any(each.endswith(name) for each in modules)]
        if named and weight not in whole:
            raise InputError(
                f"{folder}: modules_to_save names {shown(named[0])}, but adapter_model.safetensors holds no"
                f" {weight}.weight",
                hint="save the adapter with PEFT again",
            )


@dataclass(frozen=True)
class _Adapter:
    """The keys of adapter_config.json that a merge uses, with PEFT's defaults."""

    r: Rank | None = None  # None: the rank of the weights
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = None
    modules_to_save: list[str] | None = None


def _config(folder: Path) -> _Adapter:
    path = folder / "adapter_config.json"
    config = read_json(path, "`lora` takes a PEFT adapter folder")
    for key, allowed in ONLY_VALUE.items():
        if key in config and config[key] not in allowed:
            unmergeable = key in NEVER_MERGED or config[key] in NEVER_MERGED
            raise InputError(
                f"{path}: {key} is {shown(config[key])}; only plain LoRA is merged",
                hint=TRAIN_AGAIN if unmergeable else MERGE_FIRST,
            )
    adapter = typed_value(config, _Adapter, path, "save the adapter with PEFT again")
    for key, names in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        try:
            patterns.check(_whole(name) for name in names or ())
        except patterns.PatternError as error:
            raise InputError(f"{path}: {key} has a regular expression that is not read ({error})") from None
    return adapter


def _file(folder: Path) -> SafetensorsFile:
    path = folder / "adapter_model.safetensors"
    if not present(path):
        raise InputError(f"{folder} has no adapter_model.safetensors; pickle adapters are not read")
    return SafetensorsFile(path)


def _scaling(config: _Adapter, weight: str, rank: int) -> float:
    alpha = _pattern(config.alpha_pattern, weight, config.lora_alpha)
    declared = _pattern(config.rank_pattern, weight, rank if config.r is None else config.r)
    if declared != rank:
        raise InputError(f"LoRA of {weight} has rank {rank}, adapter_config.json says {declared}")
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _whole(pattern: str) -> str:
    """PEFT's expression for a key of a pattern: it matches the end of a module's name."""
    return rf"(.*\.)?({pattern})$"


def _pattern(values: Mapping[str, float] | None, weight: str, default: float) -> float:
    """The value of the first key that matches the end of the module's name as a regular expression, as in PEFT."""
    for key, value in (values or {}).items():
        if patterns.matches(_whole(key), weight):
            return value
    return default
