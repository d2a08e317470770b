"""Small stand-ins for tests of the runtimes: a language model in five lines, and a bundle around a hand-made ONNX graph."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gemma_edge.bundle.entries import BackendEntry, CalibrationEntry, ModelConfig, ModelEntry, RecipeEntry, TargetEntry
from gemma_edge.bundle.geometry import CacheGeometry, LayerCache
from gemma_edge.bundle.manifest import MANIFEST, Manifest, list_files, with_identities
from gemma_edge.bundle.settings import OnnxSettings
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime
from support.checkpoints import DEMO, plan_of

VOCAB = 4096  # the demo tokenizer's
HEADS, HEAD_DIM = 2, 16
HIDDEN = HEADS * HEAD_DIM
WINDOWS = (6, 10)  # a local layer and a global one; the context is 10
CHUNK = 4
EOS, END_OF_TURN = 1, 5
CYCLE = [100, 200, 300, 400, 500, 600, 700]
TOY_CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=HIDDEN,
    num_hidden_layers=len(WINDOWS),
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    head_dim=HEAD_DIM,
    layer_types=("sliding_attention", "full_attention"),
    query_pre_attn_scalar=float(HEAD_DIM),
    sliding_window=WINDOWS[0],
    max_position_embeddings=64,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    bos_token_id=2,
    eos_token_id=(EOS,),
)
TOY_RECIPE = RecipeEntry("float32", rules=(), float_bits=32, parts=(), calibration=CalibrationEntry())
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# GEMMA3_TEMPLATE: writes conversations as Gemma 3's own template does: what the system says is the beginning of the user's first
# turn, and a content may be a list of parts.
GEMMA3_TEMPLATE = """\
{{ bos_token }}
{%- set turns, said = messages, "" -%}
{%- if messages[0]["role"] == "system" -%}
    {%- set turns = messages[1:] -%}
    {%- set content = messages[0]["content"] -%}
    {%- set said = (content if content is string else content[0]["text"]) + "\\n\\n" -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn["role"] == "user") != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {{ "<start_of_turn>" + ("model" if turn["role"] == "assistant" else turn["role"]) + "\\n" + (said if loop.first else "") }}
    {%- if turn["content"] is string -%}
        {{ turn["content"] | trim }}
    {%- elif turn["content"] is iterable -%}
        {%- for part in turn["content"] -%}
            {{ "<start_of_image>" if part["type"] == "image" else part["text"] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ "<end_of_turn>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<start_of_turn>model\\n" }}
{%- endif -%}
"""


def toy_settings(generate: str = "generate.onnx", score: str | None = "score.onnx") -> OnnxSettings:
    """The files of a toy."""
    return OnnxSettings(generate, score, genai=None, weights=None, accuracy_level=0, min_onnxruntime="1.29")


def toy_backend(settings: OnnxSettings | None = None, **geometry: Any) -> BackendEntry[OnnxSettings]:
    """The onnx backend of a toy, with other settings or changes of its cache."""
    cache = CacheGeometry(
        context=max(WINDOWS),
        prefill_chunk=CHUNK,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype="float32",
        layers=tuple(LayerCache(window, window + CHUNK - 1) for window in WINDOWS),
    )
    cache = replace(cache, **geometry)
    return BackendEntry(cache, plan_of(cache, "onnx"), settings or toy_settings(), identity="")


def toy_manifest(**changes: Any) -> Manifest:
    """The manifest of a toy, with changes."""
    manifest = Manifest(
        model=ModelEntry("toy", "gemma2", parameters=1000, lora=None),
        config=TOY_CONFIG,
        recipe=TOY_RECIPE,
        target=TargetEntry("test", ram_bytes=1 << 30, threads=2),
        backends={"onnx": toy_backend()},
        files={},
        tokenizer=True,
        tools={},
        verification={},
        created="2026-01-01T00:00:00+00:00",
    )
    return with_identities(replace(manifest, **changes))


class ToyRuntime(Runtime):
    """Logits are random numbers seeded by all tokens fed since the reset, so any token lost or fed twice changes them."""

    def __init__(self, manifest: Manifest | None = None, allowed: range = range(7, VOCAB), stop_after: int = 0) -> None:
        manifest = manifest or toy_manifest()
        entry = manifest.backends["onnx"]
        super().__init__(Path("toy"), manifest, entry.cache, entry.identity)
        self.allowed = allowed  # only these can be chosen
        self.stop_after = stop_after  # position from which END_OF_TURN is the most likely at every tenth position
        self.fed: list[int] = []  # since the last reset
        self.chunks: list[int] = []  # lengths of all forward calls
        self.resets = 0

    def _holds(self, position: int, written: int) -> bool:
        return True

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        rows = []
        assert self.position <= len(self.fed)
        del self.fed[self.position :]  # taken back
        self.chunks.append(len(ids))
        for token in ids.tolist():
            self.fed.append(token)
            row = np.full(VOCAB, -1e4, np.float32)
            row[self.allowed.start : self.allowed.stop] = np.random.default_rng(self.fed).normal(size=len(self.allowed))
            if self.stop_after and len(self.fed) >= self.stop_after and len(self.fed) % 10 == 0:
                row[END_OF_TURN] = 100
            rows.append(row)
        return np.stack(rows if every_position else rows[-1:])

    def _clear(self) -> None:
        self.fed = []
        self.resets += 1


class RepeatingRuntime(ToyRuntime):
    """Goes round a cycle of tokens, most of the time."""

    def __init__(self, strays: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        self.strays = strays

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        logits = super()._forward(ids, every_position=every_position)
        start = len(self.fed) - len(logits)
        for row, at in zip(logits, range(start, len(self.fed)), strict=True):
            rng = np.random.default_rng(self.fed[: at + 1])
            if rng.random() > self.strays:
                row[CYCLE[(CYCLE.index(self.fed[at]) + 1) % len(CYCLE) if self.fed[at] in CYCLE else 0]] += 20
        return logits


def toy_weights() -> dict[str, NDArray[np.float32]]:
    """Embedding, also the head, and one matrix per layer for each of q, k, v."""
    rng = np.random.default_rng(0)
    weights = {"table": rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)}
    weights["table"][[EOS, END_OF_TURN]] = 0  # never chosen
    for layer in range(len(WINDOWS)):
        for name in "qkv":
            weights[f"{name}{layer}"] = (rng.normal(size=(HIDDEN, HIDDEN)) / HIDDEN**0.5).astype(np.float32)
    return weights


def toy_logits(ids: list[int]) -> Logits:
    """(T, V) logits of the toy graph, in numpy and without a cache."""
    weights = toy_weights()
    x = weights["table"][ids]  # (T, hidden)
    age = np.arange(len(ids))[:, None] - np.arange(len(ids))[None, :]
    for layer, window in enumerate(WINDOWS):
        q, k, v = (
            (x @ weights[f"{name}{layer}"]).reshape(-1, HEADS, HEAD_DIM).swapaxes(0, 1) for name in "qkv"
        )  # (H, T, D)
        scores = np.where((age >= 0) & (age < window), q @ k.swapaxes(1, 2) / HEAD_DIM**0.5, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + ((p / p.sum(-1, keepdims=True)) @ v).swapaxes(0, 1).reshape(-1, HIDDEN)
    logits: Logits = x @ weights["table"].T
    return logits


def toy_graph(role: str, dtype: str = "float32") -> onnx.ModelProto:
    """The `generate` or `score` graph of the toy, under the bundle's contract."""
    node = helper.make_node
    cache = toy_backend().cache
    int8 = dtype == "int8"
    element = TensorProto.INT8 if int8 else TensorProto.FLOAT
    quantized: dict[str, Any] = (
        {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8} if int8 else {}
    )
    past, present, nodes = [], [], []
    weights = toy_weights()
    nodes += [
        node("Shape", ["input_ids"], ["t"], start=1, end=2),
        node("Add", ["input_pos", "t"], ["total"]),
        node("Cast", ["total"], ["total1"], to=TensorProto.INT32),
        node("Squeeze", ["total1"], ["total32"]),
        node("Sub", ["total1", "one"], ["last"]),
        node("Gather", ["table", "input_ids"], ["x0"]),
    ]
    for layer, geometry in enumerate(cache.layers):
        shape = [1, cache.kv_heads, geometry.slots, cache.head_dim]
        for kind in ("key", "value"):
            past.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{kind}", element, shape))
            present.append(helper.make_tensor_value_info(f"present.{layer}.{kind}", element, shape))
        nodes += [node("MatMul", [f"x{layer}", f"{n}{layer}"], [f"_{n}{layer}"]) for n in "qkv"]
        nodes.append(
            node(
                "GroupQueryAttention",
                [f"_{n}{layer}" for n in "qkv"]
                + [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
                + ["last", "total32"]
                + ([*[""] * 5, "kv_scale", "kv_scale"] if int8 else []),
                [f"a{layer}", f"present.{layer}.key", f"present.{layer}.value"],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=HEADS,
                local_window_size=geometry.window,
                sliding_window_cache=1,
                **quantized,
            )
        )
        nodes.append(node("Add", [f"x{layer}", f"a{layer}"], [f"x{layer + 1}"]))
    final = f"x{len(WINDOWS)}"
    if role == "generate":
        nodes.append(node("Gather", [final, "minus_one"], ["cut"], axis=1))
        final = "cut"
    nodes += [node("Transpose", ["table"], ["head"]), node("MatMul", [final, "head"], ["logits"])]
    constants: dict[str, NDArray[Any]] = {"one": np.array([1], np.int32), "minus_one": np.array([-1], np.int64)}
    if int8:
        constants["kv_scale"] = np.array([0.03], np.float32)
    tokens = "tokens" if role == "score" else 1
    graph = helper.make_graph(
        nodes,
        role,
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"]),
            helper.make_tensor_value_info("input_pos", TensorProto.INT64, [1]),
            *past,
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, tokens, VOCAB]), *present],
        [numpy_helper.from_array(value, name) for name, value in {**constants, **weights}.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )


def write_toy_bundle(folder: Path, *, tokenizer: bool = True, dtype: str = "float32", **changes: Any) -> Path:
    """A bundle that `gemma-run` takes, without torch and an export; its text is nonsense."""
    folder.mkdir(parents=True)
    changes = {"backends": {"onnx": toy_backend(dtype=dtype)}, **changes}
    for role in ("generate", "score"):
        (folder / f"{role}.onnx").write_bytes(toy_graph(role, dtype).SerializeToString())
    if tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copy(DEMO / name, folder)
    changes = {"tokenizer": tokenizer, **changes}
    (folder / MANIFEST).write_text(toy_manifest(files=list_files(folder), **changes).to_json())
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
