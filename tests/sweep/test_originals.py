"""Points with an adapter or a smaller vocabulary: each is compared with its own original, not with the model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="distributed is not installed: pip install 'gemma-edge[sweep]'")
pytest.importorskip("optuna", reason="optuna is not installed: pip install 'gemma-edge[sweep]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gemma-edge[sweep]'")

import torch
from peft import LoraConfig, get_peft_model
from support.checkpoints import DEMO, TEXTS, hf_model
from support.commands import refused
from support.sweeping.command import SMALL, run

from gemma_edge.bundle.manifest import Manifest


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that changes what the demo says."""
    torch.manual_seed(1)
    model = get_peft_model(hf_model(DEMO), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the halves B are zero before training
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_and_a_vocabulary_are_axes_like_all_others(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sorted(TEXTS.rglob("*.txt"))[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.txt").write_text(text.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    done = run(
        *(DEMO, "-o", "out", "--bits", "8", "--lora", f"none,{adapter.name}", "--vocab", "kept.txt"),
        *("--pick", "size", "--json", *SMALL),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    plain, adapted = found["rows"]
    assert (plain["state"], adapted["state"]) == ("measured", "measured") and plain["name"] == "no lora"
    # 8 bits are close to the original; an adapter or tokens of another model would be nats away
    assert 0 < plain["kl"] < 0.01 and 0 < adapted["kl"] < 0.01 and adapted["ppl"] > 2 * plain["ppl"]
    assert found["units"]["merge"]["computed"] == found["units"]["reference"]["computed"] == 2
    picked = Manifest.load(tmp_path / "out" / "bundle")
    assert picked.model.vocabulary is not None and picked.model.vocabulary.kept < 4096
    assert picked.verification["onnx"].passed


def test_an_adapter_or_text_that_is_none_is_one_line(tmp_path: Path) -> None:
    refused(run(DEMO, "-o", tmp_path / "out", "--lora", tmp_path / "no"), "no point of the space", "PEFT adapter")
    refused(run(DEMO, "-o", tmp_path / "out", "--vocab", tmp_path / "no"), "no point of the space", "there is no file")
