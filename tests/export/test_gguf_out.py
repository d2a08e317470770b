"""`gemma-export gguf`: a checkpoint's integers in llama.cpp's file, read back by our reader and by transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    DEMO,
    ROOT,
    SHAPES,
    hf_holding,
    hf_logits,
    hf_model,
    kl_divergence,
    make_checkpoint,
    relative_error,
)
from support.commands import refused, run
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import gemma_edge
from gemma_edge.model.checkpoint import TABLE, Checkpoint, norm_names, weight_shapes
from gemma_edge.model.gguf.folder import prepare
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.text.tokenizer import Tokenizer as TextTokenizer

pytest.importorskip("gguf")


def quantized(model: Path, out: Path, *options: str) -> QuantizedCheckpoint:
    result = run("quantize", model, "-o", out, "--quality", "fast", *options)
    assert result.exit_code == 0, result.output
    return QuantizedCheckpoint.open(out)


def random_model(folder: Path, **changed: Any) -> Path:
    """A random model with the demo's tokenizer, and the scale of attention that llama.cpp takes for granted."""
    shape = {"vocab_size": 4096, **changed}
    model = make_checkpoint(folder, **shape)
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"query_pre_attn_scalar": raw["head_dim"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, model)
    return model


@pytest.mark.parametrize("options", [("--group-size", "32"), ("--bits", "8"), ("--bits", "16")])
@pytest.mark.parametrize("shape", ["tiny", "gemma3_scaled", "gemma1"])
def test_every_weight_and_key_comes_back(shape: str, options: tuple[str, ...], tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", **SHAPES[shape])
    source = quantized(model, tmp_path / "checkpoint", *options)
    result = run("gguf", source.folder, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 0, result.output
    assert "the same integers and scales" in result.stderr
    found = Checkpoint.open(prepare(tmp_path / "out.gguf"))
    assert found.config == source.config
    for name, (rows, _) in weight_shapes(source.config).items():
        assert torch.equal(found.matrix(name), source.rows(name, 0, rows)), name
        config = source.configs[name]
        if config is not None:
            codes = found.quantized(name, 0, rows).codes
            assert torch.equal(codes, source.quantized(name, 0, rows).codes), name
    for name in norm_names(source.config):
        assert torch.allclose(found.vector(name), source.vector(name), atol=1e-6), name  # 1 + w - 1


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    """By its own GGUF reader. Groups of 128 and channels are spread over blocks of 32."""
    source = quantized(DEMO, tmp_path / "checkpoint", "--group-size", "128")
    assert run("gguf", source.folder, "-o", tmp_path / "out.gguf").exit_code == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="out.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    for layer in loaded.model.layers:
        layer.self_attn.scaling = source.config.query_pre_attn_scalar**-0.5  # it takes the 2B's, whatever the size
    weights = {f"{name}.weight": source.rows(name, 0, shape[0]) for name, shape in weight_shapes(source.config).items()}
    weights |= {name: source.vector(name) for name in norm_names(source.config)}
    ids = torch.arange(5, 4000, 13)[:200]
    assert relative_error(hf_logits(loaded, ids), hf_logits(hf_holding(DEMO, weights), ids)) <= 1e-5


def test_the_vocabulary_is_the_same(tmp_path: Path) -> None:
    source = quantized(DEMO, tmp_path / "checkpoint")
    assert run("gguf", source.folder, "-o", tmp_path / "out.gguf").exit_code == 0
    folder = prepare(tmp_path / "out.gguf")
    ours, expected = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (folder, DEMO))
    lines = [line for page in sorted(ROOT.glob("docs/**/*.md")) for line in page.read_text().splitlines()]
    text = ["<start_of_turn>user\nHi<end_of_turn>", "a\n\n\n    b", "日本 🙂 \x07", *lines]
    assert [ours.encode(line).ids for line in text] == [expected.encode(line).ids for line in text]
    templates = [json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]]
    assert (folder / "chat_template.jinja").read_text() == templates[0]


