"""gemma-eval takes a GGUF file where it takes a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import DEMO, TEXTS
from support.gguf_files import dequantized, write

from gemma_edge.errors import InputError
from gemma_edge.evaluate.evaluate import evaluate
from gemma_edge.evaluate.open_model import open_model
from gemma_edge.evaluate.options import EvaluationOptions


def test_a_gguf_file_gives_what_the_folder_of_its_values_gives(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((TEXTS / "heldout_austen.txt").read_text()[:1500])
    file, folder = write(DEMO, tmp_path / "model.gguf", "Q8_0"), dequantized(DEMO, tmp_path / "hf", "Q8_0")
    models = EvaluationOptions(models=(file, DEMO), reference=folder, texts=(text,), window=40, max_tokens=100)
    found, original = evaluate(models).results
    assert (found.name, found.kl, found.top1, found.ppl_change) == ("model.gguf", 0.0, 1.0, 0.0)
    assert original.kl is not None and original.kl > 0
    assert found.bits_per_weight == 8.5  # as it is stored: 32 codes and a scale of 16 bits


@pytest.mark.parametrize(("name", "message"), [("none.gguf", "has no none.gguf"), ("text.txt", "a GGUF file")])
def test_what_is_no_model_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    with pytest.raises(InputError, match=message):
        open_model(tmp_path / name)
