"""Where a stranger's chat template runs: jinja's sandbox, with limits for the steps and sizes of each rendering.

jinja's own sandbox bounds neither: `{% for %}` in `{% for %}` runs for years, and `'a' * 10 ** 10` takes all memory. Here every
round of a loop, call, filter, operator and comparison counts, and so does the size of what it may make. Both limits grow with the
conversation. Source of the functions: transformers/utils/chat_template_utils.py, `_cached_compile_jinja_template`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000  # steps of a rendering, and 10 more for each character of the conversation
MAX_SIZE = 1_000_000  # characters or items of one value, and 100 more for each character of the conversation
SIZE_OF_STEP = 100  # characters or items that cost as much as a step
MAX_BITS = 4096  # of an integer
ROUNDS, JOINED, CHECKED = "_rounds", "_joined", "_checked"  # names of filters; a template's own cannot begin with _
CONTAINERS = (str, bytes, list, tuple, dict, range)
_WIDTH = re.compile(r"\d{5,}")  # in a format: how wide its result is


class TemplateRefusal(jinja2.TemplateError):
    """The template itself called raise_exception."""


class _Budget:
    """What is left of a rendering's limits."""

    def __init__(self, size: int) -> None:
        self.steps, self.size = MAX_STEPS + 10 * size, MAX_SIZE + 100 * size

    def spend(self, size: int = 0) -> None:
        """One step, which may make a value of this size."""
        self.steps -= 1 + size // SIZE_OF_STEP
        if size > self.size:
            raise jinja2.TemplateRuntimeError(f"a value has more than {self.size} characters or items")
        if self.steps < 0:
            raise jinja2.TemplateRuntimeError("it takes too many steps")


_budget: ContextVar[_Budget] = ContextVar("_budget")


@contextmanager
def limited(conversation: object = "") -> Iterator[None]:
    """Limits for the compilation of a template, or for the rendering of a conversation."""
    token = _budget.set(_Budget(_whole_size(conversation)))
    try:
        yield
    finally:
        _budget.reset(token)


def _whole_size(value: object, stop: float = float("inf")) -> int:
    """Characters and items of a value and all that lies in it, counted up to a little more than `stop`."""
    size, waiting = 0, [value]
    while waiting and size <= stop:
        value = waiting.pop()
        size += len(value) if isinstance(value, CONTAINERS) else 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return size


def _checked(value: Any) -> Any:
    budget = _budget.get()
    budget.spend(_whole_size(value, budget.size))
    return value


def _rounds(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _budget.get().spend()
        yield value


def _joined(parts: Sequence[Any]) -> str:
    return _concat(str(_checked(part)) for part in parts)


def _concat(parts: Iterable[str]) -> str:
    """The parts as one text, unless it would be too long."""
    budget, texts, size = _budget.get(), list[str](), 0
    for part in parts:
        texts.append(part)
        size += len(part)
        if size > budget.size:
            break
    budget.spend(size)
    return "".join(texts)


def _spend_call(subject: object, arguments: Iterable[Any], *, formats: bool = False) -> None:
    """Pay for a function that makes text or lists out of its arguments: at most the product of the two largest.

    Args:
        subject: the value that a method, a filter or an operator belongs to.
        arguments: the others.
        formats: whether the subject is a format, in which a number may be the width of the result.
    """
    budget = _budget.get()
    sizes = [abs(value) if isinstance(value, int) else _whole_size(value, budget.size) for value in arguments]
    if formats and isinstance(subject, str):
        sizes += [int(width[:12]) for width in _WIDTH.findall(subject)]
    largest, second = sorted([1, 1, _whole_size(subject, budget.size), *sizes])[-1:-3:-1]
    budget.spend(largest * second)


class _Counting(NodeTransformer):
    """Puts filters that count into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, ROUNDS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, CHECKED)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, CHECKED)
        return node


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}`, with which trainers mark the assistant's text. Here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements inside, in a scope of their own as in transformers."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates. It compiles and renders within `limited` only."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        # Not optimized, because constants would be computed before anything counts; finalize prevents that for outputs.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,
            finalize=_finalize,
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _counted(name, function) for name, function in self.filters.items()}
        self.filters |= {ROUNDS: _rounds, JOINED: _joined, CHECKED: _checked}
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template, of ours, or of a value."""
        if isinstance(__obj, LoopContext):
            args = (_rounds(args[0]), *args[1:]) if args else args
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        subject = getattr(method, "__self__", None)
        if isinstance(subject, CONTAINERS):
            _spend_call(subject, [*args, *kwargs.values()], formats=method.__name__.startswith("format"))
        else:
            _budget.get().spend()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator, if its result cannot be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise jinja2.TemplateRuntimeError("a number is too large")
            _budget.get().spend()
        elif operator == "+":
            _budget.get().spend(sum(len(value) for value in (left, right) if isinstance(value, CONTAINERS)))
        else:
            _spend_call(left, [right], formats=operator == "%")
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    return _checked(value)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it makes of its arguments."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # before the value: context or environment

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _spend_call(
            args[first] if len(args) > first else "", [*args[first + 1 :], *kwargs.values()], formats=name == "format"
        )
        return function(*args, **kwargs)

    return counted


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # jinja's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
