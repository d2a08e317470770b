"""What a browser makes of an HTML text: its text, and what could run in it."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """A parsed page."""

    def __init__(self, html: str) -> None:
        """Parse it."""
        super().__init__(convert_charrefs=True)
        self.text = ""  # all that is shown
        self.scripts: list[str] = []  # elements and attributes that run code
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += [tag] if tag in ("script", "iframe", "object", "embed", "base") else []
        self.scripts += [name for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")]

    def handle_data(self, data: str) -> None:
        self.text += data
