"""Writes two tasks for `gemma-eval --tasks` that need no network, made of the evaluation text that corpora.py writes into WORK.

`continuation` is in the manner of HellaSwag: which of four passages of equally many words goes on? The wrong ones are from other
places of the same text. `last_word` is in the manner of LAMBADA: what is the last word of a passage that has used it before?
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))
from corpora import EVALUATION

CONTEXT, ENDING, CHOICES = 40, 12, 4  # words before, words of a passage, passages
WORD = re.compile(r"[a-z]{4,}", re.IGNORECASE)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
target_delimiter: ""
metric_list: [{metrics}]
"""
CONTINUATION = {
    "kind": "multiple_choice",
    "target": 'label\ndoc_to_choice: "{{choices}}"',
    "metrics": "{metric: acc}",
}
LAST_WORD = {"kind": "loglikelihood", "target": '"{{word}}"', "metrics": "{metric: perplexity}, {metric: acc}"}


def passages(text: str) -> list[str]:
    """The text in pieces of whole sentences, just long enough for both tasks."""
    found, piece = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        piece = f"{piece} {sentence}".strip()
        if len(piece.split()) >= CONTEXT + ENDING:
            found.append(piece)
            piece = ""
    return found


def continuations(texts: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Examples of `continuation`."""
    generator = random.Random(seed)
    cut = [text.split() for text in texts]
    endings = [" " + " ".join(words[CONTEXT : CONTEXT + ENDING]) for words in cut]
    for index, words in enumerate(cut):
        others = generator.sample(endings[:index] + endings[index + 1 :], CHOICES - 1)
        label = generator.randrange(CHOICES)
        choices = [*others[:label], endings[index], *others[label:]]
        yield {"context": " ".join(words[:CONTEXT]), "choices": choices, "label": label}


def last_words(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Examples of `last_word`."""
    for text in texts:
        context, _, last = text.rstrip('."!?').rpartition(" ")
        if WORD.fullmatch(last) and re.search(rf"\b{last}\b", context):
            yield {"context": context, "word": f" {last}"}


def write(folder: Path, name: str, examples: Iterable[dict[str, Any]], count: int, task: dict[str, str]) -> int:
    """Write an evenly chosen part of the examples and the task's description; return how many there are."""
    found = list(examples)
    chosen = found[:: max(1, len(found) // count)][:count]
    data = folder.absolute() / f"{name}.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in chosen), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, **task), encoding="utf-8")
    return len(chosen)


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--count", default=300, show_default=True, help="Number of examples of each task, at most.")
@click.option("--seed", default=0, show_default=True, help="Of the wrong passages.")
def main(work: Path, count: int, seed: int) -> None:
    """Write WORK/tasks."""
    texts = passages((work / "text" / EVALUATION).read_text(encoding="utf-8"))
    folder = work / "tasks"
    folder.mkdir(exist_ok=True)
    made = {
        "continuation": write(folder, "continuation", continuations(texts, seed), count, CONTINUATION),
        "last_word": write(folder, "last_word", last_words(texts), count, LAST_WORD),
    }
    for name, examples in made.items():
        click.echo(f"{folder / name}.yaml: {examples} examples")


if __name__ == "__main__":
    main()
