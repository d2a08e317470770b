"""`gemma-export MODEL.gguf`: the same weights file as from a Hugging Face folder of the same values."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import DEMO, ROOT, SHAPES, make_checkpoint
from support.commands import refused, run
from support.gguf_files import LLAMA_ARCHITECTURES, PIECES, dequantized, kinds, mutated, scores, write
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import generate_merges

from gemma_edge.bundle.entries import LOCAL
from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Checkpoint, norm_names, weight_shapes
from gemma_edge.model.config import PRESETS, GemmaConfig
from gemma_edge.model.families import GEMMA2
from gemma_edge.model.gguf.config import KEYS, config_json
from gemma_edge.model.gguf.folder import POINTER, prepare
from gemma_edge.model.gguf.reader import FLOAT_TYPES, TYPES, Header, read_header
from gemma_edge.model.gguf.tensors import GgufFile
from gemma_edge.model.gguf.tokenizer import merges
from gemma_edge.model.hub import COMPANIONS

gguf = pytest.importorskip("gguf")

FAST = (
    "--bits",
    "4",
    "--group-size",
    "32",
    "--method",
    "rtn",
    "--kv-bits",
    "32",
    "--context",
    "64",
    "--verify",
    "none",
)


def weights_files(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle that is neither its manifest nor about text."""
    other = {"manifest.json", *COMPANIONS}
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file() and path.name not in other}


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_bundle_is_the_same_as_from_a_folder_of_the_same_values(kind: str, tmp_path: Path) -> None:
    folder, file = dequantized(DEMO, tmp_path / "hf", kind), write(DEMO, tmp_path / "model.gguf", kind)
    first, second = run(folder, "-o", tmp_path / "one", *FAST), run(file, "-o", tmp_path / "two", *FAST)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    one, two = weights_files(tmp_path / "one"), weights_files(tmp_path / "two")
    assert one == two and sum(map(len, one.values())) > 1 << 20
    line = f"warning: {file}: its weights are quantized already (Q8_0 x 43), and integers are made from these"
    assert (line in second.stderr) == (kind == "Q8_0")
    stops = [
        json.loads((tmp_path / name / "manifest.json").read_text())["config"]["eos_token_id"] for name in ("one", "two")
    ]
    assert stops[0] == stops[1]


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("shape", ["tiny", "gemma3", "gemma3_scaled", "untied", "gemma1"])
def test_every_tensor_and_key_equals_the_folders(kind: str, shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", **{**SHAPES[shape], "vocab_size": 4096, "query_pre_attn_scalar": 32})
    scalar = GemmaConfig.from_hf(model).head_dim  # llama.cpp stores none: it is head_dim, but in the 27B sizes
    raw = json.loads((model / "config.json").read_text()) | {"query_pre_attn_scalar": scalar, "eos_token_id": [1, 5]}
    (model / "config.json").write_text(json.dumps(raw))
    (model / "generation_config.json").unlink()
    expected = Checkpoint.open(dequantized(model, tmp_path / "hf", kind))
    actual = Checkpoint.open(prepare(write(model, tmp_path / "model.gguf", kind)))
    assert actual.config == expected.config
    for name in weight_shapes(expected.config):
        assert torch.equal(actual.matrix(name), expected.matrix(name)), name
        assert torch.equal(actual.rows(name, 3, 5), expected.rows(name, 3, 5)), name
        assert actual.dtype(name) == expected.dtype(name)
    for name in norm_names(expected.config):
        assert torch.equal(actual.vector(name), expected.vector(name)), name


@pytest.mark.parametrize("preset", PRESETS)
def test_metadata_of_every_size_gives_its_configuration(preset: str, tmp_path: Path) -> None:
    """Keys as llama.cpp's converter writes them: no pattern, no base of local layers, and no scale of attention."""
    config = PRESETS[preset]
    name = LLAMA_ARCHITECTURES[config.architecture]
    metadata: dict[str, Any] = {
        f"{name}.{key}": getattr(config, ours)
        for key, ours in KEYS.items()
        if ours != "sliding_window" or LOCAL in config.layer_types
    }
    metadata |= {"general.architecture": name, f"{name}.rope.freq_base": config.rope_theta}
    metadata |= {
        f"tokenizer.ggml.{key}_token_id": stop for key, stop in zip(("eos", "eot"), config.eos_token_id, strict=False)
    }
    metadata[f"{name}.attention.layer_norm_rms_epsilon"] = float(np.float32(1e-6))
    if config.rope_factor != 1:
        metadata |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": config.rope_factor}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tables = {"token_embd.weight": (config.vocab_size, config.hidden_size)}
    raw = config_json(tmp_path / "model.gguf", Header(metadata, {}, ()), tables)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert GemmaConfig.from_hf(tmp_path) == config


def test_an_adapter_is_merged_into_a_gguf_file(tmp_path: Path) -> None:
    name, draw = "model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    model = make_checkpoint(tmp_path / "model", vocab_size=4096)
    halves = {"lora_A": (4, 64), "lora_B": (128, 4)}
    (tmp_path / "lora").mkdir()
    save_file(
        {
            f"base_model.model.{name}.{half}.weight": torch.randn(shape, generator=draw)
            for half, shape in halves.items()
        },
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    expected = Checkpoint.open(dequantized(model, tmp_path / "hf", "Q8_0"), lora=tmp_path / "lora")
    folder = prepare(write(model, tmp_path / "model.gguf", "Q8_0"))
    merged = Checkpoint.open(folder, lora=tmp_path / "lora").matrix(name)
    assert torch.equal(merged, expected.matrix(name))
    assert not torch.equal(merged, Checkpoint.open(folder).matrix(name))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FLOAT_TYPES])
