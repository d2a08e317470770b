"""`gemma-run` heeds an option or refuses it: every pair of a command and an option, in both spellings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gemma_edge.runtimes.cli import main
from gemma_edge.runtimes.cli_options import CHAT, CHOICES, COMMANDS, PREFIX, RUN, SERVE, SWITCHES, heeded

# name -> the option as it is typed, with a value other than its default
TYPED = {
    "prompt": ["--prompt", "other"],
    "save": ["--save-prefix", "other"],
    "chat": ["--chat"],
    "serve": ["--serve"],
    "max_tokens": ["-n", "7"],
    "temperature": ["--temperature", "0.25"],
    "top_k": ["--top-k", "3"],
    "top_p": ["--top-p", "0.5"],
    "min_p": ["--min-p", "0.5"],
    "repetition_penalty": ["--repetition-penalty", "2"],
    "seed": ["--seed", "0"],
    "load_prefix": ["--load-prefix", "file"],
    "speculate": ["--speculate"],
    "json_schema": ["--json-schema", '{"type": "object"}'],
    "host": ["--host", "0.0.0.0"],
    "port": ["--port", "9"],
    "api_key": ["--api-key", "secret"],
    "no_auth": ["--no-auth"],
    "allow_host": ["--allow-host", "gemma"],
    "cors": ["--cors", "http://localhost:3000"],
    "time_limit": ["--time-limit", "5"],
    "log": ["--log"],
    "guard": ["--guard", "shield"],
    "resume": ["--resume"],
    "backend": ["--backend", "onnx"],
    "accelerator": ["--accelerator", "gpu"],
    "adapter": ["--adapter", "folder"],
    "threads": ["--threads", "3"],
    "strict": ["--strict"],
    "stats": ["--stats"],
    "as_json": ["--json"],
}
# how an option is named in a message
NAMES = {name: typed[0] for name, typed in TYPED.items()} | {"max_tokens": "--max-tokens"}
COMMAND_LINE = {
    RUN: ["run", "bundle"],
    CHAT: ["chat", "bundle"],
    SERVE: ["serve", "bundle"],
    PREFIX: ["prefix", "bundle", "--save", "file"],
}
OLD_SPELLING = {
    RUN: ["bundle"],
    CHAT: ["bundle", "--chat"],
    SERVE: ["bundle", "--serve"],
    PREFIX: ["bundle", "--save-prefix", "file"],
}
SPELLINGS = {"subcommand": COMMAND_LINE, "old": OLD_SPELLING}
SWITCH = {CHAT: "--chat", SERVE: "--serve", PREFIX: "--save-prefix"}
FILTERS = ("top_k", "top_p", "min_p")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command line calls, with every argument; nothing of it runs."""
    from gemma_edge.runtimes import guard
    from gemma_edge.runtimes.engines import load
    from gemma_edge.runtimes.generation import console, prefix, repl
    from gemma_edge.runtimes.serve import server

    recorded: list[Any] = []

    def record(name: str, result: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            recorded.append((name, args, sorted(kwargs.items())))
            return result

        return call

    monkeypatch.setattr(load, "open_runtime", record("open", "runtime"))
    monkeypatch.setattr(guard, "Guard", record("guard", "guard"))
    monkeypatch.setattr(prefix, "load", record("load", "prefix "))
    monkeypatch.setattr(prefix, "save", record("save"))
    monkeypatch.setattr(console, "complete", record("complete"))
    monkeypatch.setattr(repl, "chat", record("chat"))
    monkeypatch.setattr(server, "serve", record("serve"))
    return recorded


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), input="from stdin\n")


def refusal(result: Result) -> str:
    """The one line."""
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_table_of_this_test_is_complete() -> None:
    assert {str(choice.option(hidden=False).name) for choice in CHOICES} == set(TYPED)


PAIRS = [
    (spelling, command, name)
    for spelling in SPELLINGS
    for command in COMMANDS
    for name in TYPED
    if spelling == "subcommand" or SWITCH.get(command) != TYPED[name][0]  # it is there already
]


