"""--compare: the test against scipy's, and what it says of results that differ, agree, or are too few."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.pages import Page

from gemma_edge.bench import result as bench_result
from gemma_edge.bench.cli import main
from gemma_edge.bench.compare import compare, mann_whitney
from gemma_edge.bench.result import Result, Settings
from gemma_edge.errors import InputError


def results(speeds: list[float], *, model: str = "m", prefill: int = 100, busy: float = 0.0) -> list[Result]:
    """A process per decode speed, each with three repetitions around it."""
    found = []
    for speed in speeds:
        result = Result(
            "gemma-bench", "", {"name": model, "backend": "onnx"}, Settings(2, prefill, 64, 3), {"name": "d"}
        )
        result.decode_s = [64 / speed * factor for factor in (0.9, 1.0, 1.1)]
        result.memory = {"peak_mib": 1000.0}
        result.others_cores = busy
        found.append(result)
    return found


@pytest.mark.parametrize(
    ("sizes", "step"), [((3, 4), 0.0), ((5, 5), 0.0), ((8, 6), 0.0), ((12, 12), 0.0), ((3, 4), 0.5), ((5, 5), 0.5)]
)
def test_p_is_scipys(sizes: tuple[int, int], step: float) -> None:
    """Without ties its exact method; with ties (values in steps) its test over all permutations."""
    stats = pytest.importorskip("scipy.stats", reason="needs the package scipy")
    rng = np.random.default_rng(sum(sizes))
    a, b = rng.normal(0, 1, sizes[0]), rng.normal(1, 1, sizes[1])
    if not step:
        expected = stats.mannwhitneyu(a, b, method="exact").pvalue
    else:
        a, b = np.round(a / step) * step, np.round(b / step) * step

        def rank_sum(x: np.ndarray, y: np.ndarray) -> float:
            return float(abs(stats.rankdata([*x, *y])[: len(x)].sum() - len(x) * (len(x) + len(y) + 1) / 2))

        permuted = stats.permutation_test((a, b), rank_sum, n_resamples=np.inf, alternative="greater")
        expected = permuted.pvalue
    assert mann_whitney(a.tolist(), b.tolist()) == pytest.approx(expected)


def verdicts(before: list[Result], after: list[Result]) -> dict[str, str]:
    return {change.metric: change.verdict for change in compare(before, after)}


def test_faster_slower_same_and_too_few() -> None:
    old = results([20.0, 20.1, 19.9, 20.2, 19.8])
    faster, slower = results([22, 22.1, 21.9, 22.2, 21.8]), results([18, 18.1, 17.9, 18.2, 17.8])
    little = results([20.3, 20.31, 20.32, 20.33, 20.34])  # all of them faster, but not by 3 %
    assert verdicts(old, faster) == {"decode_tokens_per_s": "better", "rss_peak_mib": "same"}
    assert verdicts(old, slower)["decode_tokens_per_s"] == "worse"
    assert verdicts(old, little)["decode_tokens_per_s"] == "same"
    assert verdicts(old[:4], faster)["decode_tokens_per_s"] == "unknown"


def test_repetitions_in_one_process_are_no_samples() -> None:
    """They share its luck: two runs of one bundle on a busy machine differed by them at p = 0.004."""
    once = results([20.0]), results([25.0])
    for (result,) in once:
        result.decode_s *= 10
    assert verdicts(*once)["decode_tokens_per_s"] == "unknown"


def test_what_each_file_has_only_one_of_does_not_keep_them_apart() -> None:
    old = results([20.0] * 5, model="before") + results([10.0] * 5, model="before", prefill=500)
    new = results([30.0] * 5, model="after") + results([10.0] * 5, model="after", prefill=500)
    found = {(change.group, change.metric): change.verdict for change in compare(old, new)}
    assert found["prefill 100", "decode_tokens_per_s"] == "better"
    assert found["prefill 500", "decode_tokens_per_s"] == "same"


def test_nothing_in_common_is_refused() -> None:
    mixed = results([1.0], prefill=1) + results([1.0], prefill=2)
    with pytest.raises(InputError, match=r"nothing in common: prefill 1; prefill 2 there, prefill 3; prefill 4 here"):
        compare(mixed, results([1.0], prefill=3) + results([1.0], prefill=4))


def test_no_change_is_rarely_taken_for_one() -> None:
    """Of 300 comparisons of noise with itself (5 %, five processes each) at most one in fifty is called a change."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        before, after = (results(rng.normal(20, 1, 5).tolist()) for _ in range(2))
        wrong += verdicts(before, after)["decode_tokens_per_s"] != "same"
    assert wrong <= 6


def test_the_command_says_what_changed_and_how_it_knows(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(bench_result.to_json(results([20.0, 20.1, 19.9, 20.2, 19.8])))
    new.write_text(bench_result.to_json(results([22, 22.1, 21.9, 22.2, 21.8], busy=0.5)))
    done = CliRunner().invoke(main, ["--compare", str(old), str(new)])
    assert done.exit_code == 0, done.output
    assert "better: decode, tok/s 20.00 -> 22.00 (+10.0%), all" in done.stdout
    assert "1 of 2 changed beyond noise" in done.stdout and "exact Mann-Whitney" in done.stdout
    assert "new.json: other processes kept 0.5 cores busy" in done.stdout
    printed = json.loads(CliRunner().invoke(main, ["--compare", str(old), str(new), "--json"]).stdout)
    assert printed[0]["verdict"] == "better" and printed[0]["change"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "\"><svg onload='a'>", "$(reboot) $x$ --> ]]>", "a\nb"])
def test_what_model_and_phone_are_called_is_text_on_the_page(name: str) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    from gemma_edge.bench.html import page

    measured = [each for model in (name, f"other {name}") for each in results([10.0, 20.0], model=model)]
    for each in measured:
        each.device["name"] = name
    found = Page(page(measured))
    assert " ".join(found.text.split()).count(" ".join(name.split())) >= 3 and found.scripts == []


def test_a_name_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's folder or phone could clear the screen, or write over what stands there."""
    from gemma_edge.report.console import print_table

    print_table("a\x1b[2Jb", ("model",), [["c\x1b]0;d\x07\x9b"]], names=("model",))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x9b" not in shown and "a\\x1b[2Jb" in shown and "c\\x1b]0;d\\x07" in shown


def test_a_table_in_a_pipe_is_not_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless COLUMNS says how wide it is."""
    from gemma_edge.report.console import print_table

    name = "a long name " * 10
    for columns in (None, "80"):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        print_table("", ("model", "speed"), [[name, "1.0 tokens/s"]], names=("model",))
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert (len(rows) > 1) == bool(columns)
