"""Distillation: the gradients are autograd's, what comes out is never worse on windows held out, and a seed gives it again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import hf_logits, hf_model, hf_quantized, make_checkpoint
from torch import Tensor, nn
from torch.testing import assert_close

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Checkpoint, norm_names, weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.distillation.distill import CodedLinear, Schedule, distill
from gemma_edge.quantize.distillation.recovery import recover
from gemma_edge.quantize.integers import MIN_SCALE, quantize
from gemma_edge.quantize.recipe import ANY, TABLE_PATTERN, QuantConfig, QuantRule, Recipe

INT4 = QuantConfig(4, 32)
# a float table, because transformers reads no other
RECIPE = Recipe("test", (QuantRule(TABLE_PATTERN, None), QuantRule(r".*\.k_proj", None), QuantRule(ANY, INT4)))
QUICK = Schedule(epochs=2, held_out=3)
WILD = Schedule(epochs=1, held_out=3, learning_rate=3.0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(windows: int = 11) -> Tensor:
    """(N, 24) int64, BOS first."""
    ids = torch.randint(3, 320, (windows, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    return ids


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3_text"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("recovery")
    return Checkpoint.open(make_checkpoint(folder, model_type=request.param, initializer_range=0.1))


@pytest.fixture(scope="module")
def given(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return write_quantized(source, RECIPE, tmp_path_factory.mktemp("recovery") / "given")


def copied(given: QuantizedCheckpoint, out: Path) -> QuantizedCheckpoint:
    return QuantizedCheckpoint.open(Path(shutil.copytree(given.folder, out)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def hf_kl(source: Checkpoint, folder: Path, windows: Tensor) -> float:
    """KL(original || folder) by transformers, nats per token."""
    right, said = hf_model(source.folder), hf_quantized(folder)
    total = 0.0
    for window in windows:
        p, q = (hf_logits(model, window).double().log_softmax(-1) for model in (right, said))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(windows)


# The arithmetic


def test_gradients_of_a_coded_linear_are_autograds() -> None:
    linear = CodedLinear(quantize(draw(0, 24, 64), INT4, "rtn"))
    x, arriving = draw(1, 2, 5, 64).requires_grad_(), draw(2, 2, 5, 24)
    linear.log_change.data.copy_(0.1 * draw(3, 24, 2))
    found = torch.autograd.grad(linear(x), (x, linear.log_change), arriving)
    change = linear.log_change.detach().clone().requires_grad_()
    start, codes = linear.get_buffer("start"), linear.get_buffer("codes")
    weight = codes.view(24, 2, 32).float() * (start * change.exp())[..., None]
    expected = torch.autograd.grad(x @ weight.flatten(1).T, (x, change), arriving)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_coded_linear_gives_its_codes_back_under_scales_that_backends_take() -> None:
    tensor = quantize(draw(0, 24, 64), INT4, "rtn")
    linear = CodedLinear(tensor)
    same = linear.result()
    assert_close(same.scale, tensor.scale, rtol=0.0, atol=0.0)
    linear.log_change.data.copy_(draw(1, 24, 2))
    linear.log_change.data[0] = -60.0
    found = linear.result()
    assert_close(found.codes, tensor.codes, rtol=0.0, atol=0.0)
    assert found.scale.dtype == torch.bfloat16 and (found.scale[0] == MIN_SCALE).all()
    # half of bfloat16's step
    assert_close(
        found.scale[1:].float(), (tensor.scale * linear.log_change.exp())[1:].detach().float(), rtol=2**-8, atol=0
    )


class Toy(nn.Module):
    """Token -> row of a table -> logits."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.table, self.head = draw(5, 40, 64), head

    def forward(self, window: Tensor) -> Tensor:
        out: Tensor = self.head(self.table[window])
        return out


def toy(schedule: Schedule) -> tuple[Toy, Toy, float, float]:
    """A float model, its coarse student after distillation, and the KL that was reported before and after."""
    weight = 0.3 * draw(6, 40, 64)
    teacher = Toy(nn.Linear(64, 40, bias=False))
    teacher.head.get_parameter("weight").data.copy_(weight)
    head = CodedLinear(quantize(weight, QuantConfig(4, 0), "rtn"))
    student = Toy(head)
    windows = torch.randint(0, 40, (12, 10), generator=torch.Generator().manual_seed(7))
    before, after = distill(student, teacher, [head.log_change], windows, schedule)
    return teacher, student, before, after


