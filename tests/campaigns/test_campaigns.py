"""What a campaign counts and when it fails, and a short run of each campaign with the seed of the day."""

from __future__ import annotations

import time

import pytest

from campaigns import inputs
from campaigns.campaign import Campaign, Hang, outcome_of, seed_of_today, time_limit


def test_a_campaign_sums_up_what_it_tried() -> None:
    campaign = Campaign("some", 3)
    assert campaign.exit_code == 1, "nothing was tried"
    for outcome in ("refused", "refused", "correct"):
        campaign.tried(outcome)
    assert campaign.summary() == "3 tried, 2 refused in one line, 1 correct, 0 traceback, 0 signal, 0 hang, 0 left over"
    assert campaign.exit_code == 0


@pytest.mark.parametrize("outcome", ["traceback", "signal", "hang", "left_over"])
def test_one_bad_outcome_fails_a_campaign_and_is_shown(outcome: str, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = Campaign("some", 3)
    campaign.tried("correct", "a good one")
    campaign.tried(outcome, "config.json is a folder")
    assert campaign.exit_code == 1
    printed = capsys.readouterr().out
    assert "seed 3" in printed and "try 2" in printed and "config.json is a folder" in printed
    assert "a good one" not in printed


def test_an_outcome_that_is_unknown_is_not_counted() -> None:
    with pytest.raises(ValueError, match="not an outcome"):
        Campaign("some", 3).tried("fine")


@pytest.mark.parametrize(
    ("code", "stderr", "outcome"),
    [
        (0, "warning: no tokenizer\n", "correct"),
        (2, "warning: no tokenizer\nerror: config.json is a folder\n", "refused"),
        (2, "", "traceback"),
        (2, "error: one\nerror: two\n", "traceback"),
        (2, "error: one\nand more of it\n", "traceback"),
        (1, "Traceback (most recent call last):\n", "traceback"),
        (3, "", "traceback"),
        (-11, "", "signal"),
    ],
)
def test_an_outcome_is_read_from_exit_code_and_stderr(code: int, stderr: str, outcome: str) -> None:
    assert outcome_of(code, stderr) == outcome


def test_a_try_that_hangs_is_ended() -> None:
    with pytest.raises(Hang), time_limit(0.05):
        time.sleep(60)


def test_damaged_inputs_end_in_a_bundle_or_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    seed = seed_of_today()
    campaign = Campaign("inputs", seed)
    inputs.run(campaign, 100)
    printed = capsys.readouterr().out
    assert campaign.exit_code == 0, f"seed {seed}: {campaign.summary()}\n{printed}"
    assert campaign.counts["refused"] > 20 and campaign.counts["correct"] > 1, "the damage is one-sided"