def test_rows_are_the_packages_own(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes, because the package quantizes only some of the types."""
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    stored = np.random.default_rng(0).integers(0, 256, (40, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "gemma2")
    writer.add_tensor("blk.0.attn_q.weight", stored, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, name = GgufFile(tmp_path / "file.gguf", GEMMA2.norms), "model.layers.0.self_attn.q_proj.weight"
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(stored, quant))
    assert file.tensors[name].shape == (40, 2 * block) and file.tensors[name].dtype == "F32"
    assert torch.equal(file.rows(name).nan_to_num(), expected.nan_to_num())
    assert torch.equal(file.rows(name, 7, 20).nan_to_num(), expected[7:20].nan_to_num())


def test_the_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    folder = prepare(write(DEMO, tmp_path / "model.gguf"))
    ours, theirs = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (folder, DEMO))
    lines = [
        line for path in sorted((ROOT / "docs").rglob("*.md")) for line in path.read_text().splitlines(keepends=True)
    ]
    lines += [
        "",
        "a   b\t\tc\n\n",
        "<start_of_turn>user\nHi<end_of_turn>\n",
        "\u00e9\u4f60\U0001f600",
        "<bos>a",
        "\u2581\u2581 x",
    ]
    assert len(lines) > 1000
    for line in lines:
        assert ours.encode(line).ids == theirs.encode(line).ids, line
        assert ours.decode(ours.encode(line).ids) == theirs.decode(theirs.encode(line).ids)
    assert (folder / "chat_template.jinja").read_text() == json.loads((DEMO / "tokenizer_config.json").read_text())[
        "chat_template"
    ]


def test_merges_are_those_of_transformers() -> None:
    """Runs of blanks among them: they are the user's own pieces, whose merges come before all others."""
    pieces = [*("\u2581" * length for length in range(2, 9)), *PIECES]
    kind, given = [*[4] * 7, *kinds()], [*[-1000.0] * 7, *scores()]
    # SentencePiece's scores, which transformers reads
    triples = zip(pieces, given, kind, strict=True)
    originals = {piece: 0.0 if each in (3, 4) else score for piece, score, each in triples}
    expected = generate_merges({piece: i for i, piece in enumerate(pieces)}, originals)
    assert merges(pieces, given, kind) == expected
    assert expected[0] == ("\u2581" * 7, "\u2581")


def test_a_split_file_is_read_by_any_of_its_parts(tmp_path: Path) -> None:
    whole = Checkpoint.open(prepare(write(DEMO, tmp_path / "model.gguf")))
    paths = split(whole, tmp_path)
    for path in paths:
        part = Checkpoint.open(prepare(path))
        assert part.config == whole.config and part.files() == paths
        for name in weight_shapes(whole.config):
            assert torch.equal(part.rows(name, 0, 8), whole.rows(name, 0, 8))
    paths[1].unlink()
    refused(run(paths[0], "-o", tmp_path / "out", *FAST), f"{tmp_path} has no {paths[1].name}")
    shutil.copy(paths[0], paths[1])
    refused(run(paths[0], "-o", tmp_path / "out", *FAST), "is part 0 of 2 by its metadata, but 1 of 2 by its name")


def split(whole: Checkpoint, folder: Path) -> list[Path]:
    """The demo in two files, as llama.cpp's gguf-split writes them."""
    weights = load_file(DEMO / "model.safetensors")
    half = len(weights) // 2
    paths = []
    for number, names in enumerate((list(weights)[:half], list(weights)[half:])):
        model = folder / f"part{number}"
        shutil.copytree(DEMO, model)
        save_file({name: weights[name] for name in names}, model / "model.safetensors")
        path = folder / f"tiny-{number + 1:05}-of-00002.gguf"
        paths.append(write(model, path, split__no=number, split__count=2, split__tensors__count=len(weights)))
    return paths


MORE: tuple[tuple[str, list[Any], Any], ...] = (
    ("tokens", PIECES, "one more"),
    ("scores", scores(), 0.0),
    ("token_type", kinds(), 1),
)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"general__architecture": "llama"},
        'general.architecture is "llama"; supported: "gemma", "gemma2", "gemma3"',
    ),
    "a key is missing": ({"skip": ("gemma2.block_count",)}, "has no gemma2.block_count"),
    "tokenizer": ({"tokenizer__ggml__model": "gpt2"}, "tokenizer.ggml.model is 'gpt2'"),
    "no tokens": ({"skip": ("tokenizer.ggml.tokens",)}, "has no tokenizer.ggml.tokens, or of another type"),
    "few scores": ({"tokenizer__ggml__scores": [0.0]}, "4096 tokens, 1 scores and 4096 types"),
    "a byte without a token": (
        {"tokenizer__ggml__tokens": [piece.replace("<0x41>", "<0xxx>") for piece in PIECES]},
        "has no token for the byte <0x41>",
    ),
    "a token twice": ({"tokenizer__ggml__tokens": [*PIECES[:-1], PIECES[9]]}, "a token stands twice"),
    "a score that is no number": (
        {"tokenizer__ggml__scores": [*scores()[:-1], float("nan")]},
        "score is NaN or infinite",
    ),
    "more tokens than rows": (
        {f"tokenizer__ggml__{key}": [*values, last] for key, values, last in MORE},
        "has 4097 tokens, but its table has 4096 rows",
    ),
    "bos": ({"tokenizer__ggml__bos_token_id": 4096}, "tokenizer.ggml.bos_token_id is 4096, but there are 4096 tokens"),
    "long template": (
        {"tokenizer__chat_template": "x" * (1 << 19)},
        "tokenizer.chat_template is not a text of at most",
    ),
    "a size of 0": ({"gemma2__embedding_length": 0}, "model.gguf, as a config.json: hidden_size"),
    "a size that differs": ({"gemma2__embedding_length": 128}, "config.json asks for"),
    "a size that is a text": (
        {"gemma2__attention__head_count": "8"},
        "model.gguf, as a config.json: num_attention_heads",
    ),
    "unknown scaling": ({"gemma2__rope__scaling__type": "yarn"}, 'rope_type is "yarn"'),
    "a list for a text": ({"gemma2__rope__scaling__type": [1, 2]}, "rope_type is a list"),
    "a list for a number": ({"split__count": [1, 2]}, "is part 0 of [1, 2] by its metadata"),
    "texts for scores": ({"tokenizer__ggml__scores": PIECES}, "has no tokenizer.ggml.scores, or of another type"),
    "pattern": ({"gemma2__attention__sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    "another part": ({"split__count": 2, "split__no": 0}, "is part 0 of 2 by its metadata, but 0 of 1 by its name"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_a_gemma_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changed, message = REFUSALS[case]
    result = run("plan", write(DEMO, tmp_path / "model.gguf", **changed))
    refused(result, message, str(tmp_path / "model.gguf"))
    refused(run("plan", tmp_path / "model.gguf"), message)  # nothing that was left in the cache makes it pass


@pytest.mark.parametrize("link", [False, True])
def test_a_pointer_in_a_foreign_folder_is_not_followed(link: bool, tmp_path: Path) -> None:
    """Whoever made a model folder could lay a gguf.json into it, which named the files of this machine that were read."""
    prepared = prepare(write(DEMO, tmp_path / "model.gguf"))
    foreign = shutil.copytree(prepared, tmp_path / "foreign")
    if link:
        (foreign / POINTER).unlink()
        (foreign / POINTER).symlink_to(prepared / POINTER)
    refused(run("plan", foreign), f"{foreign} has no model.safetensors")
    shutil.copy(DEMO / "model.safetensors", foreign)
    assert Checkpoint.open(foreign).files() == [foreign / "model.safetensors"]
    assert Checkpoint.open(prepared).files() == [tmp_path / "model.gguf"]


def test_every_type_that_the_package_dequantizes_is_read() -> None:
    assert {*TYPES} == {*FLOAT_TYPES, *(kind.name for kind in gguf.quants._type_traits)}


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf")
    place = GgufFile(path, GEMMA2.norms)._header.tensors["token_embd.weight"]
    data = path.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 8 * len(place.shape)
    for number, name in ((9, "Q8_1"), (24, "I8"), (999, "of the unknown type 999")):
        path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
        refused(run("plan", path), f"{path}: tensor token_embd.weight is {name}; supported: F32, F16, BF16, Q4_0")


def test_infinite_values_are_refused(tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf", "Q8_0")
    place = GgufFile(path, GEMMA2.norms)._header.tensors["blk.0.attn_q.weight"]
    data = bytearray(path.read_bytes())
    data[place.start : place.start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    refused(run(path, "-o", tmp_path / "out", *FAST), str(path), "self_attn.q_proj.weight holds NaN or infinite values")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf")
    weights = Checkpoint.open(prepare(path))
    path.write_bytes(path.read_bytes() + b"1")
    with pytest.raises(InputError, match="was changed while it was read; export again"):
        weights.matrix("model.layers.0.self_attn.q_proj")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(DEMO, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(run("plan", path), "reading GGUF files needs the package gguf: pip install 'gemma-edge[gguf]'")
    refused(run("plan", tmp_path / "other.gguf"), "gguf")


@pytest.mark.parametrize("seed", range(100))
def test_damage_is_one_line_or_harmless(seed: int, small: Path, tmp_path: Path) -> None:
    """Damage to a number of a tensor or to a letter of a token passes; all other damage is one line."""
    path = tmp_path / "model.gguf"
    path.write_bytes(mutated(small.read_bytes(), random.Random(seed)))
    result = run("quantize", path, "-o", tmp_path / "out", *FAST[:6])
    if result.exit_code:
        refused(result)
        assert not (tmp_path / "out").exists()
    else:
        assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose metadata is small, so that damage meets its numbers and not only its vocabulary."""
    folder = tmp_path_factory.mktemp("small")
    model = make_checkpoint(folder / "model", vocab_size=320)
    few: dict[str, Any] = {"tokens": PIECES[:320], "scores": scores()[:320], "token_type": kinds()[:320]}
    return write(
        model, folder / "model.gguf", "Q8_0", **{f"tokenizer__ggml__{key}": value for key, value in few.items()}
    )


VALUES: tuple[Any, ...] = (
    0, 1, -1, 2**31, 2**63, True, False, 0.0, 2.5, -1.0, float("inf"), float("nan"), 1e38, "", "x", "\0", "{% for %}", "a" * 5000,
    [1], [1.5], ["x"], [True], ["<bos>"] * 3, [7] * 5000,
)  # fmt: skip


def test_every_key_with_every_odd_value_is_one_line_or_harmless(tmp_path: Path) -> None:
    """Types and values that llama.cpp's converter never writes."""
    model, draw = make_checkpoint(tmp_path / "model", vocab_size=320), random.Random(0)
    few: dict[str, Any] = {"tokens": PIECES[:320], "scores": scores()[:320], "token_type": kinds()[:320]}
    plain: dict[str, Any] = {f"tokenizer__ggml__{key}": value for key, value in few.items()}
    whole = read_header(write(model, tmp_path / "whole.gguf", **plain)).metadata
    outcomes = []
    for key in sorted(whole.keys() - {"general.architecture"}):
        for value in draw.sample(VALUES, 6):
            path = write(model, tmp_path / "model.gguf", **{**plain, key.replace(".", "__"): value})
            try:
                prepare(path)
                outcomes.append("")
            except InputError as error:
                outcomes.append(str(error))
            assert "\n" not in outcomes[-1]
    refusals = [line for line in outcomes if line]
    assert len(outcomes) > 100 and 20 < len(refusals) < len(outcomes) - 10
    assert all(str(tmp_path / "model.gguf") in line for line in refusals)


def test_an_image_encoder_in_the_file_is_left_out_and_one_alone_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ollama keeps both in one file, llama.cpp keeps the encoder in a file of its own."""
    model = shutil.copytree(DEMO, tmp_path / "model")
    tensors = load_file(DEMO / "model.safetensors")
    more = {"v.blk.0.attn_q.weight": torch.zeros(32, 32), "mm.input_projection.weight": torch.zeros(32, 32)}
    save_file({**tensors, **more}, model / "model.safetensors")
    folder = prepare(write(model, tmp_path / "model.gguf"))
    weights = Checkpoint.open(folder)
    assert f"{tmp_path / 'model.gguf'}: 2 tensors of its image encoder are left out" in caplog.text
    whole = Checkpoint.open(prepare(write(DEMO, tmp_path / "text.gguf")))
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(weights.matrix(name), whole.matrix(name))
    alone = write(DEMO, tmp_path / "mmproj.gguf", general__architecture="clip")
    refused(run("plan", alone), 'is "clip"; supported: "gemma', "; it is an image encoder")


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma-embedding"])
def test_another_architecture_is_named(name: str, tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf", general__architecture=name)
    refused(run("plan", path), f'{path}: general.architecture is "{name}"; supported: "gemma')


def test_a_tensor_of_another_model_is_named(tmp_path: Path) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    save_file(
        {**load_file(DEMO / "model.safetensors"), "rope_freqs.weight": torch.ones(32)}, model / "model.safetensors"
    )
    path = write(model, tmp_path / "model.gguf")
    refused(run("plan", path), f"{path} holds rope_freqs.weight", "convert the model again")


def test_a_file_is_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path has the form of a hub id; the message named a folder of the cache."""
    write(DEMO, tmp_path / "lora.gguf")
    monkeypatch.chdir(tmp_path.parent)
    path = f"{tmp_path.name}/lora.gguf"
    refused(run("plan", DEMO, "--lora", path), f"--lora {path}; give a PEFT adapter's folder")
