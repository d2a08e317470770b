"""`gemma-run`: parses and calls. What options there are is cli_options.py's. Heavy imports are inside, for a quick --help."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_edge.command import DefaultGroup
from gemma_edge.errors import InputError
from gemma_edge.files import check_writable
from gemma_edge.runtimes.cli_options import CHAT, PREFIX, RUN, SERVE, RunCommand, parameters

if TYPE_CHECKING:
    from gemma_edge.runtimes.engines.base import Runtime
    from gemma_edge.runtimes.generation.console import Output
    from gemma_edge.runtimes.generation.generate import GenerationOptions
    from gemma_edge.runtimes.guard import Guard

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
FILTERS = ("top_k", "top_p", "min_p")  # without effect on greedy answers


@click.group(cls=DefaultGroup, default=RUN, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-edge")
def main() -> None:
    """Run a bundle made by gemma-export.

    `gemma-run BUNDLE --prompt TEXT` is short for `gemma-run run BUNDLE --prompt TEXT`; --chat, --serve and --save-prefix FILE
    there stand for the other commands. Each command lists its options: gemma-run chat --help.
    """


@main.command(RUN, cls=RunCommand, params=parameters(RUN))
def run(bundle: Path, prompt: str | None, load_prefix: Path | None, **choices: Any) -> None:
    """Continue a text with the BUNDLE (the default command).

    The text is continued as it stands, also by an instruction-tuned model; `gemma-run chat` uses the model's own chat format.
    Only the answer goes to stdout. A bundle without tokenizer takes and prints token ids: --prompt 2,15,7.
    """
    options, output = _generation(choices), _output(choices)
    text = _text(prompt)
    from gemma_edge.runtimes.generation.console import complete

    guard = _guard(choices)
    runtime, prefix = _open(bundle, load_prefix, choices)
    complete(runtime, prefix + text, options, output, guard)


@main.command(CHAT, cls=RunCommand, params=parameters(CHAT))
def chat(bundle: Path, prompt: str | None, load_prefix: Path | None, resume: str | None, **choices: Any) -> None:
    """Chat with the BUNDLE, or answer one turn.

    Only answers go to stdout. /undo takes the last turn back, /reset starts over and /quit leaves. /save NAME keeps the chat,
    /load NAME goes on with it, /list shows what is kept, and /delete NAME forgets it.
    """
    options, output = _generation(choices), _output(choices)
    if prompt == "-":
        prompt = _text(prompt)
    from gemma_edge.runtimes.generation import repl

    guard = _guard(choices)
    runtime, prefix = _open(bundle, load_prefix, choices)
    repl.chat(runtime, prompt, options, output, prefix=prefix, guard=guard, resume=resume)


@main.command(SERVE, cls=RunCommand, params=parameters(SERVE))
def serve(bundle: Path, api_key: str | None, **choices: Any) -> None:
    """Serve the BUNDLE over HTTP to clients of OpenAI's API.

    The server also has a chat page. --max-tokens and the sampling options apply to requests that do not set them. Ctrl-C ends the
    server.
    """
    options = _generation(choices, greedy_filters=True)
    from gemma_edge.runtimes.serve import server

    if api_key is None and not choices["no_auth"]:
        api_key = os.environ.get(server.KEY_VARIABLE) or None
    opening = {name: choices.pop(name) for name in ("backend", "threads", "accelerator")}
    server.serve(bundle, options, server.ServerOptions(api_key=api_key, **choices), **opening)


@main.command(PREFIX, cls=RunCommand, params=parameters(PREFIX))
def prefix(bundle: Path, prompt: str | None, save: Path, chat: bool, **choices: Any) -> None:
    """Save the BUNDLE's state after a text.

    Prompts that begin with the text need not compute it again: give the file to --load-prefix of run, chat or prefix.
    """
    check_writable("`save`", save)
    text = _text(prompt)
    from gemma_edge.runtimes.generation import prefix as prefixes

    runtime, before = _open(bundle, choices.pop("load_prefix"), choices)
    prefixes.save(runtime, before + text, save, chat=chat)


def _generation(choices: dict[str, Any], *, greedy_filters: bool = False) -> GenerationOptions:
    """Takes its part out of the choices; checked before the bundle is touched."""
    from gemma_edge.runtimes.generation.generate import GenerationOptions
    from gemma_edge.runtimes.generation.sampling import SamplingParams

    sampling, default = SamplingParams(**{name: choices.pop(name) for name in SAMPLING}), SamplingParams()
    for name in FILTERS if sampling.temperature == 0 and not greedy_filters else ():
        if getattr(sampling, name) != getattr(default, name):
            raise InputError(
                f"`{name}` has no effect with `temperature` 0, which takes the most likely token", field=name,
                hint="give a `temperature` above 0",
            )  # fmt: skip
    rest: dict[str, Any] = {
        name: choices.pop(name) for name in ("max_tokens", "strict", "speculate") if name in choices
    }
    if (schema := choices.pop("json_schema", None)) is not None:
        from gemma_edge.runtimes.generation.constrain import read_schema

        rest["json_schema"] = read_schema(schema)
    return GenerationOptions(sampling=sampling, **rest)


def _output(choices: dict[str, Any]) -> Output:
    from gemma_edge.runtimes.generation.console import Output

    return Output(stats=choices.pop("stats"), as_json=choices.pop("as_json"))


def _guard(choices: dict[str, Any]) -> Guard | None:
    bundle = choices.pop("guard")
    if bundle is None:
        return None
    from gemma_edge.runtimes import guard

    return guard.Guard(bundle, threads=choices["threads"])


def _open(bundle: Path, load_prefix: Path | None, choices: dict[str, Any]) -> tuple[Runtime, str]:
    """The runtime, and the text of the prefix that it has been fed."""
    from gemma_edge.runtimes.engines import load
    from gemma_edge.runtimes.generation import prefix as prefixes

    adapters = choices.pop("adapter")
    if len(adapters) > 1:
        raise InputError(
            field="adapter", value=" ".join(map(str, adapters)), hint="one answer takes one adapter: pass only one"
        )
    runtime = load.open_runtime(bundle, **choices, adapter=next(iter(adapters), None))
    return runtime, prefixes.load(runtime, load_prefix) if load_prefix else ""


def _text(prompt: str | None) -> str:
    """The prompt, or all of stdin without its last line end."""
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        raise InputError(
            "there is no text: pass `prompt` TEXT, pipe a text in, or start a conversation with gemma-run chat",
            field="prompt",
        )
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 at byte {error.start}; give UTF-8 text") from None
    return text.removesuffix("\n").removesuffix("\r")
