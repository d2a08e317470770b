"""The toy's engine: Gemma 2 in numpy, everything computed anew at every call, no cache. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime

FILE = "toy.npz"


class ToyEngine(Runtime):
    """Keeps all tokens since the last reset."""

    def __init__(self, bundle: Path, manifest: Manifest, *, threads: int | None) -> None:
        entry = manifest.backends["toy"]
        super().__init__(bundle, manifest, entry.cache, entry.identity)
        arrays = np.load(bundle / FILE)
        self._arrays: dict[str, NDArray[Any]] = {name: arrays[name] for name in arrays.files}
        self._config: dict[str, Any] = json.loads(str(self._arrays.pop("config")))
        self._fed: list[int] = []

    def _holds(self, position: int, written: int) -> bool:
        return True

    def _clear(self) -> None:
        self._fed = []

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        self._fed = [*self._fed[: self.position], *ids.tolist()]
        rows = self._logits(self._fed)
        logits: Logits = rows[-len(ids) :] if every_position else rows[-1:]
        return logits

    def _logits(self, ids: list[int]) -> Logits:
        c, w = self._config, self._arrays
        table = w["model.embed_tokens"]
        x = table[ids] * c["hidden_size"] ** 0.5  # (T, hidden)
        for layer, geometry in enumerate(self.cache.layers):
            prefix = f"model.layers.{layer}"
            x = x + self._norm(
                self._attend(self._norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn", geometry.window),
                f"{prefix}.post_attention_layernorm",
            )
            x = x + self._norm(
                self._mlp(self._norm(x, f"{prefix}.pre_feedforward_layernorm"), f"{prefix}.mlp"),
                f"{prefix}.post_feedforward_layernorm",
            )
        logits: Logits = _capped(self._norm(x, "model.norm") @ table.T, c["final_logit_softcapping"])
        return logits

    def _norm(self, x: NDArray[Any], name: str) -> NDArray[Any]:
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + self._config["rms_norm_eps"])
        scaled: NDArray[Any] = x / rms * (1 + self._arrays[f"{name}.weight"])
        return scaled

    def _mlp(self, x: NDArray[Any], name: str) -> NDArray[Any]:
        gate, up, down = (self._arrays[f"{name}.{part}_proj"] for part in ("gate", "up", "down"))
        g = x @ gate.T
        gelu = 0.5 * g * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
        out: NDArray[Any] = (gelu * (x @ up.T)) @ down.T
        return out

    def _attend(self, x: NDArray[Any], name: str, window: int) -> NDArray[Any]:
        c, tokens = self._config, len(x)
        heads, kv_heads, head_dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

        def split(kind: str, count: int) -> NDArray[Any]:
            rows: NDArray[Any] = x @ self._arrays[f"{name}.{kind}_proj"].T
            return rows.reshape(tokens, count, head_dim).swapaxes(0, 1)

        q, k, v = self._rotated(split("q", heads)), self._rotated(split("k", kv_heads)), split("v", kv_heads)
        k, v = (each.repeat(heads // kv_heads, axis=0) for each in (k, v))  # (H, T, D)
        scores = _capped(q @ k.swapaxes(1, 2) * c["query_pre_attn_scalar"] ** -0.5, c["attn_logit_softcapping"])
        age = np.arange(tokens)[:, None] - np.arange(tokens)
        scores = np.where((age >= 0) & (age < window), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = ((p / p.sum(-1, keepdims=True)) @ v).swapaxes(0, 1).reshape(tokens, -1)
        attended: NDArray[Any] = out @ self._arrays[f"{name}.o_proj"].T
        return attended

    def _rotated(self, x: NDArray[Any]) -> NDArray[Any]:
        head_dim = x.shape[-1]
        angles = np.arange(x.shape[1])[:, None] / self._config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(np.float32)


def _capped(x: NDArray[Any], cap: float | None) -> NDArray[Any]:
    return x if cap is None else np.tanh(x / cap) * cap
