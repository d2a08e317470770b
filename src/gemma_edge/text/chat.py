"""A conversation as text: the checkpoint's own chat template, rendered as transformers does it, else Gemma 2's.

A template is code from a stranger, so it runs in a sandbox: sandbox.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from gemma_edge.bundle.manifest import confined
from gemma_edge.errors import InputError, one_line
from gemma_edge.reading import MAX_TEMPLATE, present, read_json, read_template
from gemma_edge.text.sandbox import Sandbox, TemplateRefusal, limited

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

# What a template can raise, since it is a stranger's code
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

Message = Mapping[str, Any]  # role (user or assistant) and content


class ConversationRefused(InputError):
    """A template refuses a conversation, for instance because of a system message."""


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
        self.source = source
        self._special_tokens = dict(special_tokens)
        self.bos = self._special_tokens.get("bos_token", "")
        self.eos = self._special_tokens.get("eos_token", "")
        if len(source) > MAX_TEMPLATE:
            raise InputError(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are read")
        try:
            with limited():
                self._template = Sandbox().from_string(source)
        except (*_RENDER_ERRORS, SyntaxError) as error:
            raise InputError(f"the bundle's chat template cannot be read: {one_line(error)}") from None

    @classmethod
    def from_bundle(cls, bundle: Path) -> ChatTemplate:
        """The bundle's own template, or Gemma 2's when it has none.

        Raises:
            InputError: tokenizer_config.json or the template cannot be read, or lies outside the bundle.
        """
        for name in (CONFIG_FILE, TEMPLATE_FILE):
            if present(bundle / name):
                confined(bundle, name)
        return cls.of_folder(bundle, "export the bundle again")

    @classmethod
    def of_folder(cls, folder: Path, hint: str = "download the folder again") -> ChatTemplate:
        """The template of a Hugging Face folder, or Gemma 2's when it has none.

        Args:
            folder: its files may be links, as in the hub's cache.
            hint: ends the message of an error.

        Raises:
            InputError: tokenizer_config.json or the template cannot be read.
        """
        source, tokens = template_of(folder, hint)
        return cls(source or GEMMA2_TEMPLATE, {"bos_token": "<bos>", "eos_token": "<eos>", **tokens})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as text, its special tokens included.

        Args:
            messages: from the oldest to the newest.
            tools: functions that the model may call, for a template that writes them.
            add_generation_prompt: whether the text ends with the beginning of the model's turn.

        Raises:
            ConversationRefused: the template does not take such a conversation.
            InputError: the template fails, or takes too many steps.
        """
        try:
            with limited([list(messages), list(tools or ())]):
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
        except TemplateRefusal as error:
            raise ConversationRefused(f"the chat template refuses the conversation: {error}") from None
        except _RENDER_ERRORS as error:
            raise InputError(f"the chat template cannot write the conversation: {one_line(error)}") from None

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message as a turn of its own; Gemma 2's template refuses it."""
        text = "what the system says"
        try:
            return text in self.render([{"role": "system", "content": text}, {"role": "user", "content": "Hello"}])
        except InputError:
            return False


def template_of(folder: Path, hint: str) -> tuple[str | None, dict[str, str]]:
    """The source of a folder's template, if it has one, and its special tokens; arguments and errors as `of_folder`."""
    path = folder / CONFIG_FILE
    config = read_json(path, hint) if present(path) else {}
    source = _template_in(config)
    if present(folder / TEMPLATE_FILE):
        source = read_template(folder / TEMPLATE_FILE, hint)
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if not name.endswith("_token") or isinstance(text, bool | None):
            continue
        if not isinstance(text, str):
            raise InputError(f"{path}: {name} is {type(text).__name__}, not a token's text", hint=hint)
        tokens[name] = text
    return source, tokens


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
