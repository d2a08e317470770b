"""JSON schemas as a grammar of FunctionGemma's calls, in which keys are bare and texts stand between two ESCAPE."""

from __future__ import annotations

import json
import re
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.constrain import embedded
from gemma_edge.runtimes.tools.tool import Tool, compact

# Tokens of their own; in Lark's notation a name in angle brackets stands for such a token.
CALL, CALL_END, ESCAPE = "<start_function_call>", "<end_function_call>", "<escape>"
KEY = re.compile(r"[A-Za-z0-9_-]+")
# keywords that change no value; those that a type heeds
NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "$schema",
    "$id",
    "$defs",
    "definitions",
    "nullable",
}
HEEDED = {
    "string": {"minLength", "maxLength", "pattern"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set[str](),
    "null": set[str](),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
WORDS = {"boolean": '("true" | "false")', "null": '"null"'}


def arguments_rules(tool: Tool, prefix: str) -> tuple[str, list[str]]:
    """The rule of a tool's arguments, and the lines of the rules that it needs; their names begin with `prefix`.

    Raises:
        InputError: its schema has what this form cannot follow.
    """
    grammar = _Grammar(tool, prefix)
    return grammar.rule({"type": "object", **tool.parameters}), grammar.lines


class _Grammar:
    """The rules of one tool."""

    def __init__(self, tool: Tool, prefix: str) -> None:
        self._tool, self._prefix = tool, prefix
        self._references: dict[str, str] = {}
        self.lines: list[str] = []

    def rule(self, schema: Any) -> str:
        """The name of a rule, or an expression, of the values that fit a schema."""
        if not isinstance(schema, dict):
            raise self._refusal("a schema that is no object")
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]))
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return f"({' | '.join(self._literal(value) for value in values)})"
        if "anyOf" in schema:
            return f"({' | '.join(map(self.rule, schema['anyOf']))})"
        kinds = schema.get("type")
        if isinstance(kinds, list):
            return f"({' | '.join(self.rule(self._only(schema, kind)) for kind in kinds)})"
        if kinds not in HEEDED:
            raise self._refusal("a value without a type" if kinds is None else f"type {kinds}")
        if unknown := set(schema) - NOTES - HEEDED[kinds] - {"type"}:
            raise self._refusal(min(unknown))
        return WORDS.get(kinds) or {
            "string": self._string, "integer": self._number, "number": self._number, "array": self._array,
            "object": self._object,
        }[kinds](schema)  # fmt: skip

    def _only(self, schema: dict[str, Any], kind: Any) -> dict[str, Any]:
        others = set().union(*HEEDED.values()) - HEEDED.get(kind, set())
        return {key: value for key, value in schema.items() if key not in others} | {"type": kind}

    def _new(self, expression: str, *, terminal: bool = False) -> str:
        name = f"{self._prefix}_{len(self.lines)}"
        name = name.upper() if terminal else name
        self.lines.append(f"{name}: {expression}")
        return name

    def _reference(self, pointer: str) -> str:
        if pointer not in self._references:
            target: Any = self._tool.parameters
            for part in pointer.removeprefix("#/").split("/"):
                target = target.get(part) if isinstance(target, dict) else None
            if not pointer.startswith("#/") or target is None:
                raise self._refusal(f"$ref {pointer}")
            self._references[pointer] = f"{self._prefix}_r{len(self._references)}"
            self.lines.append(f"{self._references[pointer]}: {self.rule(target)}")
        return self._references[pointer]

    def _literal(self, value: Any) -> str:
        if isinstance(value, (dict, list)) or (isinstance(value, str) and ESCAPE in value):
            raise self._refusal(f"the value {compact(value)}")
        if not isinstance(value, str):
            return json.dumps(compact(value))
        return f"({ESCAPE} {json.dumps(value, ensure_ascii=False)} {ESCAPE})" if value else f"({ESCAPE} {ESCAPE})"

    def _string(self, schema: dict[str, Any]) -> str:
        longest = schema.get("maxLength", "")
        content = rf"/(.|\n){{{schema.get('minLength', 0)},{longest}}}/ & ~/(.|\n)*{ESCAPE}(.|\n)*/"
        if pattern := schema.get("pattern"):
            before, after = (
                ("" if pattern.startswith("^") else r"(.|\n)*"),
                ("" if pattern.endswith("$") else r"(.|\n)*"),
            )
            inner = pattern.removeprefix("^").removesuffix("$").replace("/", r"\/")
            content += f" & /{before}({inner}){after}/"
        return f"({ESCAPE} {self._new(content, terminal=True)} {ESCAPE})"

    def _number(self, schema: dict[str, Any]) -> str:
        return self._new(embedded({key: value for key, value in schema.items() if key not in NOTES}))

    def _array(self, schema: dict[str, Any]) -> str:
        item = self.rule(schema["items"]) if "items" in schema else self._string({})
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return self._new('"[" "]"')
        more = f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        return self._new(f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"')

    def _object(self, schema: dict[str, Any]) -> str:
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        others = schema.get("additionalProperties")
        if wrong := [key for key in (*properties, *required) if not KEY.fullmatch(key) or key not in properties]:
            raise self._refusal(f"the key {wrong[0]!r}")
        if not properties and isinstance(others, dict):
            key, value = self._new("/[A-Za-z_][A-Za-z0-9_]{0,40}/", terminal=True), self.rule(others)
            return self._new(f'"{{" ({key} ":" {value} ("," {key} ":" {value})*)? "}}"')
        order = sorted(properties, key=str.lower)  # as the template writes them
        members = [f'"{key}:" {self.rule(properties[key])}' for key in order]
        rests = [f'("," {member}){"" if key in required else "?"}' for key, member in zip(order, members, strict=True)]
        firsts = []  # whichever key is there first
        for at, key in enumerate(order):
            firsts.append(" ".join([members[at], *rests[at + 1 :]]))
            if key in required:
                break
        if not firsts:
            return self._new('"{" "}"')
        return self._new(f'"{{" ({" | ".join(firsts)}){"" if required else "?"} "}}"')

    def _refusal(self, what: str) -> InputError:
        return InputError(
            f"tool {self._tool.name}: FunctionGemma's form cannot follow {what} in its parameters",
            field="tools",
            value=self._tool.name,
        )
