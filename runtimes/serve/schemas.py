"""The JSON schema that a request asks for, in OpenAI's spelling and in those of other servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from gemma_edge.errors import InputError, one_line
from gemma_edge.reading import parse_json
from gemma_edge.runtimes.generation.constrain import ANY_OBJECT, check_schema
from gemma_edge.runtimes.serve.fields import get, refuse_unsupported
from gemma_edge.runtimes.serve.refused import shown

MAX_SCHEMA_CHARS = 1 << 16  # of the schema's JSON
FORMATS = ("text", "json_object", "json_schema")  # values of response_format.type
# vLLM's kinds of structure besides "json", and their values that change nothing
OTHER_STRUCTURES: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("regex", "choice", "grammar", "structural_tag", "json_object"), (False,)
)


def _of_format(body: Mapping[str, Any]) -> Any:
    """OpenAI's `response_format`; `json_object` may bring a schema, as llama.cpp's server and others have it."""
    form = get(body, "response_format", dict, {})
    kind = form.get("type")
    if kind not in FORMATS:
        raise InputError(
            f"response_format.type {shown(kind)} is not supported", field="response_format", value=kind, allowed=FORMATS
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT if form.get("schema") is None else form["schema"]
    schema = get(form, "json_schema", dict, {}).get("schema")
    if schema is None:
        raise InputError("response_format.json_schema.schema is missing", field="response_format")
    return schema


def _of_structure(body: Mapping[str, Any]) -> Any:
    """vLLM's `structured_outputs`."""
    form = get(body, "structured_outputs", dict, {})
    refuse_unsupported(form, OTHER_STRUCTURES)
    return form.get("json")


# field -> the schema that a request holds in it; None if any text will do
SPELLINGS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "response_format": _of_format,
    "json_schema": itemgetter("json_schema"),  # llama.cpp's server
    "guided_json": itemgetter("guided_json"),  # vLLM, before structured_outputs
    "structured_outputs": _of_structure,
}


def schema_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that the answer must fit, or None if any text will do.

    Raises:
        InputError: the request holds two schemas, an unknown type, or a schema that cannot be followed.
    """
    schemas = {name: read(body) for name, read in SPELLINGS.items() if body.get(name) is not None}
    schemas = {name: schema for name, schema in schemas.items() if schema is not None}
    if len(schemas) > 1:
        raise InputError(f"{' and '.join(schemas)} both hold a schema; leave one of them out", field=list(schemas)[-1])
    for name, schema in schemas.items():
        if isinstance(schema, str):
            schema = _parsed(name, schema)
        if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
            raise InputError(f"the JSON schema is longer than {MAX_SCHEMA_CHARS} characters", field=name)
        check_schema(schema)
        return dict(schema)
    return None


def _parsed(name: str, text: str) -> Any:
    try:
        return parse_json(text.encode())
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {one_line(error)}", field=name) from None
