"""Turns OpenAI's requests into tokens and options. fields.py refuses other fields. Source: OpenAI's API reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.generate import GenerationOptions, check_fits
from gemma_edge.runtimes.generation.sampling import SamplingParams
from gemma_edge.runtimes.generation.turn import OTHER_WORDS, beginning
from gemma_edge.runtimes.serve.fields import get, refuse_unsupported
from gemma_edge.runtimes.serve.messages import SYSTEM, messages_of
from gemma_edge.runtimes.serve.refused import shown
from gemma_edge.runtimes.serve.schemas import schema_of
from gemma_edge.runtimes.serve.tools import tools_of
from gemma_edge.runtimes.tools.form import ToolForm
from gemma_edge.runtimes.tools.tool import Tool
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

MAX_TOKENS = ("max_completion_tokens", "max_tokens")  # the first of these fields that is there counts
INTEGERS = ("top_k", "seed")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")  # some of them only other servers have
# The largest request. A larger one would keep the machine busy for long before it could be cancelled.
MAX_NEW_TOKENS = 1 << 20
MAX_PROMPTS = 32
MAX_ANSWERS = 32  # of all prompts together
MAX_PROMPT_CHARS = 1 << 18
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Model:
    """The parts of a bundle that reading a request needs."""

    tokenizer: Tokenizer
    template: ChatTemplate
    form: ToolForm
    vocab_size: int
    context: int
    name: str = ""
    adapters: tuple[str, ...] = ()  # names of models too: NAME:ADAPTER
    pins: bool = False  # whether it can keep the beginning of a conversation


@dataclass(frozen=True)
class ParsedRequest:
    """One request."""

    prompts: tuple[tuple[int, ...], ...]  # token ids; each gets `n` answers of its own
    options: GenerationOptions
    judged: tuple[
        str, ...
    ] = ()  # the text of each prompt that a guard judges: of a conversation the last words said to the model
    n: int = 1
    stream: bool = False  # whether the answer is sent in pieces
    include_usage: bool = False  # whether a stream ends with the usage
    logprobs: int | None = None  # how many alternatives come with each token; None: no log-probabilities
    echo: tuple[str, ...] = ()  # what stands in front of each answer: its prompt, if requested
    model: str = ""  # which of the server's answers
    pinned: int = 0  # tokens of a conversation before the user's own words

    @property
    def choices(self) -> int:
        """How many answers there are."""
        return self.n * len(self.prompts)

    @classmethod
    def parse(cls, body: Any, *, chat: bool, defaults: GenerationOptions, model: Model) -> ParsedRequest:
        """Read a request.

        Args:
            body: its JSON.
            chat: whether it brings messages; else it brings a prompt.
            defaults: for what it leaves open.
            model: the bundle's parts.

        Raises:
            InputError: a field is missing, is not as OpenAI's API says, is too large, or is not supported.
        """
        if not isinstance(body, dict):
            raise InputError("the request is not a JSON object")
        refuse_unsupported(body)
        stop, schema, logprobs = _stop(body), schema_of(body), _logprobs(body, chat=chat)
        sampling, max_tokens = _sampling(body, defaults.sampling), _max_tokens(body)
        echo = get(body, "echo", bool, False)
        if chat and echo:
            raise InputError("echo is not supported with messages; leave it out", field="echo", value=echo)
        tools, pinned = tools_of(body), 0
        if chat:
            messages = messages_of(body, takes_system=model.template.takes_system, tools=tools["tools"])
            prompt = model.form.render(model.template, messages, tools["tools"])
            prompts = [_ids(prompt, model)]
            if model.pins:
                pinned = _beginning(body, prompt, prompts[0], model, tools["tools"])
            judged = [message["content"] for message in messages if message["role"] in ("user", "tool")][-1:] or [""]
        elif tools["tools"]:
            raise InputError("tools are not supported without messages; leave them out", field="tools")
        else:
            given = _prompts(body)
            prompts = [_ids(prompt, model) for prompt in given]
            judged = [each if isinstance(each, str) else model.tokenizer.decode(each) for each in given]
        n = _answers(body, len(prompts))
        if max_tokens is None:
            max_tokens = _default_tokens(defaults, model.context, max(map(len, prompts)))
        options = replace(defaults, max_tokens=max_tokens, sampling=sampling, stop=stop, json_schema=schema, **tools)
        for ids in prompts if options.strict else ():
            check_fits(model.context, len(ids), max_tokens)
        return cls(
            tuple(map(tuple, prompts)),
            options,
            tuple(judged),
            n,
            stream=get(body, "stream", bool, False),
            include_usage=bool(get(body, "stream_options", dict, {}).get("include_usage")),
            logprobs=logprobs,
            echo=tuple(_echoed(body["prompt"], prompts, model.tokenizer)) if echo else (),
            model=_model(body, model),
            pinned=pinned,
        )


def _beginning(body: Mapping[str, Any], prompt: str, ids: list[int], model: Model, tools: Sequence[Tool]) -> int:
    """How many tokens of a conversation come before the user's own words."""
    system = takewhile(lambda message: message["role"] in SYSTEM, body["messages"])
    opened = {"messages": [*system, {"role": "user", "content": OTHER_WORDS}]}
    messages = messages_of(opened, takes_system=model.template.takes_system, tools=tools)
    return beginning(ids, prompt, model.form.render(model.template, messages, tools), model.tokenizer.encode)


