"""The public-domain texts that come with gemma-edge: their names by purpose, and how to read one. Sources: data/LICENSE.md."""

from __future__ import annotations

from importlib import resources

# HELD_OUT: texts that models are judged on, by the gate and by gemma-eval.
HELD_OUT = ("heldout_austen.txt", "heldout_kjv.txt")
# CALIBRATION: texts that quantization is calibrated on. They share no passage with HELD_OUT.
CALIBRATION = (
    "calibration_austen.txt",
    "calibration_kjv.txt",
    "calibration_melville.txt",
    "calibration_presidents.txt",
)
# CHARACTERS_PER_TOKEN: how many characters of a long text are read for each token that is needed. English has about 4 per token
# of Gemma's tokenizer, so the cut is far behind the last token that is used and cannot change it.
CHARACTERS_PER_TOKEN = 32


def read(name: str) -> str:
    """Return the whole text.

    Args:
        name: one of HELD_OUT or CALIBRATION.

    Raises:
        FileNotFoundError: there is no text of this name.
    """
    return (resources.files("gemma_edge.text") / "data" / name).read_text(encoding="utf-8")
