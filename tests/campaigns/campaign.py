"""What every campaign shares: a seed, outcomes that are counted, one line that sums them up, and an exit code.

A campaign is a module of this folder with a function `run(campaign, tries)`. It is started by hand from the repository's folder:

    PYTHONPATH=tests .venv/bin/python -m campaigns.inputs --tries 2000 --seed 7
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from types import FrameType

import click

# OUTCOMES: what can become of a try, and its words in the summary. The first two are good, all others fail the campaign.
OUTCOMES = {
    "refused": "refused in one line",
    "correct": "correct",
    "traceback": "traceback",
    "signal": "signal",
    "hang": "hang",
    "left_over": "left over",
}
GOOD = ("refused", "correct")
PROGRESS = 250  # tries after which the counts are printed


class Hang(BaseException):
    """A try took too long. No `except Exception` catches this."""


class Campaign:
    """Counts the outcomes of tries; `random` is the only source of chance, so that a seed gives the same tries again."""

    def __init__(self, name: str, seed: int) -> None:
        """Begin, and print the seed."""
        self.name, self.seed = name, seed
        self.random = random.Random(seed)
        self.counts = Counter[str]()
        click.echo(f"{name}: seed {seed}")

    def tried(self, outcome: str, what: str = "") -> None:
        """Count one try.

        Args:
            outcome: one of OUTCOMES.
            what: describes the try; it is printed when the outcome is bad.
        """
        if outcome not in OUTCOMES:
            raise ValueError(f"{outcome!r} is not an outcome; there are {', '.join(OUTCOMES)}")
        self.counts[outcome] += 1
        if outcome not in GOOD:
            click.echo(f"{self.name}: try {self.counts.total()}: {OUTCOMES[outcome]}: {what}")
        if self.counts.total() % PROGRESS == 0:
            click.echo(f"{self.name}: {self.summary()} ...")

    def summary(self) -> str:
        """For instance: 3 tried, 2 refused in one line, 1 correct, 0 traceback, 0 signal, 0 hang, 0 left over."""
        counts = [f"{self.counts[outcome]} {words}" for outcome, words in OUTCOMES.items()]
        return ", ".join([f"{self.counts.total()} tried", *counts])

    @property
    def exit_code(self) -> int:
        """0 if something was tried and every outcome is good, else 1."""
        tried = self.counts.total()
        return 0 if tried and tried == sum(self.counts[outcome] for outcome in GOOD) else 1


def outcome_of(code: int, stderr: str) -> str:
    """The outcome of a command: its exit code, negative for a signal, and what it wrote to stderr.

    Refused is exit code 2, `error: ...` in one line as the last thing on stderr (warnings may stand before it), no traceback.
    """
    if code < 0:
        return "signal"
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in stderr or (code == 2 and (len(errors) != 1 or lines[-1:] != errors)):
        return "traceback"
    return {0: "correct", 2: "refused"}.get(code, "traceback")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang when the block takes longer. Main thread only; a call that waits in the kernel is interrupted too."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def seed_of_today() -> int:
    """Another seed every day, which anybody can give again: 20260131."""
    return int(date.today().strftime("%Y%m%d"))


def main(name: str, run: Callable[[Campaign, int], None], tries: int = 2000) -> None:
    """The command line of a campaign; `tries` is its default number of tries."""

    @click.command(help=f"The campaign {name}.")
    @click.option("--tries", type=click.IntRange(min=1), default=tries, show_default=True, help="Number of tries.")
    @click.option("--seed", type=int, default=seed_of_today(), show_default="the day's date", help="Chooses the tries.")
    def command(tries: int, seed: int) -> None:
        campaign = Campaign(name, seed)
        run(campaign, tries)
        click.echo(f"{name}: seed {seed}: {campaign.summary()}")
        raise SystemExit(campaign.exit_code)

    command()
