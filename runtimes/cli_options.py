"""The options of `gemma-run`: one table says which command heeds which option. Any other combination is refused.

Every command knows all options, so that a refusal can be one line that names both sides; `--help` shows only those it heeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gemma_edge.bundle.accelerators import ACCELERATORS
from gemma_edge.command import Command, given, one_line_errors
from gemma_edge.errors import InputError

RUN, CHAT, SERVE, PREFIX = COMMANDS = ("run", "chat", "serve", "prefix")
ANSWERING = (RUN, CHAT)
GENERATING = (RUN, CHAT, SERVE)
FEEDING = (RUN, CHAT, PREFIX)

# An option of `gemma-run BUNDLE` -> the command that it stands for. The first one that is given decides.
SWITCHES = {"serve": SERVE, "save": PREFIX, "chat": CHAT}


@dataclass(frozen=True)
class Choice:
    """One option, as one or more commands show it."""

    commands: tuple[str, ...]  # the commands that heed it
    names: tuple[str, ...]  # its spellings
    settings: Mapping[str, Any]  # click's

    def option(self, *, hidden: bool) -> click.Option:
        """The option for click."""
        settings = {**self.settings, "required": self.settings.get("required", False) and not hidden}
        return click.Option(list(self.names), hidden=hidden, **settings)


def _choice(commands: tuple[str, ...], *names: str, **settings: Any) -> Choice:
    return Choice(commands, names, settings)


FILE = click.Path(path_type=Path)
# A command takes the row that names it, else it knows the option by the first row.
CHOICES = (
    _choice((RUN,), "-p", "--prompt", help="Text to continue; '-' reads stdin. Default: stdin, if it is piped."),
    _choice((CHAT,), "-p", "--prompt", help="The only turn; '-' reads stdin. Default: every line of stdin is a turn."),
    _choice((PREFIX,), "-p", "--prompt", help="Text to save; '-' reads stdin. Default: stdin, if it is piped."),
    _choice((), "--save-prefix", "save", type=FILE, metavar="FILE"),
    _choice((PREFIX,), "-o", "--save", "save", type=FILE, metavar="FILE", required=True, help="The file to write."),
    _choice((PREFIX,), "--chat", is_flag=True, help="The text will begin the first turn of a chat."),
    _choice(
        GENERATING,
        "-n",
        "--max-tokens",
        type=int,
        default=512,
        show_default=True,
        help="The longest answer, in tokens.",
    ),
    _choice(
        GENERATING,
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="Randomness of the answer; 0 always takes the most likely token.",
    ),
    _choice(
        GENERATING,
        "--top-k",
        type=int,
        default=0,
        show_default=True,
        help="Choose among the K most likely tokens; 0 keeps all.",
    ),
    _choice(
        GENERATING,
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        help="Choose among the most likely tokens whose probabilities sum to P; 1 keeps all.",
    ),
    _choice(
        GENERATING,
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="Choose among tokens at least P times as likely as the most likely one; 0 keeps all.",
    ),
    _choice(
        GENERATING,
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Values above 1 avoid tokens that the text already has.",
    ),
    _choice(GENERATING, "--seed", type=int, help="Seed of the random numbers; the same seed repeats an answer."),
    _choice(
        FEEDING,
        "--load-prefix",
        type=FILE,
        metavar="FILE",
        help="Continue after the text that `gemma-run prefix` saved in FILE, without computing it again.",
    ),
    _choice(
        GENERATING,
        "--speculate",
        type=click.Choice(("exact", "close")),
        is_flag=False,
        flag_value="exact",
        help="Guess tokens from earlier text and check several in one call. 'exact' does so only if the answer stays the same,"
        " 'close' always.",
    ),
    _choice(
        ANSWERING,
        "--json-schema",
        metavar="SCHEMA",
        help="Make each answer JSON that fits this schema: a file, or the schema itself.",
    ),
    _choice(
        (CHAT,),
        "--resume",
        metavar="[NAME]",
        is_flag=False,
        flag_value="",
        help="Go on with the chat that /save NAME kept; without NAME with the one that was saved last.",
    ),
    _choice((), "--serve", is_flag=True),
    _choice(
        (SERVE,),
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Address to listen on; 0.0.0.0 opens the server to the network, which needs a key.",
    ),
    _choice(
        (SERVE,), "--port", type=int, default=8080, show_default=True, help="Port to listen on; 0 takes a free one."
    ),
    _choice(
        (SERVE,),
        "--api-key",
        metavar="KEY",
        help="Key that requests must send. Other users of this machine can see this option; $GEMMA_EDGE_API_KEY is safer.",
    ),
    _choice(
        (SERVE,),
        "--no-auth",
        is_flag=True,
        help="Need no key where --host opens the server to the network: everybody there may use it.",
    ),
    _choice(
        (SERVE,),
        "--allow-host",
        multiple=True,
        metavar="NAME",
        help="Another name of this machine that requests may use; can be repeated. A server with a key allows all names.",
    ),
    _choice(
        (SERVE,),
        "--cors",
        multiple=True,
        metavar="ORIGIN",
        help="Origin whose pages may send requests, such as http://localhost:3000; can be repeated. Default: the chat page.",
    ),
    _choice(
        (SERVE,),
        "--time-limit",
        type=float,
        default=600.0,
        show_default=True,
        metavar="SECONDS",
        help="The longest time that one answer may take.",
    ),
    _choice((SERVE,), "--log", is_flag=True, help="Print one line to stderr for each request."),
    _choice(
        GENERATING,
        "--guard",
        type=FILE,
        metavar="BUNDLE",
        help="A bundle of ShieldGemma that judges prompts and answers; answers come when they are complete. Default: none.",
    ),
    _choice(
        COMMANDS,
        "--backend",
        help="Backend to use if the bundle has several, such as onnx or tflite. Default: the first one that is installed.",
    ),
    _choice(
        COMMANDS,
        "--accelerator",
        help=f"What computes: {', '.join(ACCELERATORS)}. Default: what the backend was made for; cpu runs every bundle.",
    ),
    _choice(
        COMMANDS,
        "--adapter",
        type=FILE,
        multiple=True,
        help="Adapter to use with the bundle: a folder that gemma-export adapter made for it. With serve it can be repeated,"
        " and requests name it as the model BUNDLE:ADAPTER.",
    ),
    _choice(
        COMMANDS,
        "--threads",
        type=int,
        help="Number of threads, at most the number of cores. Default: the number that the bundle's target sets.",
    ),
    _choice(
        GENERATING,
        "--strict",
        is_flag=True,
        help="Refuse a text that is longer than the context. Default: its oldest tokens are forgotten.",
    ),
    _choice(ANSWERING, "--stats", is_flag=True, help="Print speed and memory to stderr after each answer."),
    _choice(
        ANSWERING,
        "--json",
        "as_json",
        is_flag=True,
        help="Print each answer as one JSON object with text, ids and stats when it is complete.",
    ),
)

# What to do instead, where there is something
HINTS = {
    (SERVE, "json_schema"): "requests bring their schema in response_format",
}


def parameters(command: str) -> list[click.Parameter]:
    """The argument and all options for click; only those that the command heeds are shown."""
    options: dict[str, click.Option] = {}
    for choice in CHOICES:
        option = choice.option(hidden=command not in choice.commands)
        assert option.name is not None
        if option.name not in options or not option.hidden:
            options[option.name] = option
    return [click.Argument(["bundle"], type=click.Path(path_type=Path)), *options.values()]


def heeded(command: str) -> frozenset[str]:
    """Names of the options that the command heeds."""
    options = (choice.option(hidden=False) for choice in CHOICES if command in choice.commands)
    return frozenset(str(option.name) for option in options)


class RunCommand(Command):
    """One of COMMANDS. It refuses options that it does not heed, and `run` hands over to the command that a switch names."""

    def invoke(self, ctx: click.Context) -> Any:
        """Check what was given, then run the command."""
        with one_line_errors():
            options = [name for name in given(ctx) if name != "bundle"]
            switches = [name for name in SWITCHES if name in options] if self.name == RUN else []
            command = SWITCHES[switches[0]] if switches else str(self.name)
            for name in options:
                if name not in switches[:1] and name not in heeded(command):
                    raise _refusal(command, name, switches[0] if switches else None)
            values = {name: ctx.params[name] for name in ("bundle", *heeded(command))}
            if command != self.name:
                assert ctx.parent is not None and isinstance(ctx.parent.command, click.Group)
                callback = ctx.parent.command.commands[command].callback
                assert callback is not None
                return ctx.invoke(callback, **values)
            ctx.params = values
            return super().invoke(ctx)


def _refusal(command: str, name: str, switch: str | None) -> InputError:
    if command == RUN:
        others = [f"`{switch}`" for switch, other in SWITCHES.items() if name in heeded(other)]
        return InputError(f"`{name}` has no effect without {' or '.join(others)}", field=name)
    with_what = f"`{switch}`" if switch else f"gemma-run {command}"
    hint = HINTS.get((command, name), "leave one of them out" if switch else "leave it out")
    return InputError(f"`{name}` has no effect with {with_what}", field=name, hint=hint)
