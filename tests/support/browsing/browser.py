"""A page in a real browser: what its console says, where its drawings lie, and what it becomes. Chromium, without a window."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from html import unescape
from itertools import count
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


FLAGS = ("--headless", "--no-sandbox", "--enable-logging=stderr")
NO_GPU = ("--disable-gpu",)
# SWIFTSHADER: a GPU in software
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")


def look_at(page: Path, folder: Path, *, width: int = 1000) -> dict[str, Any]:
    """Open a copy of the page, and return what PROBE reports and the lines on the console."""
    probed = folder / "probed.html"
    text = page.read_text(encoding="utf-8")
    probed.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *NO_GPU, "--dump-dom"]
    command += [f"--window-size={width},1200", f"--user-data-dir={folder / 'profile'}", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page was not shown: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    result: dict[str, Any] = json.loads(unescape(found[1]))
    return {**result, "console": console}


def wait_on(
    url: str, folder: Path, ended: str, *, seconds: float = 300, flags: Sequence[str] = NO_GPU
) -> tuple[str, list[str]]:
    """Open a page, and wait until the JavaScript expression `ended` is true of it, however slow the machine.

    Returns:
        The document as HTML, and the lines on the console.

    Raises:
        TimeoutError: `ended` is not true after so many seconds; with the document as it is then.
    """
    assert CHROMIUM is not None
    log, (asked, ask), (answer, answered) = folder / "chromium.log", os.pipe(), os.pipe()
    # Chromium listens to the DevTools protocol on file descriptor 3 and answers on 4; each message ends with a NUL.
    command = ["bash", "-c", f'exec "$@" 3<&{asked} 4>&{answered}', "bash", CHROMIUM, *FLAGS, *flags]
    command += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
    with log.open("wb") as stderr, os.fdopen(ask, "wb") as to_browser, os.fdopen(answer, "rb") as from_browser:
        browser = subprocess.Popen(command, pass_fds=(asked, answered), stdout=stderr, stderr=stderr)
        os.close(asked)
        os.close(answered)
        numbers, unread = count(1), b""

        def call(method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
            nonlocal unread
            number = next(numbers)
            message = {"id": number, "method": method, "params": parameters, "sessionId": session}
            to_browser.write(json.dumps({key: value for key, value in message.items() if value is not None}).encode())
            to_browser.write(b"\0")
            to_browser.flush()
            while True:
                *messages, unread = (unread + os.read(from_browser.fileno(), 1 << 20)).split(b"\0")
                for reply in map(json.loads, messages):
                    if reply.get("id") == number:
                        result: dict[str, Any] = reply.get("result", {})
                        return result

        def value(expression: str) -> Any:
            """Its value; None while the page is loaded anew, or where the expression fails."""
            evaluated = call("Runtime.evaluate", session, expression=expression, returnByValue=True)
            return evaluated.get("result", {}).get("value")

        try:
            target = call("Target.createTarget", url=url)["targetId"]
            session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            deadline = time.monotonic() + seconds
            while not value(ended):
                if time.monotonic() > deadline:
                    raise TimeoutError(value("document.body.innerHTML"))
                time.sleep(0.1)
            document: str = value("document.documentElement.outerHTML")
            call("Browser.close")
        finally:
            browser.terminate()
            browser.wait()
    console = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "CONSOLE" in line]
    return document, console
