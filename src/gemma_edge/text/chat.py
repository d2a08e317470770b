"""A conversation as text: the checkpoint's own chat template, rendered as transformers does it, else Gemma 2's.

A template is code from a stranger, so it runs in a sandbox. Source of the environment: transformers/utils/chat_template_utils.py,
`_cached_compile_jinja_template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_edge.bundle.manifest import confined
from gemma_edge.errors import InputError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"

# The format Gemma 2 was tuned on: ai.google.dev/gemma/docs/core/prompt-structure
GEMMA2_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- raise_exception('System role not supported') }}
    {%- endif %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

# What a template can raise, since it is the bundle's code
_RENDER_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Message = Mapping[str, str]  # role (user or assistant) and content


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: jinja text.
            special_tokens: the texts of bos_token, eos_token and other special tokens, for the template.

        Raises:
            InputError: the template is not valid jinja.
        """
        self._special_tokens = dict(special_tokens)
        self.bos = self._special_tokens.get("bos_token", "")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"the bundle's chat template cannot be read: {error}") from None

    @classmethod
    def from_bundle(cls, bundle: Path) -> ChatTemplate:
        """The bundle's own template, or Gemma 2's when it has none.

        Raises:
            InputError: tokenizer_config.json or the template cannot be read.
        """
        config: dict[str, Any] = {}
        if (bundle / CONFIG_FILE).exists():
            path = confined(bundle, CONFIG_FILE)
            try:
                config = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path} is damaged ({error}); export the bundle again") from None
        source = _template_in(config)
        if (bundle / TEMPLATE_FILE).exists():
            source = confined(bundle, TEMPLATE_FILE).read_text(encoding="utf-8")
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
        return cls(source or GEMMA2_TEMPLATE, tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, its special tokens included.

        Args:
            messages: from the oldest to the newest.
            add_generation_prompt: whether the text ends with the beginning of the model's turn.

        Raises:
            InputError: the template refuses the conversation, for instance because of a system message.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except _RENDER_ERRORS as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from None


def _template_in(config: Mapping[str, Any]) -> str | None:
    """The template of a tokenizer_config.json: a string, or the default one of a list."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise InputError(f"{CONFIG_FILE} names no default chat template, only {', '.join(map(str, named))}")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{CONFIG_FILE}: chat_template is a {type(template).__name__}, neither text nor a list")
    return template


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # jinja's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
