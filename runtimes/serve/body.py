"""Reads the JSON of a request, with limits for its size and its time. reading.py limits its depth."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from gemma_edge.errors import one_line
from gemma_edge.reading import parse_json
from gemma_edge.runtimes.serve.refused import Refused, shown

MAX_BODY_BYTES = 1 << 20  # the longest request
BODY_S = 20.0  # seconds from the head of a request to the end of its body
JSON_TYPE = "application/json"


class Gone(Exception):
    """The client went away before its request was complete."""


async def read_body(request: Request) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        Refused: the request is of another type, too long, too slow, too deep, or not a JSON object.
        Gone: the client went away.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != JSON_TYPE:
        # A page of another site may send other types without the browser asking first.
        raise Refused(415, f"the content type {shown(kind)} is not {JSON_TYPE}; send Content-Type: {JSON_TYPE}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise Refused(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        message = f"the request did not arrive within {BODY_S:.0f} seconds"
        raise Refused(408, message, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Gone from None
    return parse_body(bytes(body))


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object in the bytes.

    Raises:
        Refused: they hold something else, or are nested too deep.
    """
    try:
        parsed = parse_json(body)
    except ValueError as error:
        raise Refused(400, f"the request is not JSON: {one_line(error)}") from None
    if not isinstance(parsed, dict):
        raise Refused(400, f"the request is not a JSON object but {shown(parsed)}")
    return parsed
