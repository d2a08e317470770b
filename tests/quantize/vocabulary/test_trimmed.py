"""A smaller vocabulary: the text that it was made for becomes the same tokens, whose logits are the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from support.checkpoints import DEMO, TEXTS, hf_logits, hf_model
from support.commands import refused, run
from torch.testing import assert_close
from transformers import AutoTokenizer

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.model.checkpoint import TABLE, Checkpoint
from gemma_edge.model.hub import copy_companions
from gemma_edge.quantize.api import open_source
from gemma_edge.quantize.checkpoint.store import open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe
from gemma_edge.quantize.vocabulary.kept import Merges, kept_ids, rewritten
from gemma_edge.quantize.vocabulary.trimmed import Trimmed
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.text.check import check_text_files

KJV = (TEXTS / "calibration_kjv.txt").read_text(encoding="utf-8")
SAYS = "And the LORD said unto Cain"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "kept.txt"
    path.write_text(KJV[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trimmed(text: Path) -> Trimmed:
    source = open_source(str(DEMO), None, str(text))
    assert isinstance(source, Trimmed)
    return source


@pytest.fixture(scope="module")
def full() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def small(trimmed: Trimmed) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(trimmed.text_folder / "tokenizer.json"))


def test_the_kept_text_becomes_the_same_tokens_and_other_texts_the_same_text(
    trimmed: Trimmed, full: tokenizers.Tokenizer, small: tokenizers.Tokenizer
) -> None:
    assert 1000 < len(trimmed.ids) < 3000 and len(trimmed.ids) % 64 == 0
    for kept in (KJV[:20_000], *KJV[:20_000].splitlines()):
        ids = small.encode(kept, add_special_tokens=False).ids
        assert trimmed.ids[ids].tolist() == full.encode(kept, add_special_tokens=False).ids
    for other in (
        KJV[20_000:60_000],
        "naïve façade 東京 🙂\t\x00\n\n  two  blanks",
        "<start_of_turn>user\nHi<end_of_turn>",
    ):
        ids = small.encode(other, add_special_tokens=False).ids
        assert max(ids) < len(trimmed.ids) and small.decode(ids) == full.decode(full.encode(other).ids)
    chat = "<start_of_turn>user\nmodel<end_of_turn>\n<start_of_turn>model\n"
    assert trimmed.ids[small.encode(chat).ids].tolist() == full.encode(chat).ids


def test_held_out_text_becomes_the_same_tokens_if_every_token_of_its_characters_is_kept(
    full: tokenizers.Tokenizer,
) -> None:
    """The bar is 99.9 % of the documents; with all characters of the text kept it is every one."""
    data = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    foreign = {**data["model"]["vocab"], **{f"é{i}": 4096 + i for i in range(100)}}
    data["model"]["vocab"] = foreign
    ids = kept_ids(data, ["In the beginning"], len(foreign), (), by_characters=True)
    assert len(ids) < len(foreign) - 30  # what is written in other characters is gone
    small = tokenizers.Tokenizer.from_str(json.dumps(rewritten(data, ids)))
    for name in ("heldout_austen.txt", "heldout_kjv.txt"):
        for line in (TEXTS / name).read_text(encoding="utf-8").splitlines():
            found = [ids[token] for token in small.encode(line, add_special_tokens=False).ids]
            assert found == full.encode(line, add_special_tokens=False).ids


def test_every_step_on_the_way_to_a_token_is_kept() -> None:
    merges = Merges({("a", "b"): 0, ("c", "d"): 1, ("ab", "cd"): 2, ("b", "c"): 3})
    assert merges.way_to("abcd") == ["a", "b", "c", "d", "ab", "cd", "abcd"]
    assert merges.way_to("bcd") == ["b", "c", "d", "cd"]  # and no further: no text becomes this token


def test_logits_of_kept_tokens_are_those_of_the_whole_model(trimmed: Trimmed, small: tokenizers.Tokenizer) -> None:
    ids = torch.tensor(small.encode(SAYS).ids)
    assert_close(
        hf_logits(hf_model(DEMO), trimmed.ids[ids])[:, trimmed.ids],
        trimmed_logits(trimmed, ids),
        rtol=1e-5,
        atol=1e-4,
    )


def trimmed_logits(weights: Trimmed, ids: torch.Tensor) -> torch.Tensor:
    from gemma_edge.model.layerwise import hidden_states, logits

    return logits(weights, hidden_states(weights, ids, context=512))


def test_transformers_loads_the_checkpoint_with_its_tokenizer(trimmed: Trimmed, tmp_path: Path) -> None:
    folder = write_quantized(trimmed, make_recipe(32), tmp_path / "out").folder
    tokenizer, whole = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(DEMO)
    assert trimmed.ids[tokenizer(SAYS).input_ids].tolist() == whole(SAYS).input_ids
    model = hf_model(folder)
    assert model.config.vocab_size == len(trimmed.ids) == len(model.get_parameter(f"{TABLE}.weight"))
    ids = torch.tensor(tokenizer(SAYS).input_ids)
    expected = hf_logits(hf_model(DEMO), trimmed.ids[ids])[:, trimmed.ids]
    assert_close(hf_logits(model, ids), expected, rtol=1e-5, atol=1e-4)
    names = {path.name for path in folder.iterdir()}
    assert "tokenizer.json" in names and not names & {"tokenizer.model", "added_tokens.json"}
    config = open_weights(folder).config
    assert check_text_files(folder, config) == config.eos_token_id == trimmed.config.eos_token_id


def test_rows_of_integers_are_kept_bit_for_bit(text: Path, tmp_path: Path) -> None:
    made = write_quantized(Checkpoint.open(DEMO), make_recipe(4), tmp_path / "integers")
    trimmed = open_source(str(made.folder), None, str(text))
    assert isinstance(trimmed, Trimmed) and trimmed.is_quantized
    again = write_quantized(trimmed, make_recipe(4), tmp_path / "again")
    rows, part = made.quantized(TABLE, 0, 4096), again.quantized(TABLE, 0, len(trimmed.ids))
    assert torch.equal(part.codes, rows.codes[trimmed.ids]) and torch.equal(part.scale, rows.scale[trimmed.ids])
    assert torch.equal(again.plain_rows(TABLE, 0, 9), made.plain_rows(TABLE, 0, 4096)[trimmed.ids[:9]])


def test_a_bundle_takes_text_and_says_what_was_dropped(text: Path, trimmed: Trimmed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(DEMO, "-o", out, "--vocab", text, "--quality", "fast", "--head-bits", "4")
    assert done.exit_code == 0, done.output
    manifest = Manifest.load(out)
    assert manifest.verification["onnx"].passed and manifest.config.vocab_size == len(trimmed.ids)
    kept = manifest.model.vocabulary
    assert kept is not None and (kept.tokens, kept.kept, kept.text) == (4096, len(trimmed.ids), ("kept.txt",))
    assert f"vocabulary: {kept.kept} of 4096 tokens, those of kept.txt" in run("inspect", out).output
    assert not (out / "tokenizer.model").exists()
    runtime = open_runtime(out)
    ids = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode(SAYS).ids
    assert runtime.prefill(ids).shape == (len(trimmed.ids),)


@pytest.mark.parametrize(
    ("vocab", "content", "parts"),
    [
        ("nowhere.txt", None, ["--vocab nowhere.txt", "no file nowhere.txt"]),
        ("auto:", None, ["--vocab auto:", "pass a text file"]),
        ("empty.txt", b" \n", ["empty.txt is empty", "leave no token"]),
        ("auto:empty.txt", b"", ["empty.txt is empty", "leave no token"]),
        ("bad.txt", b"\xff\xfe\xff", ["bad.txt", "UTF-8"]),
        ("folder", None, ["--vocab folder holds no text"]),
    ],
)
def test_a_text_that_leaves_nothing_is_one_line(
    vocab: str, content: bytes | None, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / vocab.removeprefix("auto:")).write_bytes(content)
    refused(run(DEMO, "-o", "out", "--vocab", vocab), *parts)
    assert not Path("out").exists()


def test_a_model_without_a_tokenizer_or_with_another_kind_is_one_line(text: Path, tmp_path: Path) -> None:
    bare, other = tmp_path / "bare", tmp_path / "other"
    for folder in (bare, other):
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(DEMO / name)
    refused(run("plan", bare, "--vocab", text), f"{bare} has no tokenizer.json", "leave it out")
    copy_companions(DEMO, other)
    data = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = [[name, 0.0] for name in data["model"]["vocab"]]
    data["model"] = {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": True}
    (other / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    refused(run("plan", other, "--vocab", text), "tokenizer of the kind Unigram", "only BPE")
    shutil.rmtree(other)
