"""A page in a real browser: what its console says, and where its drawings lie. Chromium, run once without a window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

# PROBE: reports for each SVG its size, whether it lies within the page, and what is drawn; and what the browser would fetch.
PROBE = """<script>
const shown = box => box.width + box.height > 0 && box.left >= 0 && box.right <= document.documentElement.clientWidth + 1;
const plots = [...document.querySelectorAll("svg")].map(svg => ({
  width: svg.getBoundingClientRect().width, height: svg.getBoundingClientRect().height,
  within: shown(svg.getBoundingClientRect()),
  drawn: [...svg.querySelectorAll("path, use")].filter(part => shown(part.getBoundingClientRect())).length,
  text: svg.textContent.trim().split(/\\s*\\n\\s*/)}));
const fetched = [...document.querySelectorAll("*")]
  .flatMap(part => ["src", "href", "xlink:href"].map(name => part.getAttribute(name)))
  .filter(where => where && !where.startsWith("#"));
const result = document.createElement("pre");
result.id = "probe";
result.textContent = JSON.stringify({plots, fetched, scrolls: document.documentElement.scrollWidth > innerWidth});
document.body.append(result);
</script>"""


def look_at(page: Path, folder: Path, *, width: int = 1000) -> dict[str, Any]:
    """Open a copy of the page, and return what PROBE reports and the lines on the console."""
    probed = folder / "probed.html"
    text = page.read_text(encoding="utf-8")
    probed.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--window-size={width},1200", f"--user-data-dir={folder / 'profile'}", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page was not shown: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    result: dict[str, Any] = json.loads(unescape(found[1]))
    return {**result, "console": console}
