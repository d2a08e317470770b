"""`gemma-run` on a toy bundle: what goes to stdout, what to stderr, and the exit codes. Its text is nonsense, but repeatable."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from support.toys import write_toy_bundle

import gemma_edge
from gemma_edge.command import Command, Group
from gemma_edge.errors import InputError
from gemma_edge.runtimes.cli import main
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("run") / "bundle")


@pytest.fixture(scope="module")
def token_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("run") / "tokens", tokenizer=False)


def run(bundle: Path, *options: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(bundle), "--threads", "1", *options], input=stdin)


def run_ok(bundle: Path, *options: str, stdin: str | None = None) -> Result:
    result = run(bundle, *options, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def error_of(result: Result) -> str:
    """The one line of a refusal."""
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def greedy(bundle: Path, text: str, count: int) -> str:
    runtime = gemma_edge.load(bundle, threads=1)
    tokenizer = Tokenizer(bundle, runtime.manifest)
    tokens = []
    logits = runtime.prefill(tokenizer.encode(text))
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = runtime.decode(tokens[-1])
    return "".join(tokenizer.stream(tokens))


def test_a_prompt_is_continued_greedily_and_only_the_answer_is_on_stdout(bundle: Path) -> None:
    result = run_ok(bundle, "--prompt", "It was", "-n", "12")
    assert result.stdout == greedy(bundle, "It was", 12) + "\n"
    assert result.stderr == ""


def test_a_prompt_comes_from_stdin_without_its_line_end(bundle: Path) -> None:
    expected = run_ok(bundle, "--prompt", "It\nwas", "-n", "12").stdout
    assert run_ok(bundle, "-n", "12", stdin="It\nwas\n").stdout == expected
    assert run_ok(bundle, "-p", "-", "-n", "12", stdin="It\nwas\r\n").stdout == expected


def test_json_is_one_object_with_text_ids_and_stats(bundle: Path) -> None:
    text = run_ok(bundle, "-p", "It was", "-n", "12").stdout.removesuffix("\n")
    answer = json.loads(run_ok(bundle, "-p", "It was", "-n", "12", "--json").stdout)
    assert set(answer) == {"text", "ids", "stats"}
    assert answer["text"] == text
    assert len(answer["ids"]) == answer["stats"]["new_tokens"] == 12
    stats = answer["stats"]
    assert stats["prompt_tokens"] == len(Tokenizer(bundle, gemma_edge.load(bundle).manifest).encode("It was"))
    for name in ("load_s", "prefill_tokens_per_s", "ttft_ms", "decode_tokens_per_s", "peak_rss_mib"):
        assert stats[name] > 0, name


def test_stats_go_to_stderr(bundle: Path) -> None:
    result = run_ok(bundle, "-p", "It was", "-n", "5", "--stats")
    assert result.stdout == greedy(bundle, "It was", 5) + "\n"
    (line,) = result.stderr.splitlines()
    for part in ("load ", "prompt 3 tokens at", "first token after", "5 new tokens at", "peak RSS"):
        assert part in line


def test_a_seed_repeats_a_sampled_answer(bundle: Path) -> None:
    options = ["-p", "It was", "-n", "12", "--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"]
    first, again, other = (run_ok(bundle, *options, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_chat_goes_line_by_line_and_remembers(bundle: Path) -> None:
    runtime = gemma_edge.load(bundle, threads=1)
    tokenizer = Tokenizer(bundle, runtime.manifest)
    session = Session(runtime, tokenizer, ChatTemplate.from_bundle(bundle))
    answers = ["".join(session.send(text, GenerationOptions(max_tokens=9))) for text in ("Hello.", "Who are you?")]
    result = run_ok(bundle, "--chat", "-n", "9", "--json", stdin="Hello.\n\nWho are you?\n/reset\nHello.\n/quit\nNo.\n")
    said = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    assert said == [*answers, answers[0]]
    assert "note: a new conversation" in result.stderr


def test_a_chat_feeds_only_the_new_turn(bundle: Path) -> None:
    turns = run_ok(bundle, "--chat", "-n", "9", "--json", stdin="Hello.\nHello.\n").stdout.splitlines()
    first, second = (json.loads(line)["stats"]["prompt_tokens"] for line in turns)
    # instead of <bos>: the answer's last token, <end_of_turn> and a line end
    assert second == first + 2


def test_chat_with_a_prompt_is_one_templated_turn(bundle: Path) -> None:
    expected = run_ok(bundle, "--chat", "-n", "9", stdin="Hello.\n").stdout
    assert run_ok(bundle, "--chat", "--prompt", "Hello.", "-n", "9").stdout == expected
    assert expected != run_ok(bundle, "--prompt", "Hello.", "-n", "9").stdout


def test_token_ids_go_in_and_out_without_a_tokenizer(token_bundle: Path, bundle: Path) -> None:
    result = run_ok(token_bundle, "-p", "2, 15,7", "-n", "5")
    ids = [int(token) for token in result.stdout.split(",")]
    assert len(ids) == 5
    assert result.stderr == "note: this bundle has no tokenizer: prompt and answer are token ids\n"
    runtime = gemma_edge.load(bundle, threads=1)
    assert ids[0] == runtime.prefill([2, 15, 7]).argmax()
    assert json.loads(run_ok(token_bundle, "-p", "2,15,7", "-n", "5", "--json").stdout)["ids"] == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "two"], "prompt 'two' is not a list of token ids; give ids such as 2,15,7"),
        (["-p", ""], "no token to feed"),
        (["-p", "4096"], "token id 4096 is not below the vocabulary size 4096"),
        (["--chat"], "is a token-level bundle, without a tokenizer"),
    ],
)
def test_token_bundles_refuse_what_they_cannot_take(token_bundle: Path, options: list[str], message: str) -> None:
    result = run(token_bundle, *options)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_long_prompt_is_taken_with_a_note_and_refused_when_strict(bundle: Path) -> None:
    long = "It was a truth universally acknowledged, that"
    result = run_ok(bundle, "-p", long, "-n", "3")
    assert result.stderr == "note: longer than the context of 10 tokens: the oldest have fallen out\n"
    assert "new ones exceed the bundle's context of 10" in error_of(run(bundle, "-p", long, "-n", "3", "--strict"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "x", "--max-tokens", "0"], "--max-tokens 0 is below 1"),
        (["-p", "x", "--temperature", "-1"], "--temperature -1.0"),
        (["-p", "x", "--top-k", "-1"], "--top-k -1"),
        (["-p", "x", "--top-p", "0"], "--top-p 0.0"),
        (["-p", "x", "--min-p", "2"], "--min-p 2.0"),
        (["-p", "x", "--repetition-penalty", "0"], "--repetition-penalty 0.0"),
        (["-p", "x", "--seed", "-1"], "--seed -1"),
        (["-p", "x", "--threads", "0"], "threads 0"),
    ],
)
def test_impossible_options_are_one_line(bundle: Path, options: list[str], message: str) -> None:
    assert message in error_of(run(bundle, *options))


def test_stdin_that_is_no_text_is_one_line(bundle: Path) -> None:
    assert "stdin is not UTF-8 at byte 2" in error_of(run(bundle, stdin=b"ab\xff"))
    assert "stdin is not UTF-8" in error_of(run(bundle, "--chat", stdin=b"ab\xff\n"))


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path: Path) -> None:
    assert "is not a bundle: no manifest.json" in error_of(run(tmp_path, "-p", "x"))
    assert "is not a bundle" in error_of(run(tmp_path / "gone", "-p", "x"))


def test_a_truncated_bundle_is_one_line(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    os.truncate(bundle / "generate.onnx", 1000)
    assert "generate.onnx: 1000 bytes, the manifest says" in error_of(run(bundle, "-p", "x"))


def test_help_needs_no_heavy_package() -> None:
    """So it is there in a fraction of a second, also on a phone."""
    code = "import sys, gemma_edge.runtimes.cli as c; print(*sys.modules, c.main.name)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"numpy", "onnxruntime", "tokenizers", "jinja2", "rich", "torch"}
    assert not heavy & set(modules)


def test_running_a_bundle_needs_no_torch(bundle: Path) -> None:
    code = f"""
