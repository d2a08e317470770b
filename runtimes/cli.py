"""`gemma-run`: parses, loads, prints. Only answers go to stdout. Heavy imports are inside, for a quick --help."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from gemma_edge.command import Command
from gemma_edge.errors import InputError

if TYPE_CHECKING:
    from gemma_edge.runtimes.engines.base import Runtime, Stats
    from gemma_edge.runtimes.generation.constrain import Grammar
    from gemma_edge.runtimes.generation.sampling import SamplingParams
    from gemma_edge.runtimes.generation.session import Session
    from gemma_edge.runtimes.generation.speculate import Speculation
    from gemma_edge.text.tokenizer import Tokenizer

CHAT_HELP = "/undo takes the last turn back, /reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass(frozen=True)
class Options:
    """What was asked for, apart from the bundle and the prompt."""

    params: SamplingParams
    max_tokens: int
    strict: bool
    stats: bool
    as_json: bool
    speculate: str | None
    json_schema: dict[str, Any] | None


@dataclass(frozen=True)
class AnswerStats:
    """One answer in numbers."""

    load_s: float
    prompt_tokens: int
    prefill_tokens_per_s: float
    ttft_ms: float  # from the request to the first piece of text
    new_tokens: int
    decode_tokens_per_s: float  # 0 when at most one token was generated
    peak_rss_mib: float
    drafted_tokens: int  # guesses of --speculate
    accepted_tokens: int  # those that were right
    guessing_off: bool  # asked for, but the kernels round otherwise for several tokens at once

    def __str__(self) -> str:
        return (
            f"load {self.load_s:.2f} s; prompt {self.prompt_tokens} tokens at {self.prefill_tokens_per_s:.1f} tokens/s;"
            f" first token after {self.ttft_ms:.0f} ms; {self.new_tokens} new tokens at {self.decode_tokens_per_s:.1f}"
            f" tokens/s; peak RSS {self.peak_rss_mib:.0f} MiB"
            + (f"; {self.accepted_tokens} of {self.drafted_tokens} guesses right" if self.drafted_tokens else "")
            + (
                "; no guesses: they would change last bits here, --speculate=close makes them"
                if self.guessing_off
                else ""
            )
        )


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-p", "--prompt", help="Text to continue; '-' reads stdin. Without it and --chat, a piped stdin is the prompt."
)
@click.option("--chat", is_flag=True, help="A conversation, line by line; with --prompt, that one turn and its answer.")
@click.option("-n", "--max-tokens", type=int, default=512, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k most likely; 0 = all.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Keep the most likely that sum to p; 1 = all."
)
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Keep those above p x the most likely.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 avoids repeats.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option(
    "--save-prefix", type=click.Path(path_type=Path), metavar="FILE", help="Feed the prompt, save that state, and stop."
)
@click.option(
    "--load-prefix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Go on from a saved prefix; nothing fed again.",
)
@click.option(
    "--speculate",
    type=click.Choice(("exact", "close")),
    is_flag=False,
    flag_value="exact",
    help="Guess tokens from the text before and check several at once, if that changes nothing (exact) or anyway (close).",
)
@click.option(
    "--json-schema", metavar="SCHEMA", help="Answers are JSON that fits this schema: a file, or the schema itself."
)
@click.option("--serve", is_flag=True, help="Answer OpenAI's clients over HTTP, and show a page to chat with.")
@click.option("--host", default="127.0.0.1", show_default=True, help="With --serve: 0.0.0.0 lets the whole network in.")
@click.option("--port", type=int, default=8080, show_default=True, help="With --serve.")
@click.option(
    "--backend", help="Of a bundle that has several: onnx, executorch or tflite. Default: the first installed."
)
@click.option("--threads", type=int, help="Default: the bundle's target's, at most what this machine has.")
@click.option(
    "--strict", is_flag=True, help="Refuse what exceeds the context, instead of forgetting the oldest tokens."
)
@click.option("--stats", is_flag=True, help="Speed and memory on stderr, after each answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (text, ids, stats) per answer, not streamed.")
@click.version_option(package_name="gemma-edge")
def main(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    backend: str | None,
    threads: int | None,
    save_prefix: Path | None,
    load_prefix: Path | None,
    serve: bool,
    host: str,
    port: int,
    **choices: Any,
) -> None:
    """Run the BUNDLE made by gemma-export: continue a text, or chat.

    --prompt is continued as it stands, also by an instruction-tuned model; --chat puts it in the model's own chat format.
    Only the answer goes to stdout. A bundle without tokenizer takes and prints token ids: --prompt 2,15,7.
    """
    options = _options(choices)
    if serve:
        _serve(bundle, backend, threads, options, host, port)
        return
    if prompt == "-" or (prompt is None and (save_prefix or not chat)):
        prompt = _read_stdin(asked=prompt == "-")
    from gemma_edge.runtimes.engines.load import open_runtime
    from gemma_edge.runtimes.generation.prefix import load, save

    runtime = open_runtime(bundle, backend=backend, threads=threads)
    prefix = load(runtime, load_prefix) if load_prefix else ""
    if save_prefix:
        assert prompt is not None
        save(runtime, prefix + prompt, save_prefix, chat=chat)
    elif chat:
        _chat(runtime, prompt, options, prefix)
    else:
        assert prompt is not None
        _complete(runtime, prefix + prompt, options)


def _options(choices: dict[str, Any]) -> Options:
    """Checked before the bundle is touched."""
    from gemma_edge.runtimes.generation.sampling import SamplingParams

    rest = {name: choices.pop(name) for name in ("max_tokens", "strict", "stats", "as_json", "speculate")}
    if rest["max_tokens"] < 1:
        raise InputError(f"--max-tokens {rest['max_tokens']} is below 1")
    schema = choices.pop("json_schema")
    if schema is not None:
        from gemma_edge.runtimes.generation.constrain import read_schema

        schema = read_schema(schema)
    return Options(params=SamplingParams(**choices), json_schema=schema, **rest)


def _serve(bundle: Path, backend: str | None, threads: int | None, options: Options, host: str, port: int) -> None:
    """Until Ctrl-C."""
    from importlib.util import find_spec

    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise InputError(f"--serve needs {' and '.join(missing)}: pip install 'gemma-edge[serve]'")
    if options.json_schema is not None:
        raise InputError("--json-schema is of one answer; with --serve, requests bring theirs in response_format")
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port} is not between 0 and 65535")
    from gemma_edge.runtimes.engines.load import open_runtime
    from gemma_edge.runtimes.serve.server import Engine, serve

    runtime = open_runtime(bundle, backend=backend, threads=threads)
    serve(Engine(runtime, options.params, _speculation(runtime, options)), host, port)


def _read_stdin(*, asked: bool) -> str:
    """All of stdin, without its last line end."""
    if not asked and sys.stdin.isatty():
        raise InputError("nothing to continue: pass --prompt TEXT, pipe a text in, or start a conversation with --chat")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 at byte {error.start}; give UTF-8 text") from None
    return text.removesuffix("\n").removesuffix("\r")


def _complete(runtime: Runtime, prompt: str, options: Options) -> None:
    """Continue a text, or token ids."""
    from gemma_edge.runtimes.generation.generate import generate, note_tokens
    from gemma_edge.runtimes.generation.sampling import Sampler
    from gemma_edge.text.tokenizer import Tokenizer, parse_ids

    tokenizer = Tokenizer(runtime.bundle, runtime.manifest) if runtime.manifest.tokenizer else None
    if tokenizer is None:
        click.echo("note: this bundle has no tokenizer: prompt and answer are token ids", err=True)
    ids = tokenizer.encode(prompt) if tokenizer else parse_ids(prompt)
    stop_ids = tokenizer.stop_ids if tokenizer else frozenset(runtime.manifest.config.eos_token_id)
    speculation, grammar = _speculation(runtime, options), _grammar(runtime, tokenizer, options)
    sampler, known = Sampler(options.params), runtime.align(ids)
    sampler.observe(ids[:known])
    tokens = generate(
        runtime,
        ids[known:],
        sampler,
        max_tokens=options.max_tokens,
        stop_ids=stop_ids,
        strict=options.strict,
        speculation=speculation,
        grammar=grammar,
    )
    if len(ids) > runtime.cache.context:
        _say_overflow(runtime.cache.context)
    answer_ids: list[int] = []
    noted = note_tokens(tokens, answer_ids)
    text = tokenizer.stream(noted) if tokenizer else _ids_as_text(noted)
    _show(runtime, text, lambda: answer_ids, options, speculation)


def _speculation(runtime: Runtime, options: Options) -> Speculation | None:
    from gemma_edge.runtimes.generation.speculate import Speculation

    return Speculation(runtime, options.speculate, say=_note) if options.speculate else None


def _grammar(runtime: Runtime, tokenizer: Tokenizer | None, options: Options) -> Grammar | None:
    from gemma_edge.runtimes.generation.constrain import Grammar, Vocabulary

    if options.json_schema is None:
        return None
    if tokenizer is None:
        raise InputError("--json-schema needs text, and this bundle has no tokenizer")
    return Grammar(Vocabulary(tokenizer, runtime.manifest.config.vocab_size), options.json_schema)


def _note(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def _ids_as_text(tokens: Iterator[int]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        yield f",{token}" if index else str(token)


def _chat(runtime: Runtime, prompt: str | None, options: Options, prefix: str) -> None:
    """One turn, or a conversation until the input ends."""
    from gemma_edge.runtimes.generation.session import Session
    from gemma_edge.text.chat import ChatTemplate
    from gemma_edge.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
    template = ChatTemplate.from_bundle(runtime.bundle)
    session = Session(
        runtime,
        tokenizer,
        template,
        options.params,
        strict=options.strict,
        prefix=prefix,
        speculation=_speculation(runtime, options),
        grammar=_grammar(runtime, tokenizer, options),
    )
    if prompt is not None:
        _turn(session, prompt, options)
        return
    if sys.stdin.isatty():
        click.echo(CHAT_HELP, err=True)
    while (line := _read_line()) is not None:
        text = line.strip()
        if text == "/quit":
            break
        if text == "/reset":
            session.reset()
            click.echo("note: a new conversation", err=True)
        elif text == "/undo":
            session.rewind(1)
            click.echo("note: the last turn is taken back", err=True)
        elif text:
            with _stop_on_interrupt() as stop:
                _turn(session, text, options, stop)


def _read_line() -> str | None:
    """A line of the user, None at the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    # input() writes its prompt to stdout, which is for answers only unless both are the terminal
    on_stdout = interactive and sys.stdout.isatty()
    if interactive and not on_stdout:
        click.echo("> ", nl=False, err=True)
    try:
        return input("> " if on_stdout else "")
    except EOFError:
        if interactive:
            click.echo(err=True)
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 ({error.reason}); give UTF-8 text") from None
    except KeyboardInterrupt:
        if not interactive:
            raise
        click.echo(f"\n{CHAT_HELP}", err=True)
        return ""


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[list[bool]]:
    """The first Ctrl-C in the block fills the list, the next one is a KeyboardInterrupt.

    A KeyboardInterrupt inside a forward pass would lose the cache; a note that is read between tokens does not.
    """
    stop: list[bool] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _turn(session: Session, text: str, options: Options, stop: Sequence[bool] = ()) -> None:
    before, context = session.runtime.position, session.runtime.cache.context
    answer = _until(stop, session.send(text, max_tokens=options.max_tokens))
    _show(session.runtime, answer, lambda: session.answer_ids, options, session.speculation)
    if before <= context < session.runtime.position:
        _say_overflow(context)


