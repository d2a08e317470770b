"""The lm-eval adapter against direct computation, on a toy whose logits depend on every token fed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.checkpoints import DEMO
from support.toys import ToyRuntime, toy_backend, toy_manifest

from gemma_edge.errors import InputError
from gemma_edge.evaluate.options import TaskOptions
from gemma_edge.progress import no_progress
from gemma_edge.text.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="needs the package lm-eval, of the eval extra")

from gemma_edge.evaluate.lm_eval_adapter import RuntimeLM, Tasks

BOS = 2


class ToyLM(RuntimeLM):
    """Knows its toy."""

    def __init__(self, toy: ToyRuntime, tokenizer: Tokenizer) -> None:
        super().__init__(toy, tokenizer, no_progress)
        self.toy = toy


def toy_lm(context: int = 64) -> ToyLM:
    manifest = toy_manifest(backends={"onnx": toy_backend(context=context)})
    tokenizer = Tokenizer.of_folder(DEMO, manifest.config)
    return ToyLM(ToyRuntime(manifest), tokenizer)


def rows(ids: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(T, V) log probabilities of the toy, in double precision."""
    x = ToyRuntime().score(ids).astype(np.float64)
    x -= x.max(-1, keepdims=True)
    found: np.ndarray[Any, np.dtype[np.float64]] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return found


def direct(ids: list[int], count: int) -> float:
    """log p of the last `count` tokens given those before them."""
    found = rows(ids[:-1])
    return float(sum(found[position - 1, ids[position]] for position in range(len(ids) - count, len(ids))))


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_loglikelihood_is_the_direct_sum_with_bos_in_front() -> None:
    lm = toy_lm()
    context, continuation = "It is a truth universally", " acknowledged, that"
    ((found, greedy),) = lm.loglikelihood([request(context, continuation)], disable_tqdm=True)
    whole, before = lm.tok_encode(context + continuation), lm.tok_encode(context)
    assert whole[0] == BOS and whole[: len(before)] == before and len(whole) > len(before) + 1
    assert found == pytest.approx(direct(whole, len(whole) - len(before)), rel=1e-6)
    assert greedy is False


def test_an_empty_context_is_bos() -> None:
    lm = toy_lm()
    ((found, _),) = lm.loglikelihood([request("", "Call me Ishmael.")], disable_tqdm=True)
    ids = lm.tok_encode("Call me Ishmael.")
    assert found == pytest.approx(direct(ids, len(ids) - 1), rel=1e-6)


def test_greedy_is_true_only_for_the_most_likely_continuation() -> None:
    lm, ids = toy_lm(), [BOS, 300, 301]
    best = [int(rows(ids)[-1].argmax())]
    best.append(int(rows([*ids, *best])[-1].argmax()))
    requests = [(None, ids, best), (None, ids, [best[0], best[1] - 1]), (None, ids, [best[0] - 1, best[1]])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests)] == [True, False, False]


def test_answers_of_one_token_share_one_run_of_the_question() -> None:
    lm = toy_lm()
    question, other = [BOS, *range(300, 310)], [BOS, *range(400, 405)]
    requests: list[tuple[Any, list[int], list[int]]] = [(None, question, [token]) for token in (50, 60, 70)]
    requests.insert(1, (None, other, [50, 51]))
    found = [score for score, _ in lm._loglikelihood_tokens(requests)]
    assert lm.toy.resets == 2
    expected = [direct([*context, *answer], len(answer)) for _, context, answer in requests]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_context_that_is_too_long_loses_its_oldest_tokens_but_not_bos() -> None:
    lm = toy_lm(context=10)
    context, answer = [BOS, *range(300, 320)], [50, 51, 52]
    ((found, _),) = lm._loglikelihood_tokens([(None, context, answer)])
    assert lm.toy.fed == [BOS, *range(313, 320), 50, 51] and len(lm.toy.fed) == 10
    assert found == pytest.approx(direct([*lm.toy.fed, 52], 3), rel=1e-6)
    with pytest.raises(InputError, match="an answer of 11 tokens exceeds toy's context of 10"):
        lm._loglikelihood_tokens([(None, [BOS], list(range(50, 61)))])


def test_rolling_scores_every_token_once_in_windows_that_begin_with_bos() -> None:
    lm = toy_lm(context=10)
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
    (found,) = lm.loglikelihood_rolling([request(text)])
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert BOS not in ids and len(ids) > 18
    # 9 tokens after BOS; then BOS and 10 tokens, of which the last up to 9 are new: what is fed never exceeds the context
    expected = direct([BOS, *ids[:9]], 9)
    for start in range(9, len(ids), 9):
        end = min(start + 9, len(ids))
        expected += direct([BOS, *ids[end - 10 : end]], end - start)
    assert found == pytest.approx(expected, rel=1e-6)


def test_answers_are_greedy_and_end_at_the_first_stop_text_or_the_limit() -> None:
    lm = toy_lm()
    prompt = "And the LORD said unto"
    ids = lm.tok_encode(prompt)
    answer: list[int] = []
    for _ in range(12):
        answer.append(int(rows([*ids, *answer])[-1].argmax()))
    whole = lm._tokenizer.decode(answer)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    limited, stopped = lm.generate_until(
        [
            request(prompt, {"until": ["no such text"], "max_gen_toks": 12}),
            request(prompt, {"until": [stop], "max_gen_toks": 12, "do_sample": False, "temperature": 1.0}),
        ]
    )
    assert limited == whole and len(whole) > 12
    assert stopped == whole[: whole.index(stop)] and stop not in stopped


def test_a_prompt_leaves_room_for_its_answer() -> None:
    lm = toy_lm(context=20)
    lm.generate_until([request("It is a truth universally acknowledged " * 10, {"until": [], "max_gen_toks": 8})])
    assert lm.toy.fed[0] == BOS and len(lm.toy.fed) == 12 + 7  # the last token is not fed


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("task: broken\ndataset_path: json\n  wrong: indent\n", "cannot be loaded"),
        (
            "task: nodata\ndataset_path: json\ndataset_kwargs: {data_files: {test: /no/such.jsonl}}\ntest_split: test\n"
            "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_choice: b\ndoc_to_target: c\n",
            "cannot be loaded",
        ),
    ],
)
def test_a_task_that_cannot_be_loaded_is_refused_before_any_work(tmp_path: Path, yaml: str, said: str) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(yaml)
    with pytest.raises(InputError, match=said):
        Tasks(TaskOptions((str(task),)))


def test_an_include_path_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="include_path .* is not a folder"):
        Tasks(TaskOptions(("mine",), tmp_path / "missing"))


def test_stdout_stays_the_commands_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval prints there that it bootstraps a perplexity, which would break --json."""
    (tmp_path / "data.jsonl").write_text('{"context": "In the", "word": " beginning"}\n' * 3)
    (tmp_path / "task.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{word}}'\n"
        "target_delimiter: ''\nmetric_list: [{metric: perplexity}, {metric: acc}]\n"
    )
    toy = toy_lm().toy
    tokenizer = Tokenizer.of_folder(DEMO, toy.manifest.config)
    found = Tasks(TaskOptions((str(tmp_path / "task.yaml"),))).run(toy, tokenizer, no_progress)
    assert found["words"]["perplexity"] > 1
    assert capsys.readouterr().out == ""