import sys
sys.modules.update(torch=None, transformers=None, onnx=None)  # importing them fails
from gemma_edge.runtimes.cli import main
main({[str(bundle), "--chat", "-p", "Hello.", "-n", "3"]})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def start(bundle: Path, *options: str) -> subprocess.Popen[bytes]:
    code = "from gemma_edge.runtimes.cli import main; main()"
    command = [sys.executable, "-c", code, str(bundle), "--threads", "1", *options]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background job, as a CI may run us, passes on an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_stops_the_answer_and_not_the_chat(bundle: Path) -> None:
    with start(bundle, "--chat", "-n", "10000000", "--stats") as process:
        assert process.stdin and process.stdout and process.stderr
        pipes = [process.stdout.fileno(), process.stderr.fileno()]
        said = dict.fromkeys(pipes, b"")

        def read_until(pipe: int, size: int, part: bytes = b"") -> None:
            """Both pipes, so that neither is full."""
            while len(said[pipe]) < size or part not in said[pipe][size:]:
                for ready in select.select(pipes, [], [], 60)[0]:
                    said[ready] += os.read(ready, 1 << 16)

        for _ in range(2):
            text, numbers = (len(said[pipe]) for pipe in pipes)
            process.stdin.write(b"Hello.\n")
            process.stdin.flush()
            read_until(pipes[0], text + 20)
            process.send_signal(signal.SIGINT)
            # its numbers stand behind an answer: the rest of this one must not be taken for the beginning of the next
            read_until(pipes[1], numbers, b"peak RSS")
            while select.select([pipes[0]], [], [], 0)[0]:
                said[pipes[0]] += os.read(pipes[0], 1 << 16)
        process.stdin.close()
        process.stdout.read()
        lines = (said[pipes[1]] + process.stderr.read()).splitlines()
        assert [line for line in lines if b"peak RSS" not in line] == [
            b"note: longer than the context of 10 tokens: the oldest have fallen out"
        ]
        assert len(lines) == 3 and process.wait(timeout=60) == 0


