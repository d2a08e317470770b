"""JSON to dataclasses. A value that does not fit is an error that names its key: `backends.onnx.cache.layers[3].slots`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn, TypeVar

import msgspec

from gemma_edge.errors import InputError
from gemma_edge.reading import parse_json

T = TypeVar("T")
Key = str | int

HINT = "export the bundle again"
MAX_SHOWN = 40  # characters of a value in a message
_MESSAGE = re.compile(r"(?P<problem>.*?)(?: - at `(?P<path>\$[^`]*)`)?", re.DOTALL)
_SEGMENT = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}


class KeyProblem(Exception):
    """One key of a manifest, or of another JSON file, is not what it should be."""

    def __init__(self, keys: Sequence[Key], value: object, expected: str, *, missing: bool = False) -> None:
        """Make it.

        Args:
            keys: the way to the key, from the outside in.
            value: what stands there.
            expected: what should stand there, as the end of "it must be ...".
            missing: whether the key is not there at all.
        """
        super().__init__(expected)
        self.keys, self.value, self.expected, self.missing = tuple(keys), value, expected, missing

    def error(self, file: object, hint: str = HINT) -> InputError:
        """The error for the user.

        Args:
            file: where the key stands.
            hint: what to do.
        """
        key = key_path(self.keys) or "the whole file"
        problem = f"{key} is missing" if self.missing else f"{key} is {shown(self.value)}"
        must = "" if self.missing else f"it must be {self.expected}; "
        return InputError(f"{file}: {problem}", field=key, value=self.value, hint=f"{must}{hint}")


def key_path(keys: Sequence[Key]) -> str:
    """A key's path as it is shown: backends.onnx.cache.layers[3].slots."""
    return "".join(map(_segment, keys)).removeprefix(".")


def _segment(key: Key) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    return f".{key}" if re.fullmatch(r"[\w-]{1,64}", key, re.ASCII) else f"[{shown(key)}]"


