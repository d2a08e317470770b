"""Damaged saved states and conversations: refused in one line, and the runtime then goes on as before; never another answer.

Half of them are *resealed*: the hash inside fits the damage, as somebody would make it who means harm.

    PYTHONPATH=tests .venv/bin/python -m campaigns.states --tries 2000 --seed 7
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from support.toys import write_toy_bundle

from campaigns.campaign import Campaign, main, time_limit
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines import state
from gemma_edge.runtimes.generation import prefix
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session

SECONDS = 30.0
DEEP = "[" * 100_000
ODD: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    5,
    1 << 31,
    10**30,
    0.5,
    True,
    "",
    "x" * 5000,
    "a\0b",
    [],
    [[]],
    {},
    "\ud800",
    DEEP,
)
OPTIONS = GenerationOptions(max_tokens=3)


def bytes_changed(campaign: Campaign, data: bytes) -> bytes:
    """Flipped, cut, padded, or a part over another one."""
    choose, changed = campaign.random, bytearray(data)
    for _ in range(choose.choice((1, 1, 8))):
        changed[choose.choice((choose.randrange(len(data)), choose.randrange(min(len(data), 600))))] ^= (
            choose.randrange(1, 256)
        )
    end = choose.randrange(len(data))
    return choose.choice((bytes(changed), bytes(changed), data[:end], data + bytes(end + 1), data[end:] + data[:end]))


def text_changed(campaign: Campaign, text: str) -> str:
    """One value of a JSON text is another."""
    at = value = json.loads(text)
    while True:
        key = campaign.random.choice(list(at)) if isinstance(at, dict) else campaign.random.randrange(len(at))
        if not (isinstance(at[key], dict | list) and at[key] and campaign.random.random() < 0.9):
            break
        at = at[key]
    at[key] = campaign.random.choice(ODD)
    return json.dumps(value)


def tensor_changed(campaign: Campaign, rows: NDArray[Any]) -> NDArray[Any]:
    """Another shape, another type, or extreme numbers."""
    odd = campaign.random.choice((-1, 100, 0) if rows.dtype.kind == "i" else (np.nan, np.inf, -1e38, 0))
    changed = (rows[..., :1], rows.astype(np.float64), rows[None], np.full_like(rows, odd), rows[:0])
    return np.ascontiguousarray(campaign.random.choice(changed))


def resealed(campaign: Campaign, source: Path, path: Path) -> None:
    """Change the parts of a state, and make its hash fit."""
    from safetensors import safe_open

    with safe_open(source, framework="np") as file:
        header = {key: value for key, value in file.metadata().items() if key != state.DIGEST}
    tensors = load_file(source)
    part = campaign.random.choice(["state", "notes", "notes", "format", *tensors])
    if part == "format":
        header[part] = campaign.random.choice(("gemma-edge state 0", "gemma-edge state 1", ""))
    elif part in header:
        header[part] = text_changed(campaign, header[part])
    else:
        tensors[part] = tensor_changed(campaign, tensors[part])
    save_file(tensors, path, {**header, state.DIGEST: state._digest(header, tensors)})


def say(session: Session) -> str:
    """The answer to a question that is always the same."""
    return "".join(session.send("And you?", OPTIONS))


def one_try(session: Session, path: Path, *, is_session: bool) -> tuple[str, str]:
    """Restore a file and go on from it: the outcome, and the message or the answer."""
    try:
        with time_limit(SECONDS):
            if is_session:
                session.restore(path)
                return "correct", say(session)
            text = prefix.load(session.runtime, path)
            session.runtime.prefill([5, 7, 100])
            return "correct", text
    except InputError as error:
        return ("refused" if "\n" not in str(error) and len(str(error)) < 600 else "traceback"), str(error)
    except Exception as error:  # noqa: BLE001, it is counted
        return "traceback", f"{type(error).__name__}: {error}"


def run(campaign: Campaign, tries: int) -> None:
    """Damage a session and a prefix again and again."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        session = Session.open(write_toy_bundle(folder / "bundle"), OPTIONS, threads=1)
        prefix.save(session.runtime, "It was the best of times", folder / "prefix", chat=True)
        session.reset()
        say(session)
        session.save(folder / "session")
        answers = {
            kind: one_try(session, folder / kind, is_session=kind == "session") for kind in ("prefix", "session")
        }
        assert all(outcome == "correct" for outcome, _ in answers.values()), answers
        for index in range(tries):
            kind, path = ("prefix", "session")[index % 2], folder / "damaged"
            hostile = campaign.random.random() < 0.5
            if hostile:
                resealed(campaign, folder / kind, path)
            else:
                path.write_bytes(bytes_changed(campaign, (folder / kind).read_bytes()))
            outcome, what = one_try(session, path, is_session=kind == "session")
            if outcome == "correct" and not hostile and what != answers[kind][1]:
                outcome = "traceback"
            campaign.tried(outcome, f"{kind}{' resealed' * hostile}: {what[:300]}")
            again = one_try(session, folder / "session", is_session=True)
            if again != answers["session"]:
                campaign.tried("left_over", f"{kind}{' resealed' * hostile}: then {again}")


if __name__ == "__main__":
    main("states", run)
