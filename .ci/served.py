"""Prints what `gemma-run BUNDLE --serve` answers to a prompt, JSON by a schema having worked before: BUNDLE PROMPT TOKENS.

With the standard library alone, in an environment that holds nothing but what the server needs.
"""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

bundle, prompt, tokens = sys.argv[1:]
command = [str(Path(sys.executable).with_name("gemma-run")), bundle, "--serve", "--port", "0"]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    assert server.stderr
    try:
        urls = (re.search(r"running on (http://\S+)", line) for line in server.stderr)
        url = next(found.group(1) for found in urls if found)

        def ask(body: dict[str, Any]) -> str:
            """The answer's text."""
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(json.load(answer)["choices"][0]["text"])

        form = {"type": "json_object"}
        assert isinstance(json.loads(ask({"prompt": prompt, "max_tokens": 9, "response_format": form})), dict)
        print(ask({"prompt": prompt, "max_tokens": int(tokens)}))
    finally:
        server.terminate()
