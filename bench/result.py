"""The result of a benchmark, and its JSON: the same whether gemma-bench, the Android app or a peer's tool was measured.

Only what was measured stands in it, sample by sample; medians and percentiles are bench_stats.py's. docs/benchmarking.md says
what each field means: whoever writes this JSON follows that page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    threads: int
    prefill: int  # tokens of the prompt
    decode: int  # tokens generated after it
    repeat: int = 5
    warmup: int = 1  # repetitions before the first one that counts
    minutes: float = 0.0  # go on repeating for this long


@dataclass
class Result:
    """One process that loaded one model and ran prompt and generation `repeat` times."""

    tool: str  # what was measured: gemma-bench, gemma-edge-android, llama-bench, onnxruntime-genai
    started: str  # ISO 8601, UTC
    model: dict[str, Any]  # name, backend; bytes, context, read_bytes_per_token, manifest_sha256 where they are known
    settings: Settings
    device: dict[str, Any]  # name, system, cores, ...; read_gb_per_s
    versions: dict[str, str] = field(default_factory=dict)
    load: dict[str, float] = field(default_factory=dict)  # warm_s, cold_s
    prefill_s: list[float] = field(default_factory=list)  # per repetition
    ttft_s: list[float] = field(default_factory=list)  # per repetition: until the first token is chosen
    decode_s: list[float] = field(default_factory=list)  # per repetition: all its tokens
    decode_ms: list[list[float]] = field(
        default_factory=list
    )  # per repetition, of each token; [] where a tool tells sums only
    decode_at_s: list[float] = field(default_factory=list)  # when each decode began, since the process started
    memory: dict[str, Any] = field(
        default_factory=dict
    )  # loaded_mib, end_mib, peak_mib, samples [[at_s, rss_mib], ...]
    state: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # before, after: temperature, clock, battery, thermal status
    energy: dict[str, Any] = field(default_factory=dict)  # source, prefill_j, decode_j: of all repetitions
    others_cores: float | None = None  # that other processes kept busy meanwhile
    failure: str = ""  # one line; the samples are then empty

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """Inverse of `asdict`; keys that are not known are left out, so that a newer writer can be read.

        Raises:
            TypeError: a key is missing.
        """
        known = {name.name for name in fields(cls)} & data.keys()
        asked = {name.name for name in fields(Settings)} & data["settings"].keys()
        settings = Settings(**{name: data["settings"][name] for name in asked})
        return cls(**{**{name: data[name] for name in known}, "settings": settings})


def to_json(results: Iterable[Result]) -> str:
    """The document: its version and every result."""
    document = {"schema_version": SCHEMA_VERSION, "results": [asdict(result) for result in results]}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def read(text: str, source: str) -> list[Result]:
    """The results of a document.

    Raises:
        InputError: no document of this schema; `source` is named.
    """
    try:
        data = json.loads(text)
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{source}: schema_version {version}, this gemma-bench reads {SCHEMA_VERSION}; measure again"
            )
        results = [Result.from_json(entry) for entry in data["results"]]
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{source} holds no results of gemma-bench ({error!r}); write them with --save") from None
    if not results:
        raise InputError(f"{source} holds no result; measure again")
    return results


def load(paths: Sequence[Path]) -> list[Result]:
    """The results of several files, one after the other.

    Raises:
        InputError: a file is missing or not of this schema.
    """
    found = []
    for path in paths:
        try:
            found += read(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"cannot read {path}: {reason}; give a file that gemma-bench --save wrote") from None
    return found
