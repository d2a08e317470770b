"""Chat templates against transformers' apply_chat_template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.checkpoints import DEMO
from support.toys import edit_json
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
@pytest.mark.parametrize("template", [GEMMA2_TEMPLATE, LOOPING], ids=["gemma2", "looping"])
def test_other_templates_render_as_in_transformers(tmp_path: Path, template: str, messages: list[Message]) -> None:
    """Blocks are trimmed, loops can break, and tojson does not escape HTML: all differ from jinja's defaults."""
    folder = tokenizer_folder(tmp_path, template)
    found = ChatTemplate.from_bundle(folder).render(messages)
    assert found == expected(folder, messages, add_generation_prompt=True)


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
    with pytest.raises(InputError, match="refuses the conversation"):
        ChatTemplate(source, {}).render([TURN])


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'open"])
def test_a_template_that_is_no_jinja_is_one_clear_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(InputError, match="chat template cannot be read"):
        ChatTemplate.from_bundle(tokenizer_folder(tmp_path, template))


def test_a_damaged_tokenizer_config_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(InputError, match="tokenizer_config.json is damaged"):
        ChatTemplate.from_bundle(tmp_path)


@pytest.mark.parametrize(("template", "message"), [(7, "is a int"), ([{"name": "rag", "template": ""}], "only rag")])
def test_a_template_of_another_kind_is_refused(tmp_path: Path, template: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate.from_bundle(tokenizer_folder(tmp_path, template))