@pytest.mark.parametrize(("spelling", "command", "name"), PAIRS)
def test_an_option_is_heeded_or_refused(spelling: str, command: str, name: str, calls: list[Any]) -> None:
    """`--serve --prompt`, `--save-prefix --stats`, `--port` without `--serve` and more did nothing, without a word."""
    line, typed = SPELLINGS[spelling][command], TYPED[name]
    if name == "save" and command == PREFIX:
        typed = ["--save", "other"]
    if command in (RUN, CHAT) and name in FILTERS:
        line = [*line, "--temperature", "0.5"]  # they have no effect on greedy answers
    plain = run(*line)
    assert plain.exit_code == 0, plain.output
    without = list(calls)
    calls.clear()
    result = run(*line, *typed)
    # --serve, --chat and --save-prefix name a command, and a prefix may be that of a chat
    names_a_command = name in SWITCHES and (command == RUN or (spelling, command, name) == ("old", CHAT, "save"))
    if name in heeded(command) or names_a_command:
        assert result.exit_code == 0, result.output
        assert calls and calls != without, f"{typed} is ignored"
        return
    message = refusal(result)
    assert calls == [], "it is refused before anything is opened"
    other = f"gemma-run {command}" if spelling == "subcommand" else SWITCH.get(command)
    assert NAMES[name] in message
    without_what = "without --chat" if name == "resume" else "without --serve"
    assert (without_what if command == RUN else str(other)) in message


@pytest.mark.parametrize("command", COMMANDS)
def test_both_spellings_do_the_same(command: str, calls: list[Any]) -> None:
    options = ["--threads", "3", *(["--temperature", "0.5"] if command != PREFIX else [])]
    assert run(*COMMAND_LINE[command], *options).exit_code == 0
    new = list(calls)
    calls.clear()
    assert run(*OLD_SPELLING[command], *options).exit_code == 0
    assert calls == new and calls


@pytest.mark.parametrize(
    ("args", "both"),
    [
        ("b --serve --chat", ["--chat", "--serve"]),
        ("b --serve --save-prefix f", ["--save-prefix", "--serve"]),
        ("b --serve --stats", ["--stats", "--serve", "leave one of them out"]),
        ("b --port 80", ["--port", "--serve"]),
        ("b --chat --host h", ["--host", "--chat"]),
        ("b --save-prefix f --json", ["--json", "--save-prefix"]),
        ("b -p x --top-k 5", ["--top-k", "--temperature 0", "above 0"]),
        ("chat b --top-p 0.9 --seed 1", ["--top-p", "--temperature 0", "above 0"]),
    ],
)
def test_a_refusal_names_both_options(args: str, both: list[str], calls: list[Any]) -> None:
    message = refusal(run(*args.split()))
    assert all(part in message for part in both)
    assert calls == []


def test_a_default_that_is_typed_is_given_too(calls: list[Any]) -> None:
    assert "--port" in refusal(run("b", "-p", "x", "--port", "8080"))
    assert "--stats" in refusal(run("b", "--serve", "--stats"))
    assert run("b", "-p", "x", "--top-k", "0").exit_code == 0, "it says what is done"


def test_a_prefix_may_be_that_of_a_chat(calls: list[Any]) -> None:
    for args in ("b --save-prefix f --chat -p x", "prefix b -o f --chat -p x"):
        assert run(*args.split()).exit_code == 0
    assert calls[:2] == calls[2:] and ("chat", True) in calls[1][2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_only_what_the_command_heeds(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    listed = {word.strip(",") for line in result.stdout.splitlines() for word in line.split()[:2] if line[:3] == "  -"}
    for name, typed in TYPED.items():
        spellings = {"save": "--save", "max_tokens": "--max-tokens"}
        assert (spellings.get(name, typed[0]) in listed) == (name in heeded(command)), name
    assert isinstance(main, click.Group) and set(main.commands) == set(COMMANDS)


def test_a_prefix_needs_a_file(tmp_path: Path) -> None:
    result = run("prefix", str(tmp_path), "-p", "x")
    assert result.exit_code == 2 and "--save" in result.stderr
