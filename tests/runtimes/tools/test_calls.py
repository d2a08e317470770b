"""Calls of tools: models that babble write calls that parse and fit, in every backend, with hardly any tokens left."""

from __future__ import annotations

from typing import Any

import pytest
from support.checkpoints import DEMO
from support.toys import ToyRuntime, toy_manifest

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

import jsonschema

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import LENGTH, STOP, GenerationOptions, GenerationState, generate
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.text_generator import TextGenerator
from gemma_edge.runtimes.tools.form import AnswerReader
from gemma_edge.runtimes.tools.json_calls import JsonCalls
from gemma_edge.runtimes.tools.tool import Call, CallPart, Tool
from gemma_edge.text.tokenizer import Tokenizer


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required}


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
# SHAPES: twenty shapes of the arguments that a tool may take
SHAPES: dict[str, dict[str, Any]] = {
    "nothing": {"type": "object", "properties": {}},
    "one text": _object(city=TEXT),
    "two texts": _object(city=TEXT, country=TEXT),
    "optional": _object([], city=TEXT, days=WHOLE),
    "one of them": _object(["city"], city=TEXT, days=WHOLE, exact={"type": "boolean"}),
    "whole number": _object(count=WHOLE),
    "bounded number": _object(percent={"type": "integer", "minimum": 0, "maximum": 100}),
    "number": _object(amount={"type": "number", "minimum": -0.5, "maximum": 12}),
    "yes or no": _object(on={"type": "boolean"}),
    "choice": _object(unit={"type": "string", "enum": ["celsius", "fahrenheit"]}),
    "choice of anything": _object(level={"enum": ["low", 3, None, True]}),
    "constant": _object(kind={"const": "invoice"}, id=WHOLE),
    "nothing or text": _object(note={"type": ["string", "null"]}),
    "either": _object(when={"anyOf": [WHOLE, {"type": "string", "enum": ["now", "later"]}, {"type": "null"}]}),
    "list": _object(names={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4}),
    "list of objects": _object(lines={"type": "array", "items": _object(sku=TEXT, count=WHOLE), "maxItems": 3}),
    "object in object": _object(address=_object(street=TEXT, number=WHOLE), name=TEXT),
    "pattern": _object(zip={"type": "string", "pattern": "^[0-9]{5}$"}),
    "long text": _object(text={"type": "string", "minLength": 12, "maxLength": 40}),
    "recursive": {
        "$defs": {"node": {**_object(["value"], value=WHOLE), "additionalProperties": False}},
        **_object(["node"], node={"$ref": "#/$defs/node"}),
    },
}
SHAPES["recursive"]["$defs"]["node"]["properties"] = {"value": WHOLE, "next": {"$ref": "#/$defs/node"}}
assert len(SHAPES) == 20

FORM = JsonCalls()
OTHER = Tool("other", "Another tool.", SHAPES["one text"])


@pytest.fixture(scope="module")
def toy() -> TextGenerator:
    return TextGenerator(ToyRuntime(), Tokenizer(DEMO, toy_manifest()), form=FORM)


def options(*tools: Tool, seed: int | None = None, **choices: Any) -> GenerationOptions:
    sampling = SamplingParams() if seed is None else SamplingParams(temperature=[0.5, 1, 5][seed % 3], seed=seed)
    return GenerationOptions(**{"max_tokens": 200, "tools": tools, "sampling": sampling, **choices})


def answered(generator: TextGenerator, chosen: GenerationOptions) -> tuple[str, str, AnswerReader, str]:
    """The answer to a short prompt: all that was written, its text, its reader, and why it ended."""
    generator.runtime.reset()
    reader, state, raw, text = FORM.reader(chosen), GenerationState(Sampler(chosen.sampling)), "", ""
    parts: list[str | CallPart] = []
    for piece in generator.answer([2, 50, 60], chosen, state):
        raw += piece
        parts += reader.feed(piece)
    parts += reader.end()
    text = "".join(part for part in parts if isinstance(part, str))
    for at, call in enumerate(reader.calls):
        own = [part for part in parts if isinstance(part, CallPart) and part.index == at]
        assert [part.name for part in own] == [call.name] + [""] * (len(own) - 1) and own[0].id == call.id
    return raw, text, reader, state.usage.finish


