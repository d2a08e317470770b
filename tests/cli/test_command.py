"""How every command fails, where a command of its own shows it best."""

from __future__ import annotations

import logging
import os
import signal
import time

import click
import pytest
from click.testing import CliRunner

from gemma_edge.command import Command, Group, spelled
from gemma_edge.errors import InputError

NOTE = "use `speculate`=close"


def interrupted_in_an_extension() -> None:
    """What safetensors does: the KeyboardInterrupt is gone, and an error of the extension's stands in its place."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None


@click.group(cls=Group)
def main() -> None:
    pass


@main.command(cls=Command)
def swallowed() -> None:
    interrupted_in_an_extension()


@main.command(cls=Command)
@click.option("--speculate")
def warns(speculate: str | None) -> None:
    logging.getLogger("gemma_edge.anything").warning(NOTE)


@main.command(cls=Command)
def bug() -> None:
    raise ValueError("a bug keeps its traceback")


@main.command(cls=Command)
@click.option("-b", "--bits", type=int)
@click.argument("bundle")
def refuses(bits: int, bundle: str) -> None:
    raise InputError(field="bits", value=bits, allowed=(4, 8), hint="`bundle` and `plan --json` and `other` stay")


def test_the_command_line_spells_parameters_its_own_way() -> None:
    result = CliRunner().invoke(main, ["refuses", "--bits", "5", "x"])
    assert result.exit_code == 2
    assert result.stderr == "error: --bits 5; supported: 4, 8; BUNDLE and `plan --json` and other stay\n"


def test_a_note_is_spelled_as_the_command_that_runs_spells_it() -> None:
    command = click.Command(
        "run", params=[click.Option(["--speculate"])], callback=lambda **_: click.echo(spelled(NOTE))
    )
    assert CliRunner().invoke(command).stdout == "use --speculate=close\n"
    assert spelled(NOTE) == "use speculate=close"


@pytest.mark.parametrize("again", [False, True])
def test_a_warning_is_one_line_on_stderr_in_every_command(again: bool) -> None:
    for _ in range(1 + again):  # the second call in one process does not print it twice
        result = CliRunner().invoke(main, ["warns"])
    assert (result.stdout, result.stderr) == ("", "warning: use --speculate=close\n")
    assert CliRunner().invoke(main.commands["warns"], []).stderr == result.stderr


def test_the_library_names_parameters_as_python_does() -> None:
    error = InputError(field="bits", value=5, allowed=(4, 8), hint="use `kv_bits` 32")
    assert str(error) == "bits 5; supported: 4, 8; use kv_bits 32"
    assert (error.field, error.value, error.allowed, error.hint) == ("bits", 5, (4, 8), "use `kv_bits` 32")


def test_ctrl_c_that_became_another_error_is_still_ctrl_c() -> None:
    """About once in a hundred interrupted exports it was a traceback and exit 1."""
    # a shell's background job, as a CI may run us, passes on an ignored Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(main, ["swallowed"])
        assert result.exit_code == 130 and result.stderr.strip() == "interrupted"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_without_ctrl_c_stays_what_it_is() -> None:
    result = CliRunner().invoke(main, ["bug"])
    assert isinstance(result.exception, ValueError) and result.exit_code == 1


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert CliRunner().invoke(main, ["bug"]).exit_code == 1
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
