"""What an evaluation finds, in numbers. Tables are made of it by report.py, the page by html.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_edge.evaluate.memorization import Memorization


@dataclass
class Result:
    """The numbers of one model. A field is None where there is no reference, or where it is not known."""

    name: str
    path: str
    kind: str  # bundle or folder
    backend: str
    size: int  # bytes
    bits_per_weight: float | None
    protocol: str
    window: int  # tokens
    tokens: int = 0  # tokens that were scored
    ppl: float = 0.0
    ppl_change: float | None = None  # relative to the reference's: 0.1 is a tenth more
    kl: float | None = None  # nats per token, reference || model
    top1: float | None = None  # share of positions where both find the same token the most likely
    kl_by_position: list[dict[str, float]] = field(default_factory=list)  # {first, last, kl}: positions in the window
    layers: list[float] = field(default_factory=list)  # relative error of each layer's output
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> metric -> value
    memorization: Memorization | None = None


@dataclass
class Evaluation:
    """The results of all models, and what they were measured on."""

    protocol: str
    window: int  # tokens
    texts: list[str]  # paths, or names of the texts that are shipped
    reference: Result | None
    results: list[Result]  # in the order of the models that were given
    notes: list[str]  # what a reader must know to read the numbers rightly