def _until(stop: Sequence[bool], answer: Iterator[str]) -> Iterator[str]:
    for piece in answer:
        yield piece
        if stop:
            return


def _show(
    runtime: Runtime,
    pieces: Iterator[str],
    ids: Callable[[], Sequence[int]],
    options: Options,
    speculation: Speculation | None,
) -> None:
    """Print an answer as it comes, or as JSON; then its numbers."""
    before, start, ttft_s, text = copy(runtime.stats), time.perf_counter(), 0.0, ""
    for piece in pieces:
        ttft_s = ttft_s or time.perf_counter() - start
        text += piece
        if not options.as_json:
            click.echo(piece, nl=False)
    off = speculation is not None and speculation.refused
    stats = _answer_stats(before, runtime.stats, ttft_s or time.perf_counter() - start, len(ids()), off)
    if options.as_json:
        click.echo(json.dumps({"text": text, "ids": list(ids()), "stats": asdict(stats)}, ensure_ascii=False))
    elif not text.endswith("\n"):
        click.echo()
    if options.stats:
        click.echo(str(stats), err=True)


def _answer_stats(before: Stats, after: Stats, ttft_s: float, new_tokens: int, guessing_off: bool) -> AnswerStats:
    from gemma_edge.memory import peak_rss_mib
    from gemma_edge.runtimes.engines.base import Stats

    spent = Stats(**{name: value - getattr(before, name) for name, value in asdict(after).items()})
    return AnswerStats(
        load_s=after.load_s,
        prompt_tokens=spent.prefill_tokens,
        prefill_tokens_per_s=spent.prefill_tokens_per_s,
        ttft_ms=1000 * ttft_s,
        new_tokens=new_tokens,
        decode_tokens_per_s=spent.decode_tokens_per_s,
        peak_rss_mib=peak_rss_mib(),
        drafted_tokens=spent.drafted_tokens,
        accepted_tokens=spent.accepted_tokens,
        guessing_off=guessing_off,
    )


def _say_overflow(context: int) -> None:
    click.echo(f"note: longer than the context of {context} tokens: the oldest have fallen out", err=True)