def shown(value: object) -> str:
    """A value for a message: its JSON, shortened and in one line of ASCII."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value).replace("`", "'")
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


@contextmanager
def damage_named(path: object, hint: str = HINT) -> Iterator[None]:
    """Turn what `parse` and `convert` raise in the block into the error for the user, which names the file.

    Raises:
        InputError: in their place.
    """
    try:
        yield
    except KeyProblem as problem:
        raise problem.error(path, hint) from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {hint}") from None


def text_of(value: Any) -> str:
    """A dataclass as the text of a JSON file."""
    return msgspec.json.format(msgspec.json.encode(asdict(value)), indent=1).decode() + "\n"


def parse(text: bytes) -> Any:
    """Plain values from JSON.

    Raises:
        ValueError: it is not JSON in UTF-8, or it is nested too deeply.
        KeyProblem: a key stands twice, a number is not finite, or a text is no Unicode.
    """
    data = parse_json(text, _unique)
    for problem in _odd_values(data, ()):
        raise problem
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {shown(name)} stands twice in one object")
        result[name] = value
    return result


def typed_value(value: Any, kind: type[T], file: object, hint: str, keys: Sequence[Key] = ()) -> T:
    """`convert` for a value of the user's: of a file, under some keys.

    Raises:
        InputError: names the file, the key and the value, and ends with the hint.
    """
    try:
        return convert(value, kind, keys)
    except KeyProblem as problem:
        raise problem.error(file, hint) from None


def _odd_values(value: Any, keys: tuple[Key, ...]) -> Iterator[KeyProblem]:
    """Values that Python's reader lets through and JSON does not know."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _odd_values(key, keys)
            yield from _odd_values(inner, (*keys, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _odd_values(inner, (*keys, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield KeyProblem(keys, value, "a finite number")
    elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        yield KeyProblem(keys, value, "text without lone surrogates")


def convert(data: Any, kind: type[T], at: Sequence[Key] = ()) -> T:
    """A dataclass from plain values.

    Args:
        data: what `parse` returns, or dictionaries and lists made in Python.
        kind: a dataclass.
        at: the keys that lead to `data`, for the message.

    Raises:
        KeyProblem: a key is missing, or its value has another type or is out of range.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        _raise_problem(data, kind, str(error), tuple(at))


def _raise_problem(data: Any, kind: Any, message: str, at: tuple[Key, ...]) -> NoReturn:
    """Turn msgspec's message into a KeyProblem."""
    match = _MESSAGE.fullmatch(message)
    assert match is not None, "the pattern takes any text"
    keys = _locate(data, kind, message, match["path"] or "$")
    if missing := _MISSING.fullmatch(match["problem"]):
        raise KeyProblem((*at, *keys, missing[1]), None, "there", missing=True)
    raise KeyProblem((*at, *keys), _get(data, keys), _expected(match["problem"], kind, keys))


def _locate(data: Any, kind: Any, message: str, path: str) -> tuple[Key, ...]:
    """The keys of a path in which msgspec writes [...] for every key of a mapping."""
    keys: tuple[Key, ...] = ()
    for name, index in _SEGMENT.findall(path):
        if index == "...":
            mapping = _get(data, keys)
            culprit = next((key for key in mapping if _fails_alone(data, keys, key, kind, message)), None)
            if culprit is None:
                return keys
            keys += (culprit,)
        else:
            keys += (name or int(index),)
    return keys


def _fails_alone(data: Any, keys: tuple[Key, ...], key: str, kind: Any, message: str) -> bool:
    """Whether the same error comes up when the mapping at `keys` holds nothing but `key`."""
    alone = {key: _get(data, keys)[key]}
    try:
        msgspec.convert(_replaced(data, keys, alone), kind)
    except msgspec.ValidationError as error:
        return str(error) == message
    return False


def _get(data: Any, keys: Sequence[Key]) -> Any:
    for key in keys:
        data = data[key]
    return data


def _replaced(data: Any, keys: Sequence[Key], value: Any) -> Any:
    """A copy in which something else stands at `keys`; what lies beside it is shared."""
    if not keys:
        return value
    copy = data.copy()
    copy[keys[0]] = _replaced(data[keys[0]], keys[1:], value)
    return copy


def _expected(problem: str, kind: Any, keys: Sequence[Key]) -> str:
    """What should stand at a key, in words."""
    if problem.startswith("Invalid enum value"):
        return f"one of {', '.join(shown(value) for value in _choices(kind, keys))}"
    expected = problem.removeprefix("Expected ").partition(", got ")[0]
    return re.sub(r"`([^`]*)`", lambda match: " or ".join(map(_word, match[1].split(" | "))), expected)


def _word(kind: str) -> str:
    return _WORDS.get(kind, kind)


def _choices(kind: Any, keys: Sequence[Key]) -> list[Any]:
    """The values that an enumeration allows, from the JSON Schema."""
    schema = msgspec.json.schema(kind)
    definitions = schema.get("$defs", {})
    nodes = list(_flat(schema, definitions))
    for key in keys:
        nodes = [flat for node in nodes for inner in _inner(node, key) for flat in _flat(inner, definitions)]
    return [value for node in nodes for value in node.get("enum", ())]


def _flat(node: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema's alternatives, references followed."""
    if "$ref" in node:
        yield from _flat(definitions[node["$ref"].rpartition("/")[2]], definitions)
    elif "anyOf" in node:
        for inner in node["anyOf"]:
            yield from _flat(inner, definitions)
    else:
        yield node


def _inner(node: dict[str, Any], key: Key) -> Iterator[dict[str, Any]]:
    """The schema of what stands under a key."""
    result = node.get("items") if isinstance(key, int) else node.get("properties", {}).get(key)
    result = result or node.get("additionalProperties")
    if isinstance(result, dict):
        yield result
