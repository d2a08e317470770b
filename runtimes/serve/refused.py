"""Why a request gets an error in place of an answer, and what the client reads then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from gemma_edge.errors import InputError

SHOWN = 40  # characters of a wrong value in a message


class Refused(Exception):
    """A request that gets an error in place of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Make the error.

        Args:
            status: the status of HTTP.
            message: one sentence for the client.
            param: the field of the request at fault, if one can be named.
            headers: of the response.
        """
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})


def shown(value: object) -> str:
    """A value as a message shows it: never longer than a line."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def error_body(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    status = error.status if isinstance(error, Refused) else 400
    param = error.param if isinstance(error, Refused) else error.field if isinstance(error, InputError) else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": str(error), "type": kind, "param": param, "code": None}


def error_response(error: Exception) -> Response:
    """The whole response for an error; its JSON is ASCII, whatever the message quotes."""
    status, headers = (error.status, error.headers) if isinstance(error, Refused) else (400, {})
    text = json.dumps({"error": error_body(error)})
    return Response(text, status, headers, media_type="application/json")