def _model(body: Mapping[str, Any], model: Model) -> str:
    """The model that a request names. A name of another server's means the bundle, as clients have one set."""
    name = get(body, "model", str, model.name)
    if name in model.adapters:
        return str(name)
    if model.adapters and name.startswith(f"{model.name}:"):
        allowed = ", ".join((model.name, *model.adapters))
        raise InputError(f"model {shown(name)} is not served here; there are {allowed}", field="model", value=name)
    return model.name


def _default_tokens(defaults: GenerationOptions, context: int, prompt_tokens: int) -> int:
    """The length limit of a request that names none; with `strict`, at most what is left of the context."""
    left = context - prompt_tokens
    return min(defaults.max_tokens, left) if defaults.strict and left > 0 else defaults.max_tokens


def _prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """OpenAI's four forms of a prompt: a text, texts, token ids, lists of token ids."""
    prompt = body.get("prompt")
    prompts: list[Any] = prompt if isinstance(prompt, list) and prompt and not _is_ids(prompt) else [prompt]
    if not all(isinstance(each, str) or _is_ids(each) for each in prompts):
        raise InputError(
            "prompt is missing; give a text, a list of texts, token ids, or lists of token ids", field="prompt"
        )
    if len(prompts) > MAX_PROMPTS:
        raise InputError(f"prompt holds {len(prompts)} texts; give at most {MAX_PROMPTS}", field="prompt")
    return prompts


def _answers(body: Mapping[str, Any], prompts: int) -> int:
    """How many answers each prompt gets."""
    n = int(get(body, "n", int, 1))
    if n < 1 or n * prompts > MAX_ANSWERS:
        problem = "below 1" if n < 1 else f"too large for {prompts} prompts: at most {MAX_ANSWERS} answers in all"
        raise InputError(f"n {shown(n)} is {problem}", field="n", value=n)
    return n


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(each) is int for each in prompt)


def _ids(prompt: str | list[int], model: Model) -> list[int]:
    if len(prompt) > MAX_PROMPT_CHARS:
        kind = "characters" if isinstance(prompt, str) else "tokens"
        raise InputError(f"the prompt has {len(prompt)} {kind}; give at most {MAX_PROMPT_CHARS}", field="prompt")
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt)
    if wrong := [each for each in prompt if not 0 <= each < model.vocab_size]:
        limit = f"is not between 0 and {model.vocab_size - 1}"
        raise InputError(f"the prompt's token id {shown(wrong[0])} {limit}", field="prompt", value=wrong[0])
    return prompt


def _echoed(prompt: Any, prompts: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    return [
        text if isinstance(text, str) else tokenizer.decode(ids)
        for text, ids in zip(texts if len(texts) == len(prompts) else [None] * len(prompts), prompts, strict=True)
    ]


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    for name in MAX_TOKENS:
        value = get(body, name, int, None)
        if value is not None and not 1 <= value <= MAX_NEW_TOKENS:
            problem = "below 1" if value < 1 else f"above {MAX_NEW_TOKENS}"
            raise InputError(f"{name} {shown(value)} is {problem}", field=name, value=value)
        if value is not None:
            return int(value)
    return None


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise InputError("stop is neither a text nor a list of texts", field="stop", value=stop)
    if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in stop):
        limit = f"give at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters"
        raise InputError(f"stop holds too many texts, or a text that is too long; {limit}", field="stop")
    return tuple(stop)


def _logprobs(body: Mapping[str, Any], *, chat: bool) -> int | None:
    """How many alternatives come with each token: `top_logprobs` of a chat, `logprobs` itself of a completion."""
    if chat:
        count = get(body, "top_logprobs", int, 0) if get(body, "logprobs", bool, False) else None
    else:
        count = None if body.get("logprobs") is False else get(body, "logprobs", int, None)
    if count is None and body.get("top_logprobs"):
        raise InputError("top_logprobs needs logprobs: true, and messages", field="top_logprobs")
    if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
        name = "top_logprobs" if chat else "logprobs"
        raise InputError(f"{name} {shown(count)} is not between 0 and {MAX_TOP_LOGPROBS}", field=name, value=count)
    return count


def _sampling(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {}
    for name in (*NUMBERS, *INTEGERS):
        value = body.get(name)
        if value is None:
            continue
        kind, article = (int, "a whole number") if name in INTEGERS else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise InputError(f"{name} {shown(value)} is not {article}", field=name, value=value)
        given[name] = value
    return replace(defaults, **given)
