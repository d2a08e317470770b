"""The parts of a manifest: what a bundle was made from and how, its backends and files, and how good it is.

docs/export/bundle-format.md explains each key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final, Generic, Literal, TypeVar

from gemma_edge.bundle.accelerators import CPU, Accelerator
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.ranges import (
    Bytes,
    Chunk,
    Count,
    Dtype,
    Figure,
    HeadDim,
    Heads,
    Layers,
    Magnitude,
    Name,
    Positive,
    Scale,
    Sha256,
    Share,
    Threads,
    TokenId,
    Tokens,
    Width,
)
from gemma_edge.bundle.settings import roles

S = TypeVar("S")  # a class of settings.py
FIGURES = ("Figure", "Magnitude", "Share")  # annotations of fields that may be null in the file
LOCAL: Final = "sliding_attention"
GLOBAL: Final = "full_attention"
LayerType = Literal["sliding_attention", "full_attention"]
Architecture = Literal["gemma", "gemma2", "gemma3_text"]  # transformers' `model_type`


class _Figures:
    """Reads null, which stands for a figure that is not finite, as NaN."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if field.type in FIGURES and getattr(self, field.name) is None:
                object.__setattr__(self, field.name, math.nan)


@dataclass(frozen=True)
class VocabularyEntry:
    """What `vocab` left of the original's tokens."""

    tokens: Tokens  # rows that the original's table has
    kept: Tokens
    text: tuple[str, ...]  # names of the files whose tokens are kept
    by_characters: bool  # whether every other token of the same characters is kept, too


@dataclass(frozen=True)
class ModelEntry:
    """The checkpoint."""

    name: Name  # its folder
    architecture: Architecture
    parameters: Count  # of the original, with the rows that are kept
    lora: str | None  # folder of the adapter that was merged; None: no adapter
    vocabulary: VocabularyEntry | None = None  # None: every token is kept


@dataclass(frozen=True)
class ModelConfig:
    """The model's configuration, under Hugging Face's keys. The same keys as GemmaConfig in model/config.py."""

    vocab_size: Tokens
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads
    head_dim: HeadDim
    layer_types: tuple[LayerType, ...]
    query_pre_attn_scalar: Scale
    sliding_window: Tokens
    max_position_embeddings: Tokens
    attn_logit_softcapping: Scale | None
    final_logit_softcapping: Scale | None
    rms_norm_eps: Scale
    rope_theta: Scale
    bos_token_id: TokenId
    eos_token_id: tuple[TokenId, ...]
    # tie_word_embeddings: False: the head is a matrix of its own. The tensors decide it, see model/checkpoint.py.
    tie_word_embeddings: bool = True
    architecture: Architecture = "gemma2"
    qk_norm: bool = False  # whether each head's queries and keys are normalised before they are rotated
    rope_factor: Scale = 1.0  # positions are divided by it
    # rope_local_base_freq: rope_theta of the local layers; None: as the global layers, factor included
    rope_local_base_freq: Scale | None = None
    rope_local_factor: Scale = 1.0


@dataclass(frozen=True)
class IntegersEntry:
    """The integers of a weight."""

    bits: Literal[4, 8]
    group_size: Count  # along a row; 0: one scale per output channel
    symmetric: bool


@dataclass(frozen=True)
class RuleEntry:
    """What the weights whose name matches a pattern were to become."""

    pattern: str
    config: IntegersEntry | None  # None: float
    method: Name


@dataclass(frozen=True)
class PartEntry:
    """What the weights of one kind became."""

    part: Name
    bits: Literal[4, 8, 16, 32]
    group_size: Count  # 0: one scale per output channel, or float
    count: Count  # matrices
    weights: Count
    bytes: Bytes  # integers and 16-bit scales


@dataclass(frozen=True)
class LayerError(_Figures):
    """How far one quantized layer is from the original."""

    layer: Count
    relative_error: Magnitude  # of the residual stream after the layer


