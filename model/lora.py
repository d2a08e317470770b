"""A LoRA adapter in PEFT's folder format, merged tensor by tensor. Source: PEFT, `tuners/lora/layer.py` (`get_delta_weight`).

Only plain LoRA on the linears: DoRA, trained biases, whole saved modules and adapters of the table are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from torch import Tensor

from gemma_edge.bundle.codec import shown, typed_value
from gemma_edge.errors import InputError, one_line
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.reading import present, read_json

# ONLY_VALUE: keys of adapter_config.json that change the merged weight, and the values that this file computes.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
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
KEY = re.compile(r"(?:base_model\.model\.)?(?P<weight>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

Rank = Annotated[int, Meta(ge=1, le=1 << 20)]
Alpha = Annotated[float, Meta(ge=-1e6, le=1e6)]


@dataclass(frozen=True)
class Pair:
    """One weight's update: scaling * b @ a."""

    a: Tensor  # (r, in) float32
    b: Tensor  # (out, r) float32
    scaling: float


class Lora:
    """Updates by weight name, without `.weight`."""

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        self.pairs = pairs

    @classmethod
    def open(cls, folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Lora:
        """Read an adapter for weights of the given (out, in) shapes.

        Raises:
            InputError: no adapter, a kind that is not plain LoRA, a weight that the model lacks, or a wrong shape.
        """
        config = _config(folder)
        tensors = _tensors(folder)
        sides: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            match = KEY.fullmatch(key)
            if match is None or match["weight"] not in shapes:
                raise InputError(f"{folder}: {key} is not a LoRA of a weight of this model")
            sides.setdefault(match["weight"], {})[match["side"]] = value.float()
        pairs = {}
        for weight, side in sides.items():
            out_features, in_features = shapes[weight]
            if set(side) != {"A", "B"}:
                raise InputError(f"{folder}: {weight} has only lora_{next(iter(side))}; the other half is missing")
            rank = side["A"].shape[0]
            if side["A"].shape != (rank, in_features) or side["B"].shape != (out_features, rank):
                shape = f"{list(side['B'].shape)} x {list(side['A'].shape)}"
                raise InputError(
                    f"{folder}: {weight} has a LoRA of {shape}, the weight is {[out_features, in_features]}"
                )
            pairs[weight] = Pair(side["A"], side["B"], _scaling(config, weight, rank))
        if not pairs:
            raise InputError(f"{folder} holds no LoRA weight")
        return cls(pairs)

    def add_to(self, values: Tensor, weight: str, start: int) -> None:
        """Add the update to rows `start ...` of a float32 weight, in place."""
        pair = self.pairs.get(weight)
        if pair is not None:
            values.addmm_(pair.b[start : start + len(values)], pair.a, alpha=pair.scaling)


@dataclass(frozen=True)
class _Adapter:
    """The keys of adapter_config.json that a merge uses, with PEFT's defaults."""

    r: Rank | None = None  # None: the rank of the weights
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = None


def _config(folder: Path) -> _Adapter:
    path = folder / "adapter_config.json"
    config = read_json(path, "`lora` takes a PEFT adapter folder")
    for key, allowed in ONLY_VALUE.items():
        if key in config and config[key] not in allowed:
            raise InputError(
                f"{path}: {key} is {shown(config[key])}; only plain LoRA is merged: merge it with PEFT first"
            )
    adapter = typed_value(config, _Adapter, path, "save the adapter with PEFT again")
    try:
        for pattern in [*(adapter.rank_pattern or ()), *(adapter.alpha_pattern or ())]:
            re.compile(_whole(pattern))
    except re.error as error:
        raise InputError(f"{path}: {shown(pattern)} is not a regular expression ({one_line(error)})") from None
    return adapter


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not present(path):
        raise InputError(f"{folder} has no adapter_model.safetensors; pickle adapters are not read")
    return SafetensorsFile(path).whole()


def _scaling(config: _Adapter, weight: str, rank: int) -> float:
    alpha = _pattern(config.alpha_pattern, weight, config.lora_alpha)
    declared = _pattern(config.rank_pattern, weight, rank if config.r is None else config.r)
    if declared != rank:
        raise InputError(f"LoRA of {weight} has rank {rank}, adapter_config.json says {declared}")
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _whole(pattern: str) -> str:
    """PEFT's expression for a key of a pattern: it matches the end of a module's name."""
    return rf"(.*\.)?({pattern})$"


def _pattern(patterns: Mapping[str, float] | None, weight: str, default: float) -> float:
    """The value of the first key that matches the end of the module's name as a regular expression, as in PEFT."""
    for key, value in (patterns or {}).items():
        if re.match(_whole(key), weight):
            return value
    return default