def shortest(generator: TextGenerator, chosen: GenerationOptions) -> int:
    """Tokens of the shortest answer that the grammar knows of."""
    grammar = generator.grammar(chosen)
    assert grammar
    with pytest.raises(InputError, match=r"too short for these tools; allow at least \d+") as refused:
        grammar.begin(0)
    return int(str(refused.value).split()[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_in_every_backend_a_call_parses_and_fits(shape: str, talker: Runtime) -> None:
    generator = TextGenerator(talker, Tokenizer(talker.bundle, talker.manifest), form=FORM)
    _, text, reader, _ = answered(
        generator, options(Tool("do_it", "", SHAPES[shape]), tool_choice="do_it", max_tokens=90)
    )
    (call,) = reader.calls
    assert call.name == "do_it" and text == ""
    jsonschema.validate(call.arguments, SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_fits_however_few_tokens_there_are(shape: str, toy: TextGenerator) -> None:
    tools = (Tool("do_it", "", SHAPES[shape]), OTHER)
    least, names = shortest(toy, options(*tools, tool_choice="required")), set()
    for seed, spare in enumerate((0, 1, 3, 12, 60)):
        chosen = options(*tools, seed=seed, tool_choice="required", max_tokens=least + spare)
        raw, text, reader, finish = answered(toy, chosen)
        assert reader.calls and text == "" and finish in (STOP, LENGTH), raw
        for call in reader.calls:
            jsonschema.validate(call.arguments, SHAPES[shape] if call.name == "do_it" else OTHER.parameters)
            names.add(call.name)
    assert names <= {"do_it", "other"}


def test_an_answer_is_text_or_calls(toy: TextGenerator) -> None:
    """With tools a model may still speak; but whatever begins like a call is one."""
    kinds = set()
    for seed in range(12):
        _, text, reader, _ = answered(toy, options(OTHER, seed=seed, max_tokens=30))
        assert bool(text) != bool(reader.calls) or not text
        kinds.add(bool(reader.calls))
        assert not text.lstrip().startswith(("[", "{", "```json", "```tool_code"))
    for seed in range(6):
        _, text, reader, _ = answered(toy, options(OTHER, seed=seed, tool_choice="none", max_tokens=30))
        assert not reader.calls and not text.lstrip().startswith("[")
    assert False in kinds


def test_several_calls_only_where_they_are_allowed(toy: TextGenerator) -> None:
    counts = {True: set[int](), False: set[int]()}
    for parallel, found in counts.items():
        for seed in range(12):
            chosen = options(
                Tool("a"), Tool("b"), seed=seed, tool_choice="required", parallel_calls=parallel, max_tokens=300
            )
            calls = answered(toy, chosen)[2].calls
            found.add(len(calls))
            assert len({call.id for call in calls}) == len(calls)
    assert counts[False] == {1} and max(counts[True]) > 1


def test_a_named_tool_is_the_one_that_is_called(toy: TextGenerator) -> None:
    for seed in range(4):
        chosen = options(Tool("a"), Tool("b"), seed=seed, tool_choice="b")
        assert [call.name for call in answered(toy, chosen)[2].calls] == ["b"]


def test_arguments_that_a_tool_does_not_name_are_not_invented(toy: TextGenerator) -> None:
    for seed in range(4):
        chosen = options(Tool("a", "", SHAPES["optional"]), seed=seed, tool_choice="a")
        assert set(answered(toy, chosen)[2].calls[0].arguments) <= {"city", "days"}


def test_with_a_schema_an_answer_is_a_call_or_fits_it(toy: TextGenerator) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}
    for seed in range(6):
        raw, text, reader, _ = answered(toy, options(OTHER, seed=seed, json_schema=schema))
        assert (text == raw) != bool(reader.calls)
        if text:
            import json

            jsonschema.validate(json.loads(text), schema)


CALLS = '[{"name":"a","parameters":{"x":"} \\" [ \\\\","y":[{"z":{}}]}},{"name":"b","parameters":{}}]'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", " \n```tool_code\n{}\n```"])
def test_calls_are_read_however_the_pieces_fall(size: int, fence: str) -> None:
    text = fence.format(CALLS)
    reader, parts = FORM.reader(options(Tool("a"), Tool("b"))), list[str | CallPart]()
    for at in range(0, len(text), size):
        parts += reader.feed(text[at : at + size])
    parts += reader.end()
    first, second = reader.calls
    assert first.arguments == {"x": '} " [ \\', "y": [{"z": {}}]} and (second.name, second.arguments) == ("b", {})
    assert not any(isinstance(part, str) for part in parts)
    written = ["".join(p.arguments for p in parts if isinstance(p, CallPart) and p.index == at) for at in (0, 1)]
    assert written == ['{"x":"} \\" [ \\\\","y":[{"z":{}}]}', "{}"]


@pytest.mark.parametrize("text", ["Hello [1].", "``", "", "  ", "`code`", "```python\n[1]\n```"])
def test_text_is_passed_on_whole(text: str) -> None:
    reader = FORM.reader(options(Tool("a")))
    parts = [part for character in text for part in reader.feed(character)] + reader.end()
    assert parts == [part for part in parts if isinstance(part, str)]
    assert "".join(map(str, parts)) == text and reader.calls == ()


def test_a_call_that_was_cut_off_is_not_one() -> None:
    reader = FORM.reader(options(Tool("a")))
    reader.feed(CALLS[: CALLS.index('"z"')])
    assert reader.calls == ()
    assert Call.of_json(Call("a", {"b": 1}, "c").as_json()) == Call("a", {"b": 1}, "c")


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([("a b", {})], "auto", "a tool cannot be called 'a b'; a name has 1 to 64 letters"),
        ([("none", {})], "auto", "a tool cannot be called 'none'"),
        ([("a", {"type": "array"})], "auto", "the parameters of tool a are not a JSON schema of type object"),
        ([("a", {}), ("a", {})], "auto", "two tools are called a; give each a name of its own"),
        ([("a", {})], "b", "tool_choice b; supported: auto, none, required, a"),
        ([], "required", "tool_choice required has no effect without tools"),
    ],
)
def test_wrong_tools_are_refused(tools: list[tuple[str, Any]], choice: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(*(Tool(name, "", schema) for name, schema in tools), tool_choice=choice)


def test_a_schema_that_cannot_be_followed_names_its_tool(toy: TextGenerator) -> None:
    with pytest.raises(InputError, match="tool a: the JSON schema cannot be followed") as refused:
        toy.grammar(options(Tool("a", "", {"properties": {"x": {"not": {}}}})))
    assert refused.value.field == "tools" and "\n" not in str(refused.value)


def test_tokens_alone_have_no_tools() -> None:
    with pytest.raises(InputError, match="generate does not handle `?tools`?; use Session or TextGenerator"):
        generate(ToyRuntime(), [2], options(OTHER))
    with pytest.raises(InputError, match="tools needs a chat"):
        TextGenerator(ToyRuntime(), Tokenizer(DEMO, toy_manifest())).answer([2], options(OTHER))
