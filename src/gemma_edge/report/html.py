"""Pages made of jinja2 templates. What all pages share lies in templates/ beside this file: style, tables and plots.

Everything that a template prints is escaped, except an `Svg`. A page is one file that loads nothing from outside.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table with a heading of its own."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: Collection[str]  # columns of text, which are aligned to the left; the others hold numbers
    heading: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure between its heading and its caption."""

    heading: str
    caption: str
    svg: str  # an <svg> element, as drawing.svg returns it

    @property
    def element(self) -> Markup:
        """The element, which must not be escaped: matplotlib has escaped the text in it."""
        return Markup(self.svg)


def render(package: str, **values: object) -> str:
    """Fill in the template `page.html.j2` of a package.

    Args:
        package: whose folder `templates` holds it.
        values: the variables of the template.

    Returns:
        the whole HTML text.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("gemma_edge.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(values)
