"""A web server for a site's folder that understands ranges, keeps a log, and can break off in the middle of a file."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Site:
    """What is served, and what was asked for."""

    folder: Path
    url: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, and Range
    break_off: dict[str, int] = field(
        default_factory=dict
    )  # file -> bytes after which the next connection breaks, once
    ranges: bool = True


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[Site]:
    """A server on the loopback for as long as the block lasts."""
    site = Site(folder)

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {
            ".js": "text/javascript", ".html": "text/html", ".wasm": "application/wasm", ".json": "application/json",
            "": "application/octet-stream",
        }  # fmt: skip

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(site.folder), **kwargs)

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            site.requests.append((self.path.partition("?")[0], asked))
            path = Path(self.translate_path(self.path))
            name = "index.html" if path.is_dir() else path.name
            file = path / name if path.is_dir() else path
            if not file.is_file():
                return self.send_error(404)
            content = file.read_bytes()
            begin = int(re.sub(r"\D", "", asked)) if asked and site.ranges else 0
            self.send_response(206 if begin else 200)
            self.send_header("Content-Type", self.guess_type(str(file)))
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            if (end := site.break_off.pop(name, None)) is not None:
                self.wfile.write(content[begin:end])
                self.wfile.flush()
                self.connection.close()
                return None
            self.wfile.write(content[begin:])
            return None

        def log_message(self, *args: Any) -> None:
            """Nothing: `requests` is the log."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