def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path) -> None:
    scaled = make_checkpoint(tmp_path / "scaled", vocab_size=4096, query_pre_attn_scalar=24)
    untied = random_model(tmp_path / "untied", **SHAPES["untied"])
    for model, part in ((scaled, "queries scaled by 24"), (untied, "a head of its own")):
        source = quantized(model, tmp_path / f"{model.name}-checkpoint")
        refused(run("gguf", source.folder, "-o", tmp_path / "out.gguf"), "llama.cpp cannot run this gemma2", part)
    bare = quantized(DEMO, tmp_path / "checkpoint").folder
    (tmp_path / "there.gguf").write_text("mine")
    refused(run("gguf", bare, "-o", tmp_path / "there.gguf"), "there.gguf exists", "--force")
    refused(run("gguf", bare, "-o", tmp_path / "nowhere/out.gguf"), "cannot write", "nowhere")
    (bare / "tokenizer.json").unlink()
    refused(run("gguf", bare, "-o", tmp_path / "out.gguf"), "has no tokenizer.json")
    refused(run("gguf", tmp_path / "no-folder"), "no-folder")
    assert not [path for path in tmp_path.iterdir() if "out.gguf" in path.name]
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_a_scale_beyond_float16_is_refused_and_a_rounded_one_counted(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = quantized(DEMO, tmp_path / "checkpoint", "--group-size", "128")
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    shard = next(path for path in source.folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    kept = tensors[name].clone()
    for value, words in ((1e-6, "1 scales rounded by"), (1e-9, "a scale that float16")):
        tensors[name] = kept.clone()
        tensors[name].view(-1)[0] = value
        save_file(tensors, shard, {"format": "pt"})
        result = run("gguf", source.folder, "-o", tmp_path / "out.gguf", "--force")
        assert words in result.stderr, result.output
        assert result.exit_code == (0 if "rounded" in words else 2)


def test_a_head_of_its_own_runs_as_gemma3(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", **SHAPES["gemma3"])
    result = run("quantize", model, "-o", tmp_path / "checkpoint", "--quality", "fast", "--head-bits", "4")
    assert result.exit_code == 0, result.output
    source = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    assert run("gguf", source.folder, "-o", tmp_path / "out.gguf").exit_code == 0
    found = Checkpoint.open(prepare(tmp_path / "out.gguf"))
    assert not found.config.tie_word_embeddings
    for name in (TABLE, "lm_head"):
        assert torch.equal(found.matrix(name), source.rows(name, 0, 4096)), name


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_a_bundle_gives_its_integers_back(backend: str, tmp_path: Path) -> None:
    options = ("--context", "64", "--kv-bits", "32", "--verify", "none", "--quality", "fast", "--group-size", "32")
    made = run(DEMO, "-o", tmp_path / "bundle", "--backend", backend, "--save-checkpoint", tmp_path / "kept", *options)
    assert made.exit_code == 0, made.output
    for folder in ("bundle", "kept"):
        assert run("gguf", tmp_path / folder, "-o", tmp_path / f"{folder}.gguf").exit_code == 0
    found, expected = (Checkpoint.open(prepare(tmp_path / f"{folder}.gguf")) for folder in ("bundle", "kept"))
    for name in weight_shapes(expected.config):
        assert torch.equal(found.matrix(name), expected.matrix(name)), name


class LlamaCpp:
    """llama.cpp with a file, in one thread and with float32 caches."""

    def __init__(self, path: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'gemma-edge[dev]'")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.cpuparams.n_threads = str(path), 512, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def after(self, ids: list[int]) -> torch.Tensor:
        """The log probabilities of all 4096 tokens after some: (V,)."""
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "n_probs": 4096}
        (step,) = self._server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        found = torch.full((4096,), -1e9)
        for each in step["top_logprobs"]:
            found[each["id"]] = each["logprob"]
        return found


@pytest.mark.parametrize("shape", ["tiny", "gemma3_scaled", "gemma1"])
def test_llama_cpp_computes_what_transformers_does(shape: str, tmp_path: Path) -> None:
    """Random float weights, a window shorter than the text."""
    model = random_model(tmp_path / "model", **SHAPES[shape])
    source = quantized(model, tmp_path / "checkpoint", "--bits", "16")
    assert run("gguf", source.folder, "-o", tmp_path / "out.gguf").exit_code == 0
    ids = torch.tensor([2, *range(5, 4000, 71)][:40])
    llama, ends = LlamaCpp(tmp_path / "out.gguf"), range(12, 41, 4)
    found = torch.stack([llama.after(ids[:end].tolist()) for end in ends])
    expected = hf_logits(hf_model(source.folder), ids)[[end - 1 for end in ends]].log_softmax(-1)
    assert (
        kl_divergence(found, expected) <= 5e-3
    )  # it multiplies in bfloat16: Gemma 1's, without norms behind, are 2e-3 off
    assert (expected.argmax(-1) == found.argmax(-1)).sum() >= 7


PROMPTS = ("And the LORD said unto", "It is a truth", "In the beginning", "Elizabeth was", "Behold, I will")


def test_llama_cpp_says_what_the_bundle_says(tmp_path: Path) -> None:
    source = quantized(DEMO, tmp_path / "checkpoint", "--bits", "8", "--group-size", "32")
    options = ("--backend", "onnx", "--context", "128", "--kv-bits", "32", "--verify", "none")
    made = run(source.folder, "-o", tmp_path / "bundle", *options)
    assert made.exit_code == 0, made.output
    assert run("gguf", tmp_path / "bundle", "-o", tmp_path / "out.gguf").exit_code == 0
    runtime, llama = gemma_edge.load(tmp_path / "bundle"), LlamaCpp(tmp_path / "out.gguf")
    tokenizer = TextTokenizer(tmp_path / "bundle", runtime.manifest)
    for prompt in PROMPTS:
        runtime.reset()
        ids = tokenizer.encode(prompt)
        ours, theirs, logits = [], [], runtime.prefill(ids)
        for _ in range(24):
            ours.append(torch.from_numpy(logits).log_softmax(-1))
            theirs.append(llama.after(ids))
            ids.append(int(logits.argmax()))
            logits = runtime.decode(ids[-1])
        expected, found = torch.stack(ours), torch.stack(theirs)
        assert kl_divergence(found, expected) <= 1e-3
        choice = expected.gather(1, found.argmax(-1, keepdim=True))[:, 0]
        assert (expected.amax(-1) - choice).max() <= 0.1  # the same tokens, unless two are as likely