def test_ctrl_c_ends_a_prompt_with_130_and_one_line(bundle: Path) -> None:
    with start(bundle, "-p", "It was", "-n", "10000000") as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read() == b"interrupted\n"
        assert process.wait(timeout=60) == 130


def test_a_reader_that_leaves_ends_the_answer_in_silence(bundle: Path) -> None:
    with start(bundle, "-p", "It was", "-n", "10000000") as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(20)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("two\nlines"), "error: two lines"),
        (OSError(28, "No space left on device", "/out/file"), "error: no space left on /out/file; free some"),
        (OSError(28, "No space left on device"), "error: no space left on the disk that is written to"),
        (OSError(27, "File too large", "/out/file"), "error: /out/file: the file is larger than the limit allows"),
        (OSError(30, "Read-only file system", "/out/file"), "error: /out/file is on a read-only disk"),
        (MemoryError(), "error: not enough memory"),
    ],
)
@pytest.mark.parametrize("in_group", [False, True])
def test_every_command_fails_in_one_line(error: Exception, line: str, in_group: bool) -> None:
    result = CliRunner().invoke(*failing(error, in_group))
    assert result.exit_code == 2
    assert result.stderr.startswith(line)
    assert len(result.stderr.splitlines()) == 1


def test_a_bug_keeps_its_traceback() -> None:
    for error in (ValueError("bug"), OSError(5, "I/O error")):
        assert CliRunner().invoke(*failing(error, False)).exception is error


def failing(error: Exception, in_group: bool) -> tuple[click.Command, list[str]]:
    """A command that raises, and its arguments."""

    def body(**options: Any) -> None:
        raise error

    command = Command("fail", callback=body)
    return (Group("group", commands=[command]), ["fail"]) if in_group else (command, [])


@pytest.mark.parametrize("mode", [(), ("--chat",)], ids=["completion", "chat"])
def test_a_saved_prefix_is_not_fed_again_and_changes_nothing(
    mode: tuple[str, ...], bundle: Path, tmp_path: Path
) -> None:
    file, prefix, question = str(tmp_path / "prefix"), "It is a truth universally acknowledged, that ", "a single man"
    whole = json.loads(run_ok(bundle, *mode, "-p", prefix + question, "-n", "9", "--json").stdout)
    assert run_ok(bundle, *mode, "-p", prefix, "--save-prefix", file).stdout == ""
    rest = json.loads(run_ok(bundle, *mode, "-p", question, "-n", "9", "--json", "--load-prefix", file).stdout)
    assert (rest["text"], rest["ids"]) == (whole["text"], whole["ids"])
    assert rest["stats"]["prompt_tokens"] < whole["stats"]["prompt_tokens"] - 8


