"""`--method q4_0`: llama.cpp's integers, made of float weights or taken over from a GGUF file. The gguf package is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import DEMO, SHAPES, hf_holding, hf_logits, make_checkpoint, relative_error
from support.commands import refused, run
from support.gguf_files import gguf, llama_name, write
from support.lowered import lower_bundle, some_ids
from torch import Tensor

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export.onnx.backend import FLOAT_ACTIVATIONS, OnnxBackend
from gemma_edge.model.checkpoint import TABLE, TABLES, Checkpoint, weight_shapes
from gemma_edge.model.families import GEMMA2
from gemma_edge.model.gguf.folder import prepare
from gemma_edge.model.gguf.tensors import GgufFile
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.recipe import ANY, INT8_ROW, TABLE_PATTERN, QuantConfig, QuantRule, Recipe, make_recipe

BLOCK = QuantConfig(4, 32)
Q4_0 = make_recipe(4, method="q4_0")
Q8_0 = make_recipe(8, group_size=32)
QUICK = ("--kv-bits", "32", "--context", "64", "--verify", "quick", "--backend", "onnx")


def unpacked(stored: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (N, 32) and scales (N, 1) of blocks of Q4_0 or Q8_0: source, ggml-common.h."""
    blocks = stored.reshape(-1, {"Q4_0": 18, "Q8_0": 34}[kind])
    codes = blocks[:, 2:]
    if kind == "Q4_0":
        codes = np.concatenate((codes & 15, codes >> 4), axis=1) - 8
    return torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(blocks[:, :2].copy().view(np.float16))


def reference(values: Tensor, kind: str = "Q4_0") -> tuple[Tensor, Tensor]:
    """What the gguf package makes of float weights."""
    with np.errstate(all="ignore"):
        return unpacked(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind]), kind)


def draws() -> dict[str, Tensor]:
    """Weights as models have them and as they should not."""
    normal = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    sizes = 10.0 ** torch.linspace(-9, 3, 64)[:, None]
    zeros = normal.clone()
    zeros[::2] = 0.0
    zeros[1, 3] = -0.0
    return {
        "bell-shaped": normal,
        "of all sizes": normal * sizes,
        "bfloat16": (normal * sizes).bfloat16().float(),
        "above zero": normal.abs(),
        "below zero": -normal.abs(),
        "many of one magnitude": (normal * 2).round(),
        "zeros": zeros,
        "too small for float16": normal * 1e-30,
    }


@pytest.mark.parametrize("name", draws())
def test_codes_and_scales_are_those_of_the_gguf_package(name: str) -> None:
    values = draws()[name]
    made = quantize(values, BLOCK, "q4_0")
    codes, scale = reference(values)
    assert made.codes.dtype == torch.int8 and made.scale.dtype == torch.float16
    assert torch.equal(made.codes.view(-1, 32), codes)
    assert torch.equal(made.scale.view(-1, 1), scale)
    expected = gguf.dequantize(
        gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0
    )
    assert torch.equal(made.dequantize(), torch.from_numpy(expected))


def test_half_of_the_scales_are_below_zero() -> None:
    """The weight of largest magnitude becomes -8. With the other sign it would be 8, which four bits do not have."""
    made = quantize(draws()["bell-shaped"], BLOCK, "q4_0")
    assert 0.45 < (made.scale < 0).float().mean() < 0.55
    assert ((made.codes.view(-1, 32) == -8).sum(1) > 0).all()


def test_a_weight_that_is_too_large_is_refused() -> None:
    with pytest.raises(InputError, match=r"a weight of 1e\+06 is too large .* method q4_0, .* use another method"):
        quantize(torch.full((1, 32), 1e6), BLOCK, "q4_0")


