"""What each backend's engine needs to know of its files: `backends.NAME.settings` of a manifest.

A backend that is not listed here keeps its settings as plain JSON, so that a bundle with a newer backend can still be opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemma_edge.bundle.ranges import Name, Version
from gemma_edge.bundle.signature import Signature


@dataclass(frozen=True)
class OnnxSettings:
    """Files of the ONNX backend. A graph that is null is not in the bundle."""

    generate: Name  # graph with the logits of the last position
    score: Name | None  # graph with the logits of every position
    genai: Name | None  # graph for onnxruntime-genai
    weights: Name | None  # file from which the graphs read their weights
    accuracy_level: Literal[0, 4]  # of MatMulNBits: 4 rounds activations to int8 per block, 0 computes in float
    min_onnxruntime: Version  # oldest ONNX Runtime that has every operator
    # feeds, prefill: of graphs in plain operators, with static shapes. `feeds` makes what the others are fed; there `generate`
    # takes one token, `prefill` and `score` take a chunk
    feeds: Name | None = None
    prefill: Name | None = None

    @property
    def roles(self) -> dict[str, str]:
        """Files by role."""
        names = ("generate", "score", "genai", "weights", "feeds", "prefill")
        roles: dict[str, str | None] = {name: getattr(self, name) for name in names}
        return {role: name for role, name in roles.items() if name is not None}


@dataclass(frozen=True)
class Methods:
    """Names of an ExecuTorch program's methods."""

    generate: Name  # method with the logits of the last position
    score: Name  # method with the logits of every position


@dataclass(frozen=True)
class _ProgramSettings:
    """A backend whose only file is its program."""

    program: Name

    @property
    def roles(self) -> dict[str, str]:
        """Files by role."""
        return {"program": self.program}


@dataclass(frozen=True)
class ExecuTorchSettings(_ProgramSettings):
    """The program of the ExecuTorch backend, a `.pte` file."""

    methods: Methods
    min_executorch: Version


@dataclass(frozen=True)
class SignatureSettings(_ProgramSettings):
    """A `.tflite` file and what it can compute."""

    signatures: tuple[Signature, ...]


@dataclass(frozen=True)
class TFLiteSettings(SignatureSettings):
    """The model of the TFLite backend, and of the web backend."""

    min_litert: Version


@dataclass(frozen=True)
class TFLiteRuntimeSettings(SignatureSettings):
    """The model of the tflite-runtime backend."""

    min_tflite_runtime: Version


# Settings by backend
SETTINGS: dict[str, Any] = {
    "onnx": OnnxSettings,
    "executorch": ExecuTorchSettings,
    "tflite": TFLiteSettings,
    "tflite-runtime": TFLiteRuntimeSettings,
    "web": TFLiteSettings,
}


def roles(settings: object) -> dict[str, str]:
    """Files by role; none for a backend that is not listed here."""
    if isinstance(settings, Mapping):
        return {}
    result: dict[str, str] = settings.roles  # type: ignore[attr-defined]
    return result
