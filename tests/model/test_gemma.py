"""The decoder against transformers' eager Gemmas: any chunks, past the window, past the context, far from position 0."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import SHAPES, hf_logits, hf_model, hf_windowed, make_checkpoint, relative_error
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.bundle.entries import GLOBAL, LOCAL
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import Gemma, layer_ropes
from gemma_edge.model.kv_cache import RingCache

UNEVEN = [7, 3, 1, 7, 2, *[1] * 12, 5, 6]  # 43 tokens: the window is 8 and its ring 14 slots, so it wraps three times
# Largest difference as a part of the logits' range. Both sides are float32 and add in another order. Measured over all shapes and
# three seeds: at most 2.8e-6, and transformers itself is 1.9e-6 away from its own float64. The issue allows 2e-5.
PARITY = 1e-5
# What a wrong number in the configuration changes at least: a hundred times what PARITY lets pass.
NOTICED = 1e-3


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed))  # (T,)


def assert_parity(found: Tensor, reference: Tensor) -> None:
    # rtol 0: a logit near zero carries the rounding of the large products that it is the sum of
    spread = float(reference.max() - reference.min())
    assert_close(found, reference, rtol=0.0, atol=PARITY * spread)


def run(model: Gemma, ids: Tensor, sizes: Sequence[int], *, context: int, start: int = 0) -> Tensor:
    """Logits (T, V) of the tokens written in chunks of these sizes from position `start` on."""
    assert sum(sizes) == len(ids)
    cache = RingCache(model.config, context=context, chunk=max(sizes))
    parts, at = [], 0
    with torch.no_grad():
        for size in sizes:
            parts.append(model(ids[None, at : at + size], torch.tensor([start + at]), cache)[0])
            at += size
    return torch.cat(parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_prefill_and_single_steps_match_transformers(shape: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(shape)
    model, ids = Checkpoint.open(folder).load(), tokens(sum(UNEVEN))
    reference = hf_logits(hf_model(folder), ids)
    for sizes in ([len(ids)], UNEVEN, [1] * len(ids)):
        assert_parity(run(model, ids, sizes, context=64), reference)


def test_numbers_that_differ_from_every_default_are_used(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        rms_norm_eps=0.3,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=7.0,
        query_pre_attn_scalar=17,
        sliding_window=5,
        layer_types=[GLOBAL, LOCAL, LOCAL, LOCAL],
        head_dim=24,
        num_key_value_heads=1,
    )
    ids = tokens(sum(UNEVEN), seed=1)
    model = Checkpoint.open(folder).load()
    assert_parity(run(model, ids, UNEVEN, context=64), hf_logits(hf_model(folder), ids))


def drawn(seed: int) -> tuple[dict[str, Any], list[int], int]:
    """A Gemma 3 that nobody chose: keys of its configuration, the sizes of its chunks, and the context."""
    draw = random.Random(seed)
    kv_heads, layers = draw.choice((1, 2, 3)), draw.randint(1, 8)
    heads = kv_heads * draw.choice((1, 3, 5))
    rope = {"rope_type": "default"}
    scaled = {"rope_type": "linear", "factor": draw.choice((0.5, 2.0, 8.0))}
    return (
        {
            "model_type": "gemma3_text",
            "hidden_size": heads * draw.randint(2, 12),  # transformers takes no other; a head has another size
            "intermediate_size": draw.randint(5, 150),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 2 * draw.randint(2, 20),
            "query_pre_attn_scalar": draw.randint(3, 60),
            "sliding_window": draw.randint(2, 15),
            "layer_types": [draw.choice((LOCAL, LOCAL, GLOBAL)) for _ in range(layers)],
            "rope_parameters": {
                GLOBAL: {**draw.choice((rope, scaled, scaled)), "rope_theta": draw.uniform(50, 1e6)},
                LOCAL: {**draw.choice((rope, rope, scaled)), "rope_theta": draw.uniform(50, 1e4)},
            },
            "rms_norm_eps": draw.choice((1e-6, 1e-3)),
            "final_logit_softcapping": draw.choice((None, None, 20.0)),
        },
        [draw.randint(1, 9) for _ in range(12)],
        draw.randint(16, 24),
    )


@pytest.mark.parametrize("seed", range(16))
def test_any_gemma3_matches_transformers_past_its_context(seed: int, tmp_path: Path) -> None:
    keys, sizes, context = drawn(seed)
    folder = make_checkpoint(tmp_path, seed, **keys)
    weights, ids = Checkpoint.open(folder), tokens(sum(sizes), seed)
    reference = hf_windowed(hf_model(folder), ids, local_window=keys["sliding_window"], global_window=context)
    assert len(ids) > context
    assert_parity(run(weights.load(), ids, sizes, context=context), reference)


def swapped(config: GemmaConfig) -> tuple[str, ...]:
    return tuple(GLOBAL if kind == LOCAL else LOCAL for kind in config.layer_types)


MISTAKES: dict[str, Callable[[GemmaConfig], dict[str, Any]]] = {
    "window one longer": lambda c: {"sliding_window": c.sliding_window + 1},
    "window one shorter": lambda c: {"sliding_window": c.sliding_window - 1},
    "no attention softcap": lambda c: {"attn_logit_softcapping": None},
    "no final softcap": lambda c: {"final_logit_softcapping": None},
    "other softcap": lambda c: {"attn_logit_softcapping": 49.0},
    "layer kinds swapped": lambda c: {"layer_types": swapped(c)},
    "scaled by head_dim": lambda c: {"query_pre_attn_scalar": c.head_dim},
    "other rope": lambda c: {"rope_theta": 9000.0},
}
GEMMA3_MISTAKES: dict[str, Callable[[GemmaConfig], dict[str, Any]]] = {
    "window one longer": MISTAKES["window one longer"],
    "layer kinds swapped": MISTAKES["layer kinds swapped"],
    "scaled by head_dim": MISTAKES["scaled by head_dim"],
    "queries and keys not normalised": lambda c: {"qk_norm": False},
    "a softcap": lambda c: {"final_logit_softcapping": 30.0},
    "one rope for all": lambda c: {"rope_local_base_freq": None},
    "ropes swapped": lambda c: {"rope_theta": c.rope_local_base_freq, "rope_local_base_freq": c.rope_theta},
    "rope not scaled": lambda c: {"rope_factor": 1.0},
    "local rope scaled": lambda c: {"rope_local_factor": 8.0},
}
GEMMA1_MISTAKES: dict[str, Callable[[GemmaConfig], dict[str, Any]]] = {
    "other scale": lambda c: {"query_pre_attn_scalar": c.head_dim + 1},
    "a softcap": GEMMA3_MISTAKES["a softcap"],
    "other rope": MISTAKES["other rope"],
    "local layers": lambda c: {"layer_types": swapped(c), "sliding_window": 8},
}
EVERY_MISTAKE = [
    *(pytest.param("gemma1", mistake, id=f"gemma1: {name}") for name, mistake in GEMMA1_MISTAKES.items()),
    *(pytest.param("heads_like_27b", mistake, id=name) for name, mistake in MISTAKES.items()),
    *(pytest.param("gemma3_scaled", mistake, id=f"gemma3: {name}") for name, mistake in GEMMA3_MISTAKES.items()),
]


@pytest.mark.parametrize(("shape", "mistake"), EVERY_MISTAKE)
def test_a_wrong_number_would_be_noticed(
    shape: str, mistake: Callable[[GemmaConfig], dict[str, Any]], checkpoint: Callable[..., Path]
) -> None:
    """Guards the tests above: with weights too small, or sequences too short, they would pass whatever the decoder does."""
    weights = Checkpoint.open(checkpoint(shape))
    model, ids = weights.load(), tokens(sum(UNEVEN))
    wrong = Gemma(replace(weights.config, **mistake(weights.config)))
    wrong.load_state_dict(model.state_dict(), strict=wrong.config.qk_norm == weights.config.qk_norm)
    error = relative_error(run(wrong, ids, UNEVEN, context=64), run(model, ids, UNEVEN, context=64))
    assert error > NOTICED


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("context", "sizes"),
    [
        (20, [*UNEVEN, *[1] * 30, *UNEVEN]),  # 116 tokens: the largest ring, of 26 slots, wraps four times
        (5, UNEVEN),  # the local layers' window of 8 is wider than the context
        (1, UNEVEN),  # a query sees itself alone
    ],
)
def test_past_the_context_the_oldest_tokens_fall_out(
    context: int, sizes: list[int], shape: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(shape)
    weights, hf, ids = Checkpoint.open(folder), hf_model(folder), tokens(sum(sizes), seed=2)
    local_window = min(context, weights.config.sliding_window)
    reference = hf_windowed(hf, ids, local_window=local_window, global_window=context)
    found = run(weights.load(), ids, sizes, context=context)
    assert_parity(found, reference)
    # felt from the first token past the context on, and not before
    plain = hf_logits(hf, ids)
    assert_parity(found[:context], plain[:context])
    assert relative_error(found[context:], plain[context:]) > NOTICED


def test_the_mask_of_the_reference_is_transformers_own_while_the_context_holds(checkpoint: Callable[..., Path]) -> None:
    hf, ids = hf_model(checkpoint("tiny")), tokens(40)
    assert_close(hf_windowed(hf, ids, local_window=8, global_window=40), hf_logits(hf, ids), rtol=0.0, atol=0.0)


def test_a_million_tokens_on_the_logits_are_still_those_of_transformers(checkpoint: Callable[..., Path]) -> None:
    """Angles are computed, not looked up. Four layers of window 4 look back 12 tokens, then the empty ring is forgotten."""
    folder, start, window, ids = checkpoint("tiny"), 10**6, 4, tokens(40, seed=3)
    reference = hf_windowed(hf_model(folder), ids, local_window=window, global_window=window, start=start)
    found = run(Checkpoint.open(folder).load(), ids, [7, 3, *[1] * 30], context=window, start=start)
    forgotten = 4 * (window - 1)
    assert_parity(found[forgotten:], reference[forgotten:])


def test_layers_run_one_by_one_give_the_model(checkpoint: Callable[..., Path]) -> None:
    """What the gate does for models whose float weights do not fit in memory."""
    weights, ids = Checkpoint.open(checkpoint("starts_global")), tokens(20)
    model = weights.load()
    whole = run(model, ids, [20], context=12)
    start = torch.tensor([0])
    with torch.no_grad():
        x = model.model.embed_tokens(ids[None]) * weights.config.hidden_size**0.5
        ropes = layer_ropes(model.model, weights.config, start, 20)
        for layer in range(weights.config.num_hidden_layers):
            cache = RingCache(weights.config, context=12, chunk=20, layers=[layer])
            x = weights.load_layer(layer)(x, cache, ropes[layer], start)
        logits = model.head(model.model.norm(x))[0]
    assert_close(logits, whole, rtol=0.0, atol=0.0)  # the same operations in the same order