def test_a_folder_trained_for_q4_0_loses_nothing_more(tmp_path: Path) -> None:
    """Weights that are what Q4_0 can hold, stored as float32: Google's `q4_0-unquantized` folders are nearly so."""
    model = make_checkpoint(tmp_path / "model")
    grid = Checkpoint.open(model)
    tensors = {f"{name}.weight": grid.matrix(name) for name in weight_shapes(grid.config)}
    for name in (name for name in tensors if "embed" not in name):
        tensors[name] = quantize(tensors[name], BLOCK, "q4_0").dequantize()
    tensors |= {name: grid.vector(name) for name in grid._shards._tensors if name not in tensors}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    made = write_quantized(Checkpoint.open(model), Q4_0, tmp_path / "out")
    for name in weight_shapes(made.config):
        if name not in TABLES:
            assert torch.equal(made.matrix(name), tensors[f"{name}.weight"]), name


def assert_taken_over(made: QuantizedCheckpoint, file: Path, kind: str) -> None:
    """The integers of every linear are the file's, and their values those that the gguf package gives."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name in weight_shapes(made.config).keys() - set(TABLES):
        tensor = stored[llama_name(f"{name}.weight", made.config)]
        rows = weight_shapes(made.config)[name][0]
        found = made.quantized(name, 0, rows)
        codes, scale = unpacked(np.asarray(tensor.data), kind)
        assert torch.equal(found.codes.view(-1, 32), codes) and torch.equal(found.scale.view(-1, 1), scale), name
        assert torch.equal(found.dequantize(), torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)))
        assert torch.equal(made.quantized(name, 3, 9).codes, found.codes[3:9])


@pytest.mark.parametrize("shape", ["tiny", "gemma3"])
@pytest.mark.parametrize(("kind", "recipe"), [("Q4_0", Q4_0), ("Q8_0", Q8_0)], ids=["Q4_0", "Q8_0"])
def test_integers_of_a_gguf_file_are_taken_over(kind: str, recipe: Recipe, shape: str, tmp_path: Path) -> None:
    """Their codes are shuffled: made with weights of importance, blocks lack -8, and rounding again would change them."""
    model = make_checkpoint(tmp_path / "model", **{**SHAPES[shape], "vocab_size": 4096})
    file = shuffled(write(model, tmp_path / "model.gguf", kind))
    source = open_weights(prepare(file))
    made = write_quantized(source, recipe, tmp_path / "out")
    assert_taken_over(made, file, kind)
    assert made.configs[TABLE] == INT8_ROW  # the table follows the recipe
    table = quantize(source.matrix(TABLE), INT8_ROW, "rtn")
    assert torch.equal(made.quantized(TABLE, 0, 4096).codes, table.codes)
    again = write_quantized(made, make_recipe(4), tmp_path / "again")
    assert_taken_over(again, file, kind)


def shuffled(file: Path) -> Path:
    """Other integers in every matrix but the table: any of the type's, from -7 on."""
    data, draw = bytearray(file.read_bytes()), np.random.default_rng(0)
    for name, place in GgufFile(file, GEMMA2.norms)._header.tensors.items():
        if name.startswith("blk.") and not name.endswith("norm.weight"):
            block = {"Q4_0": 18, "Q8_0": 34}[place.type]
            stored = np.frombuffer(data[place.start : place.stop], np.uint8).reshape(-1, block).copy()
            low = draw.integers(1 if block == 18 else 0, 16, (2, *stored[:, 2:].shape), np.uint8)
            stored[:, 2:] = low[0] | low[1] << 4
            data[place.start : place.stop] = stored.tobytes()
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("kind", "recipe", "keeps"),
    [
        ("Q4_0", make_recipe(4, method="rtn"), False),
        ("Q4_0", make_recipe(8, group_size=32), False),
        ("Q8_0", Q4_0, False),
        ("Q8_0", make_recipe(8, group_size=64), False),
        ("Q8_0", make_recipe(8), False),
        ("F16", Q4_0, False),
        ("Q8_0", Q8_0, True),
        ("Q4_0", Q4_0, True),
    ],
)
def test_only_the_same_kind_of_integers_is_taken_over(kind: str, recipe: Recipe, keeps: bool, tmp_path: Path) -> None:
    source = open_weights(prepare(write(DEMO, tmp_path / "model.gguf", kind)))
    rules = {name: recipe.rule_for(name) for name in weight_shapes(source.config) if name not in TABLES}
    assert {source.keeps(name, rule.config, rule.method) for name, rule in rules.items() if rule.config} == {keeps}


