"""A model of 600 MB in the page: WebAssembly has 4 GiB of memory at most."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.browsing.browser import needs_browser
from support.browsing.page import feed, needs_site, without_npm
from support.checkpoints import make_checkpoint, relative_error
from support.lowered import prefilled, some_ids
from support.tflite_bundles import make_bundle

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export.backend import exporter
from gemma_edge.export.web.backend import COPIES
from gemma_edge.model.checkpoint import weight_shapes
from gemma_edge.model.config import PRESETS
from gemma_edge.quantize.recipe import QuantConfig, make_recipe

LARGE = {"vocab_size": 430080, "hidden_size": 1152, "intermediate_size": 36864, "num_hidden_layers": 2}


@needs_browser
@needs_site
def test_600_mb_load_and_answer_within_the_plans_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of it is the table, as in every small Gemma."""
    without_npm(monkeypatch)
    model = make_checkpoint(tmp_path / "model", initializer_range=0.02, **LARGE)
    recipe = make_recipe(4, group_size=0, method="rtn")
    _, bundle = make_bundle(model, tmp_path, recipe, context=24, name="web")
    shutil.rmtree(model)
    size, chunks = (bundle / "model.web.tflite").stat().st_size, [9, 3, 1]
    assert size >= 600e6
    ids = some_ids(sum(chunks), 4000)
    said = feed(bundle, ids, chunks, tmp_path)
    assert said["heap"] <= COPIES * size
    assert relative_error(torch.tensor(said["rows"]), prefilled(gemma_edge.load(bundle), ids, chunks)) <= 0.02


def test_a_matrix_that_would_become_zeros_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In XNNPACK the number of a matrix's bits overflows where addresses have 32."""
    without_npm(monkeypatch)
    web = exporter("web")
    recipe = make_recipe(4, group_size=0, method="rtn")
    for name, head_bits, refused in (("gemma2-2b", None, True), ("gemma2-2b", 4, False), ("gemma3-1b", None, False)):
        config = replace(PRESETS[name], tie_word_embeddings=head_bits is None)
        configs = recipe.configs(weight_shapes(config))
        if head_bits:
            configs["lm_head"] = QuantConfig(head_bits, 0)
        with pytest.raises(InputError, match="use head_bits 4") if refused else nullcontext():
            web.refuse_unsupported(config, configs, 32)
