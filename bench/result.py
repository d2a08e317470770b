"""The result of a benchmark, and its JSON: the same whether gemma-bench, the Android app or a peer's tool was measured.

A result holds measurements only, sample by sample; medians and percentiles are stats.py's. For every program that writes this
JSON, docs/measure/benchmarking.md says what each field means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError, one_line
from gemma_edge.reading import MAX_JSON, parse_json, read_text

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What one process is asked to do."""

    threads: int
    prefill: int  # tokens of the prompt
    decode: int  # tokens generated after the prompt
    repeat: int = 5  # repetitions that count
    warmup: int = 1  # repetitions before them, which do not count
    minutes: float = 0.0  # how long the process goes on repeating, beyond `repeat`


@dataclass
class Result:
    """One process that loaded one model and ran prompt and generation `repeat` times."""

    tool: str  # gemma-bench, gemma-edge-android, llama-bench or onnxruntime-genai
    started: str  # ISO 8601, UTC
    model: dict[str, Any]  # name, backend; bytes, context, read_bytes_per_token, manifest_sha256 where they are known
    settings: Settings
    device: dict[str, Any]  # name, system, cores, ...; read_gb_per_s
    versions: dict[str, str] = field(default_factory=dict)  # package -> version
    load: dict[str, float] = field(default_factory=dict)  # warm_s, cold_s
    prefill_s: list[float] = field(default_factory=list)  # per repetition: until the prompt's logits
    ttft_s: list[float] = field(default_factory=list)  # per repetition: until the first token is chosen
    decode_s: list[float] = field(default_factory=list)  # per repetition: all its tokens
    # per repetition: the latency of each token; [] for a tool that tells only their sum
    decode_ms: list[list[float]] = field(default_factory=list)
    decode_at_s: list[float] = field(
        default_factory=list
    )  # per repetition: when decoding began, since the process started
    # loaded_mib, end_mib, peak_mib; samples: [[at_s, rss_mib], ...]
    memory: dict[str, Any] = field(default_factory=dict)
    # before and after: temperature, clock, battery, thermal status
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)  # source; prefill_j, decode_j: sums of all repetitions
    others_cores: float | None = None  # cores that other processes kept busy meanwhile
    failure: str = ""  # why there is no measurement, in one line; the samples are then empty

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of `asdict`. Unknown keys are ignored, so that what a newer program wrote can be read.

        Raises:
            TypeError: a key is missing.
        """
        known = {name: data[name] for name in _names(cls) & data.keys()}
        settings = {name: data["settings"][name] for name in _names(Settings) & data["settings"].keys()}
        return cls(**{**known, "settings": Settings(**settings)})


def _names(kind: type[Result] | type[Settings]) -> set[str]:
    return {part.name for part in fields(kind)}


def to_json(results: Iterable[Result]) -> str:
    """The JSON document: the version of its schema, and every result."""
    document = {"schema_version": SCHEMA_VERSION, "results": [asdict(result) for result in results]}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def read(text: str, source: str) -> list[Result]:
    """The results in a JSON document.

    Args:
        text: the document.
        source: where it comes from, for the error.

    Raises:
        InputError: the text is not a document of this schema.
    """
    try:
        data = parse_json(text.encode())
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{source}: schema_version {version}, this gemma-bench reads {SCHEMA_VERSION}; measure again"
            )
        results = [Result.from_json(entry) for entry in data["results"]]
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{source} holds no results of gemma-bench ({one_line(error)}); write them with `save`"
        ) from None
    if not results:
        raise InputError(f"{source} holds no result; measure again")
    return results


def load(paths: Sequence[Path]) -> list[Result]:
    """The results in several files, one after the other.

    Raises:
        InputError: a file cannot be read, or is not a document of this schema.
    """
    results = []
    for path in paths:
        results += read(read_text(path, "give a file that gemma-bench has saved", max_bytes=MAX_JSON), str(path))
    return results