def test_a_prefix_of_a_token_bundle_is_ids(token_bundle: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "prefix")
    run_ok(token_bundle, "-p", "2,15,7", "--save-prefix", file)
    rest = run_ok(token_bundle, "-p", "9,11", "-n", "9", "--load-prefix", file).stdout
    assert rest == run_ok(token_bundle, "-p", "2,15,7,9,11", "-n", "9").stdout


def test_a_prefix_that_cannot_be_used_is_one_line(bundle: Path, token_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefix"
    assert f"{file} is not a file" in error_of(run(bundle, "-p", "a", "--load-prefix", str(file)))
    run_ok(token_bundle, "-p", "2,15,7", "--save-prefix", str(file))
    assert "another bundle" in error_of(run(bundle, "-p", "a", "--load-prefix", str(file)))
    file.write_bytes(b"nonsense")
    assert "is damaged" in error_of(run(bundle, "-p", "a", "--load-prefix", str(file)))
    assert "no file can be written there" in error_of(
        run(bundle, "-p", "a", "--save-prefix", str(tmp_path / "no" / "file"))
    )
    assert not (tmp_path / "no").exists()


def test_a_turn_is_taken_back_in_a_chat(bundle: Path) -> None:
    turns = run_ok(bundle, "--chat", "-n", "9", "--json", stdin="Hello.\nWho?\n/undo\nWho?\n").stdout.splitlines()
    texts = [json.loads(line)["text"] for line in turns]
    assert texts[1] == texts[2]
    assert "cannot take back" in run(bundle, "--chat", stdin="/undo\nHello.\n").stderr


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}


@pytest.mark.parametrize("options", [[], ["--chat"], ["--speculate"], ["--temperature", "2", "--seed", "1"]])
def test_an_answer_by_a_schema(options: list[str], bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    asked = ["-p", "It was", "-n", "30", *options, "--json-schema"]
    answer = run_ok(bundle, *asked, str(path)).stdout
    assert {"a", "b"} <= json.loads(answer).keys()
    assert run_ok(bundle, *asked, json.dumps(SCHEMA)).stdout == answer


def test_schemas_that_are_refused(bundle: Path, token_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
    schema = json.dumps(SCHEMA)
    assert "does not exist" in error_of(run(bundle, "-p", "a", "--json-schema", str(tmp_path / "none.json")))
    assert "is not JSON" in error_of(run(bundle, "-p", "a", "--json-schema", "{"))
    assert "allow at least" in error_of(run(bundle, "-p", "a", "-n", "5", "--json-schema", schema))
    assert "in response_format" in error_of(run(bundle, "--serve", "--json-schema", schema))
    result = run(token_bundle, "-p", "2,7", "--json-schema", schema)
    assert result.exit_code == 2 and "this bundle has no tokenizer" in result.stderr.splitlines()[-1]


def test_stats_tell_why_nothing_is_guessed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ONNX Runtime with int8 activations; the toy's float kernels may do either."""
    from gemma_edge.runtimes.generation.speculate import Speculation

    def refuse(self: Speculation, token: int) -> Any:
        self.refused = self._checked = True
        return self.runtime.decode(token)

    monkeypatch.setattr(Speculation, "_compare", refuse)
    said = run_ok(bundle, "-p", "It was", "-n", "9", "--speculate", "--stats").stderr
    assert "no guesses: they would change last bits here, --speculate=close makes them" in said
    assert json.loads(run_ok(bundle, "-p", "It", "-n", "9", "--speculate", "--json").stdout)["stats"]["guessing_off"]
    assert "no guesses" not in run_ok(bundle, "-p", "It was", "-n", "9", "--speculate=close", "--stats").stderr


def test_a_backend_is_chosen_by_name(bundle: Path) -> None:
    assert (
        run_ok(bundle, "-p", "It", "-n", "5", "--backend", "onnx").stdout
        == run_ok(bundle, "-p", "It", "-n", "5").stdout
    )
    assert "holds no 'tflite' backend, only onnx" in error_of(run(bundle, "-p", "It", "--backend", "tflite"))
