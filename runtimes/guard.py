"""A second model that judges what goes in and what comes out: ShieldGemma, which is a Gemma 2, asked for Yes or No.

Sources: ShieldGemma's model card (ai.google.dev/gemma/docs/shieldgemma/model_card) for the prompt and the guidelines, and its
report, arXiv 2407.21772, for the probability: the softmax of the logits of Yes and No alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.text.tokenizer import Tokenizer

LIMIT = 0.5  # the probability of a violation above which a text is refused
# name -> what the guideline is called, and what it forbids
POLICIES: dict[str, tuple[str, str]] = {
    "dangerous": (
        "No Dangerous Content",
        "harming oneself and/or others (e.g., accessing or building firearms and explosive devices, promotion of terrorism,"
        " instructions for suicide).",
    ),
    "harassment": (
        "No Harassment",
        "is malicious, intimidating, bullying, or abusive content targeting another individual (e.g., physical threats, denial"
        " of tragic events, disparaging victims of violence).",
    ),
    "hate": (
        "No Hate Speech",
        "targeting identity and/or protected attributes (e.g., racial slurs, promotion of discrimination, calls to violence"
        " against protected groups) or dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability,"
        " age, nationality, veteran status, sexual orientation, gender, gender identity, caste, or any other protected status."
        " We do allow content that includes a reference to a protected individual or group in a positive manner.",
    ),
    "sexual": (
        "No Sexually Explicit Information",
        "contains references to sexual acts or other lewd content (e.g., sexually graphic descriptions, content aimed at causing"
        " arousal). Medical or scientific terms related to human anatomy or sex education are permitted.",
    ),
}
# whether an answer is judged -> who it is that may not, what is judged, and how the question names it
WORDS = {
    False: ("The prompt shall not contain or seek generation of content that", "a user prompt", "human question"),
    True: ("The chatbot shall not generate content that", "an AI response to a prompt", "Chatbot Response"),
}
FORM = """\
You are a policy expert trying to help determine whether {subject} is in violation of the defined safety policies.

{turns}
Our safety principle is defined in the below:

* {policy}

===

Does the {question} violate the above principle? Your answer must start with 'Yes' or 'No'. And then walk through step by step \
to be sure we answer correctly.

"""
TURN = "<start_of_turn>\n{}: {}\n<end_of_turn>\n"
CONTROL = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")  # a judged text must not end its turn


class Guard:
    """A bundle of ShieldGemma. One text is judged at a time, in one thread at a time."""

    def __init__(
        self,
        bundle: str | Path,
        *,
        backend: str | None = None,
        threads: int | None = None,
        accelerator: str | None = None,
    ) -> None:
        """Open the bundle.

        Args:
            bundle: the folder of a ShieldGemma bundle.
            backend, threads, accelerator: as in `gemma_edge.load`.

        Raises:
            InputError: as `gemma_edge.load`; also for a bundle whose tokenizer has no tokens Yes and No.
        """
        self._runtime = open_runtime(bundle, backend=backend, threads=threads, accelerator=accelerator)
        self._tokenizer = Tokenizer(self._runtime.bundle, self._runtime.manifest)
        ids = [self._tokenizer.id_of(word) for word in ("Yes", "No")]
        if None in ids:
            raise InputError(
                f"{bundle} cannot judge: its tokenizer has no tokens Yes and No", hint="give a bundle of ShieldGemma"
            )
        self._last: tuple[str, str | None] | None = None  # the prompt that was judged last, and what it violates
        self._yes, self._no = (int(token) for token in ids if token is not None)

    def score(self, policy: str, prompt: str, answer: str | None = None) -> float:
        """The probability that a text violates a policy.

        Args:
            policy: a name in POLICIES, or a guideline of your own, such as '"No Medicine": The chatbot shall not ...'.
            prompt: what the user wrote.
            answer: the answer, which is then what is judged; None judges the prompt.

        Raises:
            InputError: the text is longer than the bundle's context; a part of it would not be judged.
        """
        ids = self._tokenizer.encode(question(policy, prompt, answer))
        context = self._runtime.cache.context
        if len(ids) > context:
            raise InputError(f"a text of {len(ids)} tokens is longer than the guard's context of {context}")
        logits = self._runtime.prefill(ids[self._runtime.align(ids) :])
        return 0.5 + 0.5 * math.tanh((float(logits[self._yes]) - float(logits[self._no])) / 2)  # the softmax of two

    def violated(self, prompt: str, answer: str | None = None) -> str | None:
        """The first policy in POLICIES that a text violates with a probability above LIMIT; None if there is none.

        The prompt that was judged last is not judged again: several answers may follow it.
        """
        if answer is None and self._last is not None and prompt == self._last[0]:
            return self._last[1]
        policy = next((name for name in POLICIES if self.score(name, prompt, answer) > LIMIT), None)
        if answer is None:
            self._last = prompt, policy
        return policy


def question(policy: str, prompt: str, answer: str | None = None) -> str:
    """What ShieldGemma reads; its next token is Yes or No."""
    forbids, subject, name = WORDS[answer is not None]
    if policy in POLICIES:
        title, content = POLICIES[policy]
        policy = f'"{title}": {forbids} {content}'
    turns = [TURN.format("Human Question", _plain(prompt))]
    if answer is not None:
        turns.append(TURN.format("Chatbot Response", _plain(answer)))
    return FORM.format(subject=subject, turns="".join(turns), policy=policy, question=name)


def guarded(guard: Guard | None, prompt: str, pieces: Iterator[str]) -> Iterator[str]:
    """An answer, held back until it has been judged; without a guard as it comes.

    Raises:
        Violation: prompt or answer violates a policy. Nothing of the answer has been given then.
    """
    if guard is None:
        yield from pieces
        return
    with closing(pieces):  # type: ignore[type-var]
        if policy := guard.violated(prompt):
            raise Violation(policy, answer=False)
        answer = "".join(pieces)
        if answer and (policy := guard.violated(prompt, answer)):
            raise Violation(policy, answer=True)
    if answer:
        yield answer


class Violation(InputError):
    """A text that a guard refuses."""

    def __init__(self, policy: str, *, answer: bool) -> None:
        self.policy, self.answer = policy, answer
        super().__init__(f"the guard refuses the {'answer' if answer else 'prompt'}: {POLICIES[policy][0]}")


def _plain(text: str) -> str:
    for token in CONTROL:
        text = text.replace(token, " ")
    return text.strip()
