"""Who may send requests: by the name that a request uses for this machine, by the page that it comes from, and by a key.

A browser cannot send a key with the scripts and workers that a page loads. For the files of such a page a cookie stands for
the key: it comes with the first file that was fetched with the key, and opens nothing else.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gemma_edge.runtimes.serve.refused import Refused, shown

OPEN = ("/", "/health")  # paths that need no key: the chat page asks for it, and Docker's health checks have none
FILES = "/web/"  # the files of a page that runs the model
ANY = "*"


@dataclass(frozen=True)
class Access:
    """Who may send requests."""

    key: str | None = None  # requests must send it as `Authorization: Bearer KEY`; None lets everybody in
    hosts: frozenset[str] = frozenset()  # names of this machine that requests may use, besides IP addresses
    origins: tuple[str, ...] = ()  # of other web pages that may send requests, such as http://localhost:3000
    # ticket: the cookie's value, a new one for each server
    ticket: str = field(default_factory=secrets.token_urlsafe, repr=False)

    def check_place(self, request: Request) -> None:
        """Refuse requests that a browser sends for a web page of another origin.

        The name of such a page may resolve to this machine, or the page may send a request without reading the response.

        Raises:
            Refused: the name of this machine is unknown, or the page may not send requests.
        """
        host = request.headers.get("host", "")
        # such a page does not know the key, so the name matters only where there is none
        if self.key is None and not self._is_ours(_name(host)):
            raise Refused(400, f"the host name {shown(host)} is not one of this machine's; see --allow-host")
        for origin in request.headers.getlist("origin"):
            same = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
            if not same and not {origin, ANY} & {*self.origins}:
                raise Refused(403, f"a page of {shown(origin)} may not send requests to this server; see --cors")

    def check_key(self, request: Request) -> None:
        """Refuse a request without the key.

        Raises:
            Refused: the key is missing or wrong.
        """
        path = request.scope["path"]
        if self.key is None or path in OPEN or path.startswith(FILES) and self._has_cookie(request):
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if scheme.lower() != "bearer" or not same:
            problem = "the API key is wrong" if given else "the API key is missing"
            message = f"{problem}; send the header Authorization: Bearer KEY"
            raise Refused(401, message, headers={"WWW-Authenticate": "Bearer"})

    def give_cookie(self, request: Request, response: Response) -> None:
        """Let whoever may fetch one of the page's files fetch the others without the key."""
        if self.key is not None:
            response.set_cookie(_cookie(request), self.ticket, path=None, httponly=True, samesite="strict")

    def _has_cookie(self, request: Request) -> bool:
        given = request.cookies.get(_cookie(request), "")
        return hmac.compare_digest(given.encode(), self.ticket.encode())

    def _is_ours(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts or ANY in self.hosts
        return True  # nobody else can make an address lead here


def _cookie(request: Request) -> str:
    """The cookie's name: browsers send the cookies of all servers of one machine to each of them."""
    return f"gemma-edge-{request.scope['server'][1]}"


def names_of_this_machine() -> frozenset[str]:
    """The names by which a request may call this machine from outside."""
    name = socket.gethostname().lower()
    return frozenset({"localhost", name, f"{name.partition('.')[0]}.local"})


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


class Checked:
    """Middleware: passes on the requests that a check lets through."""

    def __init__(self, app: ASGIApp, check: Callable[[Request], None], refuse: Callable[[Exception], Response]) -> None:
        """Put the check in front of an app.

        Args:
            app: gets the requests that pass.
            check: raises Refused for the others.
            refuse: makes the response to those.
        """
        self.app, self.check, self.refuse = app, check, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and pass on."""
        if scope["type"] == "http":
            try:
                self.check(Request(scope))
            except Refused as error:
                await self.refuse(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