def test_an_adapter_changes_what_it_is_merged_into_and_no_more(tmp_path: Path) -> None:
    name, draw = "model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    model = make_checkpoint(tmp_path / "model", vocab_size=4096)
    lora = tmp_path / "lora"
    lora.mkdir()
    halves = {"lora_A": (4, 64), "lora_B": (128, 4)}
    adapter = {f"base_model.model.{name}.{half}.weight": torch.randn(s, generator=draw) for half, s in halves.items()}
    save_file(adapter, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    folder = prepare(write(model, tmp_path / "model.gguf", "Q4_0"))
    merged = open_weights(folder, lora=lora)
    plain, made = (
        write_quantized(each, Q4_0, tmp_path / out) for each, out in ((open_weights(folder), "a"), (merged, "b"))
    )
    expected = quantize(merged.matrix(name), BLOCK, "q4_0")
    assert torch.equal(made.quantized(name, 0, 128).codes, expected.codes)
    other = "model.layers.0.self_attn.k_proj"
    assert torch.equal(made.quantized(other, 0, 64).codes, plain.quantized(other, 0, 64).codes)


def test_logits_of_the_onnx_backend_equal_those_of_the_gguf_values(tmp_path: Path) -> None:
    """Scales below zero among them, and codes of the whole range from -8 to 7. Activations are float, the table is int8."""
    model = make_checkpoint(tmp_path / "model")
    backend = OnnxBackend(accuracy_level=FLOAT_ACTIVATIONS)
    quantized, bundle = lower_bundle(backend, model, tmp_path, Q4_0, 64, 8)
    tensors = {f"{name}.weight": quantized.matrix(name) for name in weight_shapes(quantized.config)}
    for name, values in Checkpoint.open(model).load().state_dict().items():
        if name.removesuffix(".weight") not in (*TABLES, *weight_shapes(quantized.config)):
            tensors[name] = values
        elif name.startswith("model.layers"):
            stored = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0)
            tensors[name] = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType.Q4_0))
    ids = torch.tensor(some_ids(24, quantized.config.vocab_size))
    found = torch.from_numpy(gemma_edge.load(bundle).score(ids.tolist()))
    assert relative_error(found, hf_logits(hf_holding(model, tensors), ids)) <= 1e-4


def test_a_bundle_of_a_q4_0_file_passes_the_gate_and_names_its_method(tmp_path: Path) -> None:
    file = write(DEMO, tmp_path / "model.gguf", "Q4_0")
    done = run(file, "-o", tmp_path / "out", "--method", "q4_0", *QUICK)
    assert done.exit_code == 0, done.output
    # the table alone is rounded again
    assert "its weights are quantized already (Q4_0 x 1), and integers are made from these" in done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    body = next(rule for rule in manifest["recipe"]["rules"] if rule["pattern"] == ANY)
    assert (body["method"], body["config"]["bits"], body["config"]["group_size"]) == ("q4_0", 4, 32)
    quality = manifest["verification"]["onnx"]["quality"]
    assert quality["kl"] < 1e-3  # int8 table and int8 activations; the file's own values are the original


def test_the_warning_names_only_what_is_rounded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(DEMO, tmp_path / "model.gguf", "Q4_0")
    for words in (("--method", "q4_0", "--table-bits", "4"), ("--bits", "16")):
        assert run("plan", file, "--backend", "onnx", *words).exit_code == 0
    assert "quantized already" not in caplog.text
    assert run("plan", file, "--method", "mse", "--backend", "onnx").exit_code == 0
    assert f"{file}: its weights are quantized already (Q4_0 x 43)" in caplog.text