def test_the_parameters_end_as_they_were_best_on_windows_held_out() -> None:
    schedule = Schedule(epochs=6, learning_rate=0.02, held_out=3)
    teacher, student, before, after = toy(schedule)
    assert after < 0.95 * before
    held_out = torch.randint(0, 40, (12, 10), generator=torch.Generator().manual_seed(7))[-3:]
    with torch.no_grad():
        p, q = (model(held_out).double().log_softmax(-1) for model in (teacher, student))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(after, rel=1e-4)


def test_training_that_only_does_harm_changes_nothing() -> None:
    _, student, before, after = toy(Schedule(epochs=2, learning_rate=5.0, held_out=3))
    assert before == after
    assert_close(student.head.get_parameter("log_change").data, torch.zeros(40, 1), rtol=0.0, atol=0.0)


def test_a_seed_gives_the_same_again_and_another_one_something_else() -> None:
    first, again, other = (
        toy(Schedule(epochs=2, learning_rate=0.02, held_out=3, seed=seed))[1].head.get_parameter("log_change")
        for seed in (0, 0, 1)
    )
    assert_close(first, again, rtol=0.0, atol=0.0)
    assert not torch.equal(first, other)


# A checkpoint


def test_a_folder_comes_closer_to_the_original_and_keeps_its_codes(
    source: Checkpoint, given: QuantizedCheckpoint, tmp_path: Path
) -> None:
    weights, windows, steps = copied(given, tmp_path / "out"), text(), list[int]()
    found = recover(source, weights, windows, QUICK, steps.append)
    assert found.tokens == 8 * 24 and sum(steps) == 2 * 8
    assert found.kl_before == pytest.approx(hf_kl(source, given.folder, windows[-3:]), rel=1e-3)
    assert found.kl_after < found.kl_before
    # by transformers from the folder, where the scales are rounded to bfloat16
    assert hf_kl(source, weights.folder, windows[-3:]) == pytest.approx(found.kl_after, rel=0.05)
    after = QuantizedCheckpoint.open(weights.folder)
    moved = 0
    for name, (rows, _) in weight_shapes(source.config).items():
        assert after.configs[name] == given.configs[name]
        if after.configs[name] is None:
            assert_close(after.matrix(name), given.matrix(name), rtol=0.0, atol=0.0)
            continue
        pair = [each.quantized(name, 0, rows) for each in (after, given)]
        assert_close(pair[0].codes, pair[1].codes, rtol=0.0, atol=0.0)
        moved += not torch.equal(pair[0].scale, pair[1].scale)
    assert moved == 4 * 6  # all but k_proj and the table, which are float
    norms = [not torch.equal(after.vector(name), given.vector(name)) for name in norm_names(source.config)]
    assert sum(norms) == len(norms) - 1  # all but the last one


def test_a_folder_that_it_would_make_worse_is_left_alone(
    source: Checkpoint, given: QuantizedCheckpoint, tmp_path: Path
) -> None:
    weights = copied(given, tmp_path / "out")
    found = recover(source, weights, text(), WILD)
    assert found.kl_after == found.kl_before and files(weights.folder) == files(given.folder)


def test_the_same_seed_writes_the_same_bytes(source: Checkpoint, given: QuantizedCheckpoint, tmp_path: Path) -> None:
    made = []
    for i, seed in enumerate((0, 0, 1)):
        weights = copied(given, tmp_path / str(i))
        recover(source, weights, text(), Schedule(epochs=1, held_out=3, seed=seed))
        made.append(files(weights.folder))
    assert made[0] == made[1] != made[2] and made[0] != files(given.folder)


def test_text_that_is_all_held_out_is_refused(source: Checkpoint, given: QuantizedCheckpoint) -> None:
    with pytest.raises(InputError, match=r"^distill on 72 tokens: at least 96 are needed, of which 72 are only"):
        recover(source, given, text(3), QUICK)
