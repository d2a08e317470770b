"""Chat templates against transformers' apply_chat_template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from campaigns.campaign import time_limit
from support.checkpoints import DEMO
from support.toys import GEMMA3_TEMPLATE, edit_json
from transformers import AutoTokenizer

from gemma_edge.errors import InputError
from gemma_edge.text.chat import GEMMA2_TEMPLATE, ChatTemplate, Message

TURN = {"role": "user", "content": "Hello."}
CONVERSATIONS: list[list[Message]] = [
    [TURN],
    [{"role": "user", "content": "  blanks around \n"}],
    [TURN, {"role": "assistant", "content": " Hi! 😀 \n"}],
    [TURN, {"role": "assistant", "content": ""}, {"role": "user", "content": "<b>&amp;</b> {{ 1 }} \"q\" 'q'"}],
]
LOOPING = """\
{{ bos_token }}{% for m in messages %}
  {% if loop.index0 == 2 %}
    {% break %}
  {% endif %}
{{ m['content'] | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}>{% endif %}"""


def tokenizer_folder(folder: Path, template: object) -> Path:
    """The demo's tokenizer with another chat template; None has none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, folder)
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    return folder


def expected(folder: Path, messages: list[Message], *, add_generation_prompt: bool) -> str:
    return str(
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_own_template_renders_as_in_transformers(messages: list[Message], add_generation_prompt: bool) -> None:
    found = ChatTemplate.from_bundle(DEMO).render(messages, add_generation_prompt=add_generation_prompt)
    assert found == expected(DEMO, messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [GEMMA2_TEMPLATE, GEMMA3_TEMPLATE, LOOPING], ids=["gemma2", "gemma3", "looping"])
def test_other_templates_render_as_in_transformers(tmp_path: Path, template: str, messages: list[Message]) -> None:
    """Blocks are trimmed, loops can break, and tojson does not escape HTML: all differ from jinja's defaults."""
    folder = tokenizer_folder(tmp_path, template)
    found = ChatTemplate.from_bundle(folder).render(messages)
    assert found == expected(folder, messages, add_generation_prompt=True)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_gemma3_has_a_system_turn_and_else_gemma2s_format(tmp_path: Path, messages: list[Message]) -> None:
    """So a Gemma 3 without a template of its own may use Gemma 2's."""
    folder = tokenizer_folder(tmp_path, GEMMA3_TEMPLATE)
    template = ChatTemplate.from_bundle(folder)
    assert template.render(messages) == ChatTemplate(GEMMA2_TEMPLATE, {"bos_token": "<bos>"}).render(messages)
    with_system: list[Message] = [{"role": "system", "content": "Be brief."}, *messages]
    text = template.render(with_system)
    assert text == expected(folder, with_system, add_generation_prompt=True)
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\n")


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_gemma2_format_is_used_without_a_template(tmp_path: Path, messages: list[Message]) -> None:
    folder = tokenizer_folder(tmp_path, None)
    assert ChatTemplate.from_bundle(folder).render(messages) == ChatTemplate.from_bundle(DEMO).render(messages)
    (folder / "tokenizer_config.json").unlink()
    assert ChatTemplate.from_bundle(folder).render(messages) == ChatTemplate.from_bundle(DEMO).render(messages)


def test_default_of_several_templates_is_used_as_in_transformers(tmp_path: Path) -> None:
    templates = [{"name": "rag", "template": "wrong"}, {"name": "default", "template": LOOPING}]
    folder = tokenizer_folder(tmp_path, templates)
    assert ChatTemplate.from_bundle(folder).render([TURN]) == expected(folder, [TURN], add_generation_prompt=True)


def test_template_file_wins_as_in_transformers(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, "wrong")
    (folder / "chat_template.jinja").write_text(LOOPING)
    assert ChatTemplate.from_bundle(folder).render([TURN]) == expected(folder, [TURN], add_generation_prompt=True)


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, "{{ bos_token }}|{{ eos_token }}")
    edit_json(folder / "tokenizer_config.json", bos_token={"content": "<B>", "lstrip": False})
    assert ChatTemplate.from_bundle(folder).render([TURN]) == "<B>|<eos>"


@pytest.mark.parametrize("source", [None, GEMMA2_TEMPLATE])
def test_a_system_message_is_refused_in_one_line(source: str | None) -> None:
    template = ChatTemplate(source, {"bos_token": "<bos>"}) if source else ChatTemplate.from_bundle(DEMO)
    with pytest.raises(InputError, match="refuses the conversation: System role not supported"):
        template.render([{"role": "system", "content": "Be brief."}, TURN])


def test_roles_must_alternate() -> None:
    with pytest.raises(InputError, match="Conversation roles must alternate"):
        ChatTemplate(GEMMA2_TEMPLATE, {"bos_token": "<bos>"}).render([TURN, TURN])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(1000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InputError, match="cannot write the conversation"):
        ChatTemplate(source, {}).render([TURN])


ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "macros that call themselves": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "an endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a filter in a loop": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "text by a number": "{{ 'a' * 10 ** 10 }}",
    "a list by a number": "{% set x = [1] * 10 ** 10 %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "products of numbers": "{% set n = namespace(x=99999) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled text": "{% set n = namespace(x='aaaa') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "added text": "{% set n = namespace(x='aaaa') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "text in blocks": "{% set n = namespace(x='aaaa') %}{% for a in range(99) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "lists in lists": "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "lists in lists as JSON": "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "lists in lists that are equal": "{% set n = namespace(x=[1], y=[1]) %}{% for a in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "a width in a filter": "{{ '%10000000000d' | format(1) }}",
    "a width in format": "{{ '{:>10000000000}'.format(1) }}",
    "a width as an argument": "{{ '{:>{w}}'.format(1, w=10000000000) }}",
    "blanks around": "{{ 'a' | center(10000000000) }}",
    "blanks before": "{{ 'a'.rjust(10000000000) }}",
    "blanks of JSON": "{{ [1] | tojson(indent=10000000000) }}",
    "digits": "{{ 1 | round(10000000000) }}",
    "long replacements": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "long separators": "{{ range(99999) | join('a' * 99999) }}",
    "batches": "{{ [1] | batch(10000000000, 'x') | list }}",
    "much output": "{% set x = 'a' * 99999 %}{% for a in range(99999) %}{{ x }}{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_has_a_limit_of_steps_and_of_sizes(source: str) -> None:
    """jinja's sandbox limits neither, so these templates took hours or all memory."""
    with pytest.raises(InputError, match="cannot write the conversation") as caught, time_limit(20):
        ChatTemplate(source, {}).render([TURN])
    assert "\n" not in str(caught.value)


def test_a_long_conversation_is_within_the_limits() -> None:
    template = ChatTemplate.from_bundle(DEMO)
    roles = ("user", "assistant")
    many = [{"role": roles[i % 2], "content": "word " * 20} for i in range(4001)]
    assert template.render(many).count("<start_of_turn>") == 4002
    long = template.render([{"role": "user", "content": "a\n" * 2_000_000}])
    assert len(long) > 3_999_000


GENERATION = """\
{% for m in messages %}
{% if m['role'] == 'assistant' %}
<start_of_turn>model
{% generation %}{% set text = m['content'] | trim %}{{ text + '<end_of_turn>' }}{% endgeneration %}

{% else %}
<start_of_turn>{{ m['role'] }} {{ m['content'] }}{{ text }}<end_of_turn>
{% endif %}
{% endfor %}"""


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_template_of_a_trainer_marks_what_the_model_says(tmp_path: Path, messages: list[Message]) -> None:
    """{% generation %} is transformers' own tag: the export passed, then chat and server died of it."""
    folder = tokenizer_folder(tmp_path, GENERATION)
    assert ChatTemplate.from_bundle(folder).render(messages) == expected(folder, messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (LOOPING, True),
        (GENERATION, True),
        (GEMMA2_TEMPLATE, False),
        (GEMMA3_TEMPLATE, True),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", False),
        ("{{ messages[0]['nothing']['at all'] }}", False),
    ],
)
def test_a_template_takes_the_systems_turn_or_not(source: str, takes: bool) -> None:
    assert ChatTemplate(source, {}).takes_system == takes


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'open"])
def test_a_template_that_is_no_jinja_is_one_clear_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(InputError, match="chat template cannot be read"):
        ChatTemplate.from_bundle(tokenizer_folder(tmp_path, template))


def test_a_damaged_tokenizer_config_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(InputError, match="tokenizer_config.json is not valid JSON"):
        ChatTemplate.from_bundle(tmp_path)


@pytest.mark.parametrize(("template", "message"), [(7, "is a int"), ([{"name": "rag", "template": ""}], "only rag")])
def test_a_template_of_another_kind_is_refused(tmp_path: Path, template: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate.from_bundle(tokenizer_folder(tmp_path, template))
