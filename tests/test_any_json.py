"""Whatever JSON holds, every reader takes it or refuses it in one line. Hypothesis makes the values and shrinks what fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from campaigns.campaign import seed_of_today
from campaigns.server_requests import FIELDS
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from support.checkpoints import DEMO
from support.toys import toy_manifest, write_toy_bundle

from gemma_edge.bundle.manifest import MANIFEST, Manifest
from gemma_edge.errors import InputError
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.lora import Lora
from gemma_edge.quantize.recipe import Recipe
from gemma_edge.reading import parse_json
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.serve.openai import Model, ParsedRequest
from gemma_edge.runtimes.tools.forms import form_of
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner), max_leaves=12
)
RECIPE = {
    "name": "mine",
    "rules": [{"pattern": ".*", "config": {"bits": 8, "group_size": 0, "symmetric": True}, "method": "rtn"}],
}


def fuzzed(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with many values, other ones every day."""
    limits = settings(max_examples=150, deadline=None, database=None, print_blob=True)
    result: Callable[..., None] = seed(seed_of_today())(limits(test))
    return result


def with_value(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with another value at one place."""
    if not place:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[place[0]] = with_value(copy[place[0]], place[1:], value)
    return copy


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, below in inner for place in places(below, (*at, key)))]


def taken_or_refused(read: Callable[[], object]) -> None:
    """Call a reader; an InputError of one line is fine."""
    try:
        read()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)


@fuzzed
@given(st.binary(max_size=200))
def test_bytes_are_json_or_an_error_of_values(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    assert json.dumps(value) == json.dumps(json.loads(data))


@fuzzed
@given(JSON)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    written = json.dumps(value, allow_nan=True)
    assert json.dumps(parse_json(written.encode())) == written


CONFIG = json.loads((DEMO / "config.json").read_text())


@fuzzed
@given(st.sampled_from(sorted({*CONFIG, "rope_parameters", "rope_scaling", "layer_types", "attention_bias"})), JSON)
def test_any_value_of_a_model_s_config(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    taken_or_refused(lambda: GemmaConfig.from_hf(folder))


@fuzzed
@given(st.data())
def test_any_value_of_a_manifest(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    manifest = json.loads(toy_manifest().to_json())
    place = data.draw(st.sampled_from(places(manifest)))
    folder = tmp_path_factory.mktemp("bundle")
    (folder / MANIFEST).write_text(json.dumps(with_value(manifest, place, data.draw(JSON))))
    taken_or_refused(lambda: Manifest.load(folder))


@fuzzed
@given(st.data())
def test_any_value_of_a_recipe(data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(places(RECIPE)))
    taken_or_refused(lambda: Recipe.from_json(with_value(RECIPE, place, data.draw(JSON)), "the recipe"))


@fuzzed
@given(
    st.sampled_from(["r", "lora_alpha", "bias", "target_modules", "alpha_pattern", "rank_pattern", "use_rslora", "x"]),
    JSON,
)
def test_any_value_of_an_adapter(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, key: value}))
    taken_or_refused(lambda: Lora.open(folder, {"layers.0.self_attn.q_proj": (4, 4)}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    bundle = write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")
    manifest = Manifest.load(bundle)
    template = ChatTemplate.from_bundle(bundle)
    tokenizer = Tokenizer(bundle, manifest)
    return Model(tokenizer, template, form_of(template, tokenizer), manifest.config.vocab_size, 64)


@fuzzed
@given(chat=st.booleans(), fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_request(model: Model, chat: bool, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    defaults = GenerationOptions()
    taken_or_refused(lambda: ParsedRequest.parse({**body, **fields}, chat=chat, defaults=defaults, model=model))