def test_it_may_stand_beside_a_calibrated_method(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then the layers are made in memory, where scales were taken for bfloat16."""
    rules = (
        QuantRule(r".*\.down_proj", BLOCK, "gptq"),
        QuantRule(TABLE_PATTERN, INT8_ROW),
        QuantRule(ANY, BLOCK, "q4_0"),
    )
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(Recipe("mine", rules).to_json()))
    file, words = write(DEMO, tmp_path / "model.gguf", "Q4_0"), ("--recipe", path, "--calibration-tokens", "256")
    done = run("quantize", file, "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert "quantized already (Q4_0 x 43)" in caplog.text + done.stderr
    made, source = QuantizedCheckpoint.open(tmp_path / "out"), open_weights(prepare(file))
    name = "model.layers.0.self_attn.q_proj"
    expected = quantize(source.matrix(name), BLOCK, "q4_0")
    found = made.quantized(name, 0, len(expected.codes))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
    assert made.scale_dtype(name) == torch.float16
    assert made.scale_dtype("model.layers.0.mlp.down_proj") == torch.bfloat16


def test_an_infinite_scale_is_refused(tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf", "Q8_0")
    place = GgufFile(path, GEMMA2.norms)._header.tensors["blk.0.attn_q.weight"]
    data = bytearray(path.read_bytes())
    data[place.start : place.start + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    result = run("quantize", path, "-o", tmp_path / "out", "--bits", "8", "--group-size", "32")
    refused(result, str(path), "self_attn.q_proj.weight holds NaN or infinite values")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--group-size", "64"), "--method q4_0 makes 4 bits in groups of 32, not 4 bits in groups of 64"),
        (("--bits", "8"), "--method q4_0 makes 4 bits in groups of 32, not 8 bits with one scale per channel"),
        (("--bits", "16"), "--bits 16 leaves the weights float"),
        (("--bpw", "5"), "--method q4_0 makes 4 bits in groups of 32 everywhere"),
        (("--quality", "best"), "--quality best uses calibration text"),
        (("--kv-bits", "8"), "--kv-bits 8 needs calibration"),
        (("--backend", "executorch"), "--method q4_0 makes scales below zero, which the executorch backend's kernels"),
        (("--backend", "all"), "use --backend onnx, or another --method"),
        (("--backend", "tflite"), "--method q4_0 makes scales below zero, which the tflite backend's kernels"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    refused(run("plan", DEMO, "--method", "q4_0", *words), message)


def test_distillation_is_refused(tmp_path: Path) -> None:
    refused(
        run(DEMO, "-o", tmp_path / "out", "--method", "q4_0", "--distill", "512", "--backend", "onnx"),
        "--distill trains scales, and --method q4_0 keeps those of llama.cpp",
    )


@pytest.mark.parametrize("backend", ["executorch", "tflite", "tflite-runtime"])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_checkpoint_with_such_scales_is_refused_in_one_line(backend: str, value: float, tmp_path: Path) -> None:
    """They ended in a traceback, after the file was written or when it was run."""
    recipe = make_recipe(8) if backend == "tflite-runtime" else make_recipe(4, method="rtn")
    model = make_checkpoint(tmp_path / "model", vocab_size=4096)
    folder = write_quantized(Checkpoint.open(model), recipe, tmp_path / "folder").folder
    path = folder / "model-00002-of-00005.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name].float()
    tensors[name][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    result = run(folder, "-o", tmp_path / "out", "--backend", backend, *QUICK[:4], "--verify", "none")
    refused(
        result, "mlp.up_proj has scales that are not above zero", f"the {backend} backend's kernels", "--backend onnx"
    )
    assert not (tmp_path / "out").exists()
