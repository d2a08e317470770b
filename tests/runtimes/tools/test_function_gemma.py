"""FunctionGemma's own form: a template that writes tools, tokens of its own, and a grammar for calls that are no JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.checkpoints import DEMO
from support.toys import ToyRuntime, toy_manifest

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

import jsonschema

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.generate import LENGTH, STOP, GenerationOptions
from gemma_edge.runtimes.generation.sampling import SamplingParams
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.runtimes.tools.forms import form_of
from gemma_edge.runtimes.tools.function_gemma import FunctionGemma, Values
from gemma_edge.runtimes.tools.json_calls import JsonCalls
from gemma_edge.runtimes.tools.tool import Tool
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

TOKENS = tuple(f"<{side}_function_{what}>" for what in ("declaration", "call", "response") for side in ("start", "end"))
# TEMPLATE: what Google's page on FunctionGemma shows, as a template
TEMPLATE = """\
{%- macro value(it) -%}
{%- if it is string -%}<escape>{{ it }}<escape>
{%- elif it is mapping -%}
{ {%- for key, one in it | dictsort -%}{{ key }}:{{ value(one) }}{{ "," if not loop.last }}{%- endfor -%} }
{%- elif it is sequence -%}[{%- for one in it -%}{{ value(one) }}{{ "," if not loop.last }}{%- endfor -%}]
{%- else -%}{{ it | tojson }}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- if tools -%}
{{ "<start_of_turn>developer\\nYou are a model that can do function calling with the following functions" }}
{%- for tool in tools -%}
<start_function_declaration>declaration:{{ tool.function.name }}{{ value(tool.function.parameters) }}<end_function_declaration>
{%- endfor -%}
{{ "<end_of_turn>\\n" }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "tool" -%}
<start_function_response>response:{{ message.content.name }}{{ value(message.content.response) }}<end_function_response>
{%- else -%}
{%- if loop.first or loop.previtem.role != "tool" -%}
{{ "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" }}
{%- endif -%}
{{ message.content }}
{%- for call in message.tool_calls or () -%}
<start_function_call>call:{{ call.function.name }}{{ value(call.function.arguments) }}<end_function_call>
{%- endfor -%}
{{ "<end_of_turn>\\n" if not message.tool_calls }}
{%- endif -%}
{%- endfor -%}
{{ "<start_of_turn>model\\n" if add_generation_prompt and messages[-1].role != "tool" }}
"""


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


TEXT, WHOLE = {"type": "string"}, {"type": "integer", "minimum": -5, "maximum": 500}
SHAPES: dict[str, dict[str, Any]] = {
    "nothing": _object([]),
    "one text": _object(["city"], city=TEXT),
    "optional": _object([], city=TEXT, days=WHOLE),
    "one of them": _object(["days"], city=TEXT, days=WHOLE, exact={"type": "boolean"}),
    "numbers": _object(["amount", "count"], amount={"type": "number", "minimum": 0, "maximum": 9}, count=WHOLE),
    "choice": _object(["unit"], unit={"type": "string", "enum": ["celsius", "fahrenheit"]}),
    "choice of anything": _object(["level"], level={"enum": ["low", 3, None, True]}),
    "nothing or text": _object(["note"], note={"type": ["string", "null"]}),
    "either": _object(["when"], when={"anyOf": [WHOLE, {"const": "now"}]}),
    "list": _object(["names"], names={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3}),
    "list of objects": _object(["lines"], lines={"type": "array", "items": _object(["sku"], sku=TEXT, n=WHOLE), "maxItems": 2}),
    "object in object": _object(["at"], at=_object(["street"], street=TEXT, number=WHOLE)),
    "pattern": _object(["zip"], zip={"type": "string", "pattern": "^[0-9]{5}$"}),
    "long text": _object(["text"], text={"type": "string", "minLength": 12, "maxLength": 40}),
    "map": _object(["prices"], prices={"type": "object", "additionalProperties": WHOLE}),
    "recursive": {
        "$defs": {"node": {"type": "object", "properties": {"v": WHOLE, "w": {"$ref": "#/$defs/node"}}, "required": ["v"]}},
        **_object(["node"], node={"$ref": "#/$defs/node"}),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The demo's, in which FunctionGemma's tokens take the places of the last pieces."""
    folder = tmp_path_factory.mktemp("function")
    data = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    for id, name in enumerate((*TOKENS, "<escape>"), 4096 - 7):
        (piece,) = [piece for piece, number in vocabulary.items() if number == id]
        del vocabulary[piece]
        vocabulary[name] = id
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in data["model"]["merges"]]
        data["model"]["merges"] = [merge for merge in merges if piece not in (*merge, "".join(merge))]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        data["added_tokens"].append({"id": id, "content": name, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return Tokenizer.of_folder(folder, toy_manifest().config)


def session(tokenizer: Tokenizer, *tools: Tool, seed: int = 0, **choices: Any) -> Session:
    sampling = SamplingParams(temperature=[0.5, 1, 5][seed % 3], seed=seed)
    chosen = {"max_tokens": 150, "tools": tools, "tool_choice": "required", "sampling": sampling, **choices}
    return Session(ToyRuntime(), tokenizer, ChatTemplate(TEMPLATE, {"bos_token": "<bos>"}), GenerationOptions(**chosen))


def test_the_template_tells_the_form(tokenizer: Tokenizer) -> None:
    assert isinstance(form_of(ChatTemplate(TEMPLATE, {}), tokenizer), FunctionGemma)
    assert isinstance(form_of(ChatTemplate.from_bundle(DEMO), tokenizer), JsonCalls)
    assert tokenizer.id_of("<start_function_response>") in tokenizer.stop_ids


@pytest.mark.parametrize("shape", SHAPES)
def test_every_call_parses_and_fits(shape: str, tokenizer: Tokenizer) -> None:
    tools = (Tool("do_it", "", SHAPES[shape]), Tool("other", "", SHAPES["one text"]))
    with pytest.raises(InputError, match=r"too short for these tools; allow at least \d+") as refused:
        session(tokenizer, *tools, tool_choice="do_it", max_tokens=1).send("Do it.")
    least = int(str(refused.value).split()[-1])
    for seed, spare in enumerate((0, 2, 9, 60)):
        chat = session(tokenizer, *tools, seed=seed, tool_choice="do_it", max_tokens=least + spare)
        assert "".join(chat.send("Do it.")) == "" and chat.usage.finish in (STOP, LENGTH)
        (call,) = chat.calls
        assert call.name == "do_it"
        jsonschema.validate(call.arguments, SHAPES[shape])


def test_several_calls_and_their_results_in_one_turn_of_the_model(tokenizer: Tokenizer) -> None:
    for seed in range(9):
        chat = session(tokenizer, Tool("a"), Tool("b", "", SHAPES["choice"]), seed=seed, max_tokens=200)
        list(chat.send("Do it."))
        if len(chat.calls) > 1:
            break
    assert len(chat.calls) > 1
    results = [{"degrees": 31}, *["dry"] * (len(chat.calls) - 1)]
    list(chat.reply(results, GenerationOptions(max_tokens=4)))
    text = chat.tokenizer.decode(chat.ids)
    written = text.index("<start_function_call>call:")
    assert "<end_function_call><start_function_response>response:" in text[written:]
    assert "{degrees:31}<end_function_response>" in text and "{result:<escape>dry<escape>}" in text
    assert chat.runtime.resets == 0, "nothing was fed twice"  # type: ignore[attr-defined]


def test_an_answer_may_be_text(tokenizer: Tokenizer) -> None:
    texts = [
        "".join(session(tokenizer, Tool("a"), seed=seed, tool_choice="auto", max_tokens=9).send("Hi."))
        for seed in range(4)
    ]
    assert any(texts) and not any(text.lstrip().startswith("<start_function_call>") for text in texts)


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "format"),
        ({"properties": {"a": {}}}, "a value without a type"),
        ({"properties": {"a:b": TEXT}}, "the key 'a:b'"),
        ({"properties": {}, "required": ["x"]}, "the key 'x'"),
        ({"properties": {"a": {"oneOf": [TEXT]}}}, "a value without a type"),
        ({"properties": {"a": {"enum": [[1]]}}}, "the value [1]"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "$ref #/$defs/none"),
        ({"minProperties": 1}, "minProperties"),
    ],
    ids=str,
)
def test_what_this_form_cannot_follow_is_refused_by_name(
    schema: dict[str, Any], what: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError) as refused:
        session(tokenizer, Tool("do_it", "", schema)).send("Do it.")
    assert str(refused.value) == f"tool do_it: FunctionGemma's form cannot follow {what} in its parameters"


def test_a_tokenizer_without_the_tokens_is_refused() -> None:
    chat = Session(
        ToyRuntime(), Tokenizer(DEMO, toy_manifest()), ChatTemplate(TEMPLATE, {}), GenerationOptions(max_tokens=50)
    )
    with pytest.raises(InputError, match="writes <start_function_call>, which is no token of its tokenizer"):
        chat.send("Do it.", GenerationOptions(tools=(Tool("a"),)))
    assert "".join(chat.send("Hello.", GenerationOptions(max_tokens=3)))


WRITTEN = "{a:<escape>b,}:<escape>,c:[1,-2.5e3,true,null,[]],d:{e:<escape><escape>}}"
MEANT: dict[str, Any] = {"a": "b,}:", "c": [1, -2500.0, True, None, []], "d": {"e": ""}}


@pytest.mark.parametrize(("text", "value"), [("{}", {}), (WRITTEN, MEANT)])
def test_values_are_read_as_they_are_written(text: str, value: object) -> None:
    assert Values(text).read() == value
    with pytest.raises(ValueError):
        Values(text[:-1]).read()
