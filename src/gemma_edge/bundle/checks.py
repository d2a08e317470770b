"""What the parts of a manifest must agree on. Types and ranges are checked before, by codec.py."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gemma_edge.bundle.codec import Key, KeyProblem
from gemma_edge.bundle.entries import LOCAL, BackendEntry, GateResult, ModelConfig, ModelEntry
from gemma_edge.bundle.geometry import CacheGeometry, slots_needed
from gemma_edge.bundle.settings import SignatureSettings, roles
from gemma_edge.bundle.signature import Signature

MAX_CACHE_BYTES = 1 << 38
MAX_ROUNDING = 63  # slots that only make their number a multiple of 64, for a GPU


def problems(
    model: ModelEntry,
    config: ModelConfig,
    backends: Mapping[str, BackendEntry[Any]],
    files: Collection[str],
    verification: Mapping[str, GateResult],
) -> Iterator[KeyProblem]:
    """Every place where these parts of a manifest contradict each other."""
    yield from config_problems(config)
    if model.architecture != config.architecture:
        expected = f"{config.architecture}, as config.architecture says"
        yield KeyProblem(("model", "architecture"), model.architecture, expected)
    if not backends:
        yield KeyProblem(("backends",), {}, "an object with at least one backend")
    for name, entry in backends.items():
        yield from _backend(("backends", name), config, files, entry)
    for name, result in verification.items():
        at = ("verification", name)
        if name not in backends:
            yield KeyProblem(at, {}, "the name of one of this bundle's backends")
        if result.passed != (not result.failures):
            yield KeyProblem((*at, "passed"), result.passed, "true if failures is empty, else false")


def config_problems(config: ModelConfig, at: tuple[Key, ...] = ("config",)) -> Iterator[KeyProblem]:
    """Every number of a configuration that contradicts another one; `at` leads to the configuration."""

    def problem(key: str, value: object, expected: str) -> KeyProblem:
        return KeyProblem((*at, key), value, expected)

    layers = config.num_hidden_layers
    if len(config.layer_types) != layers:
        yield problem("layer_types", list(config.layer_types), f"a list of {layers} (num_hidden_layers)")
    if config.num_attention_heads % config.num_key_value_heads:
        expected = f"a divisor of num_attention_heads, {config.num_attention_heads}"
        yield problem("num_key_value_heads", config.num_key_value_heads, expected)
    if config.hidden_size % config.num_attention_heads:
        expected = f"a multiple of num_attention_heads, {config.num_attention_heads}, as transformers requires"
        yield problem("hidden_size", config.hidden_size, expected)
    if config.head_dim % 2:
        yield problem("head_dim", config.head_dim, "even")
    below = f"below vocab_size, {config.vocab_size}"
    if config.bos_token_id >= config.vocab_size:
        yield problem("bos_token_id", config.bos_token_id, below)
    if not config.eos_token_id:
        yield problem("eos_token_id", [], "a list of at least one token id")
    for index, token in enumerate(config.eos_token_id):
        if token >= config.vocab_size:
            yield KeyProblem((*at, "eos_token_id", index), token, below)


def _backend(
    at: tuple[Key, ...], config: ModelConfig, files: Collection[str], entry: BackendEntry[Any]
) -> Iterator[KeyProblem]:
    yield from _cache((*at, "cache"), config, entry.cache)
    predicted = {
        "context": entry.cache.context,
        "prefill_chunk": entry.cache.prefill_chunk,
        "pinned": entry.cache.pinned,
        "kv_dtype": entry.cache.dtype,
        "kv_bytes": entry.cache.bytes,
    }
    for key, value in predicted.items():
        if getattr(entry.plan, key) != value:
            yield KeyProblem((*at, "plan", key), getattr(entry.plan, key), f"{value}, as the cache says")
    if entry.plan.accelerator != entry.accelerator:
        yield KeyProblem(
            (*at, "plan", "accelerator"), entry.plan.accelerator, f"{entry.accelerator}, as the entry's accelerator"
        )
    for role, name in roles(entry.settings).items():
        if name not in files:
            yield KeyProblem((*at, "settings", role), name, "one of the names in files")
    if isinstance(entry.settings, SignatureSettings):
        yield from _signatures((*at, "settings", "signatures"), entry.settings.signatures, entry.cache)


def _cache(at: tuple[Key, ...], config: ModelConfig, cache: CacheGeometry) -> Iterator[KeyProblem]:
    for key, name in (("kv_heads", "num_key_value_heads"), ("head_dim", "head_dim")):
        if getattr(cache, key) != getattr(config, name):
            yield KeyProblem((*at, key), getattr(cache, key), f"{getattr(config, name)}, as config.{name} says")
    if len(cache.layers) != len(config.layer_types):
        yield KeyProblem((*at, "layers"), list(cache.layers), f"a list of {len(config.layer_types)} layers")
    chunk = cache.prefill_chunk
    for index, (layer, kind) in enumerate(zip(cache.layers, config.layer_types, strict=False)):
        window = min(config.sliding_window, cache.context) if kind == LOCAL else cache.context
        if layer.window != window:
            why = "the smaller of config.sliding_window and context" if kind == LOCAL else "as context says"
            yield KeyProblem((*at, "layers", index, "window"), layer.window, f"{window}, {why}")
        pinned = 0 if kind == LOCAL else cache.pinned
        if layer.pinned != pinned:
            yield KeyProblem((*at, "layers", index, "pinned"), layer.pinned, f"{pinned}, as in every {kind} layer")
        least = slots_needed(window, chunk, layer.pinned)
        most = least + chunk - 1 + MAX_ROUNDING
        if not least <= layer.slots <= most:
            expected = f"from {least} (pinned + window + prefill_chunk - 1) to {most}"
            yield KeyProblem((*at, "layers", index, "slots"), layer.slots, expected)
    if cache.bytes > MAX_CACHE_BYTES:
        yield KeyProblem((*at, "context"), cache.context, f"small enough for a cache of {MAX_CACHE_BYTES} bytes")


def _signatures(at: tuple[Key, ...], signatures: tuple[Signature, ...], cache: CacheGeometry) -> Iterator[KeyProblem]:
    names = [signature.name for signature in signatures]
    for index, signature in enumerate(signatures):
        if signature.name in names[:index]:
            yield KeyProblem((*at, index, "name"), signature.name, "another name than the signatures before it")
        if signature.tokens > cache.prefill_chunk:
            expected = f"at most cache.prefill_chunk, {cache.prefill_chunk}"
            yield KeyProblem((*at, index, "tokens"), signature.tokens, expected)
        if signature.longest is not None and not signature.tokens <= signature.longest <= cache.context:
            expected = f"null, or from tokens, {signature.tokens}, to cache.context, {cache.context}"
            yield KeyProblem((*at, index, "longest"), signature.longest, expected)
    if not any(each.role == "decode" and each.longest is None and each.tokens == 1 for each in signatures):
        expected = "a list with a signature of role decode, 1 token and longest null"
        yield KeyProblem(at, list(signatures), expected)