@dataclass(frozen=True)
class Distilled(_Figures):
    """What distillation did to windows that it was not trained on."""

    tokens: Count  # trained on
    kl_before: Magnitude  # nats per token
    kl_after: Magnitude


@dataclass(frozen=True)
class CalibrationEntry:
    """The text that the quantizer looked at, and what it saw."""

    tokens: Count = 0  # 0: no calibration
    text: tuple[str, ...] = ()  # names of files
    seed: int = 0  # for choosing the passages
    layers: tuple[LayerError, ...] = ()
    distilled: Distilled | None = None


@dataclass(frozen=True)
class RecipeEntry:
    """How the weights were quantized."""

    name: Name
    rules: tuple[RuleEntry, ...]  # requested; the first rule that matches a weight decides
    float_bits: Literal[16, 32]  # of matrices that stay float
    parts: tuple[PartEntry, ...]  # the result
    calibration: CalibrationEntry


@dataclass(frozen=True)
class TargetEntry:
    """The class of devices that the bundle was made for."""

    name: Name
    ram_bytes: Bytes  # that the app may take
    threads: Threads  # unless the user asks for another number


@dataclass(frozen=True)
class PlanEntry:
    """What was predicted before the export, for one backend."""

    target: Name
    backend: Name
    recipe: Name
    context: Tokens
    prefill_chunk: Chunk
    kv_dtype: Dtype
    weights_bytes: Bytes
    kv_bytes: Bytes
    device_ram_bytes: Bytes
    device_ram_limit_bytes: Bytes
    export_ram_bytes: Bytes
    export_disk_bytes: Bytes
    # token_bytes: of the weights that a decoded token reads; None: made before this was predicted
    token_bytes: Bytes | None = None
    pinned: Count = 0  # tokens that a text's beginning may keep beyond the context
    accelerator: Accelerator = CPU  # as in BackendEntry


@dataclass(frozen=True)
class Difference(_Figures):
    """A comparison of two models' logits over the same tokens."""

    tokens: Count  # positions compared
    kl: Magnitude  # mean, nats, reference to bundle
    top1: Share  # part of the positions with the same most likely token
    ppl: Magnitude
    ppl_reference: Magnitude
    ppl_change: Figure  # relative
    max_abs_logit_difference: Magnitude
    logit_range: Magnitude  # of the reference


@dataclass(frozen=True)
class LimitsEntry:
    """What a bundle has to reach to be published."""

    kl: Positive
    top1: Positive
    ppl_change: Positive
    lowering: Positive  # part of the reference's logit range
    lowering_kl: Positive | None = None  # None: made before there was this limit


@dataclass(frozen=True)
class GateResult(_Figures):
    """What the gate measured of one backend."""

    level: Literal["quick", "full"]
    text: str  # fed to the model
    fed_tokens: Count
    past_wrap: bool  # whether they went past the end of the context
    quality: Difference  # to the original
    quality_past_context: (
        Difference | None
    )  # only positions past the end of the context; None: the gate did not get there
    lowering: Difference  # to the same integers in torch
    generation_difference: Magnitude  # largest difference between generating and scoring
    limits: LimitsEntry
    failures: tuple[str, ...]
    passed: bool
    judged_on: Name = CPU  # an accelerator, or what stood in for one: swiftshader


@dataclass(frozen=True)
class BackendEntry(Generic[S]):
    """One backend of a bundle. Backends share the integers and the context; each keeps its cache in its own way."""

    cache: CacheGeometry
    plan: PlanEntry
    settings: S  # a class of settings.py; a dict for a backend that is not known
    identity: Sha256  # of what a saved state depends on: see `state_identity`
    accelerator: Accelerator = CPU  # what its files were made for

    @property
    def files(self) -> list[str]:
        """Names of the backend's own files."""
        return list(dict.fromkeys(roles(self.settings).values()))


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle."""

    bytes: Bytes
    sha256: Sha256
