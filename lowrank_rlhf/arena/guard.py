"""What stands before every page: who asks, from where, for what, and how much; all else is refused.

gradio opens many routes, of files, proxies, uploads, recordings and state, of which this app needs few. So the guard
lists what is open instead of what is closed.
"""

import asyncio
import json
import re
from collections import OrderedDict
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowrank_rlhf.arena.options import is_local
from lowrank_rlhf.arena.signin import COOKIE, Sessions

MAX_BODY_BYTES = 4 * 2**20
MAX_BOUND = 100_000  # session hashes remembered
VOTE = "/vote"
SIGN_IN = ("/login", f"{VOTE}/login")

# Inline and evaluated scripts are gradio's own way; nothing is loaded from, or sent to, another host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

SEGMENTS = r"(?:[\w@~+,-][\w.@~+,-]*/)*[\w@~+,-][\w.@~+,-]*"  # no part of it begins with a dot
OPEN = {
    "GET": re.compile(
        rf"/|/config/?|/theme\.css|/robots\.txt|/favicon\.ico|/manifest\.json|/(?:static|assets|svelte)/{SEGMENTS}"
        rf"|/gradio_api/(?:theme\.css|info/?|queue/data|heartbeat/[\w-]+|startup-events|app_id/?|user/?|login_check/?)"
    ),
    "POST": re.compile(r"/gradio_api/(?:queue/join|run/\w+/?|cancel|reset/?)"),
}
OWN = {
    "GET": re.compile(r"/login|/vote/login|/logout|/vote|/downloads/[\w-]+\.zip"),
    "POST": re.compile(r"/login|/vote/login"),
}
FIXED = re.compile(r"(?:/vote)?/(?:static|assets)/")  # files of gradio's own
WITH_SESSION = re.compile(r"/gradio_api/(?:queue/join|run/\w+/?|cancel)")


class Refusal(Exception):
    """This request is not served; `response` says why."""

    def __init__(self, response: Response):
        super().__init__()
        self.response = response


class Guard:
    """ASGI middleware in front of the workbench at / and the voting page at /vote.

    Without logins it serves programs on this machine alone, whatever address it listens on. With logins nothing but
    the sign-in page is served to who is not signed in, and only the voting page to who is no owner. A gradio session
    belongs to the name that first used its hash, so that nobody acts in the session of another.

    Sets `scope["annotator"]` to the name of who is signed in, None without logins.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions | None):
        self.app, self.sessions = app, sessions
        self._closing = asyncio.Event()
        self._bound: OrderedDict[str, str] = OrderedDict()

    def close(self) -> None:
        """Tell every page that is still open that it has gone, so that its streams end; call it in the event loop."""
        self._closing.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if not FIXED.match(scope["path"]):
                    headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_origin(scope, headers)
            scope["annotator"] = self._signed_in(scope, headers)
            page_path = _check_path(scope)
            if scope["method"] == "POST":
                body = await _read(receive, headers)
                receive = _replayed(body, receive)
                self._check_session(scope, page_path, body)
            else:
                self._check_session(scope, page_path, b"")
        except Refusal as refusal:
            await refusal.response(scope, receive, send_guarded)
            return
        await self.app(scope, self._until_closed(receive), send_guarded)

    def _until_closed(self, receive: Receive) -> Receive:
        """What comes, or after `close` a disconnection."""

        async def receive_open() -> Message:
            if self._closing.is_set():
                return {"type": "http.disconnect"}
            coming, closed = asyncio.ensure_future(receive()), asyncio.ensure_future(self._closing.wait())
            try:
                await asyncio.wait({coming, closed}, return_when=asyncio.FIRST_COMPLETED)
                return coming.result() if coming.done() else {"type": "http.disconnect"}
            finally:
                coming.cancel()
                closed.cancel()

        return receive_open

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Refuse other machines where there are no logins, and pages of other sites, also under a name of theirs."""
        host = headers.get("host", "")
        if self.sessions is None:
            ends = [(scope.get(end) or ("", 0))[0] for end in ("server", "client")]
            if not all(is_local(address) for address in ends):
                raise refusal(403, "Without logins this app serves its own machine only. Start it with --logins FILE.")
            if not is_local(_hostname(host)):
                raise refusal(421, f"This app is not known as {_hostname(host)!r}. Open it by its address.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host and scope["method"] not in ("GET", "HEAD"):
            raise refusal(403, "Another site sent this request.")

    def _signed_in(self, scope: Scope, headers: Headers) -> str | None:
        if self.sessions is None:
            return None
        path = scope["path"]
        name = self.sessions.name(_cookie(headers))
        if name is None and path not in SIGN_IN:
            if scope["method"] == "GET" and path in ("/", VOTE, f"{VOTE}/"):
                raise Refusal(RedirectResponse("/login", status_code=303))
            raise refusal(401, "Not signed in.")
        if name is not None and not self.sessions.logins.is_owner(name):
            if scope["method"] == "GET" and path == "/":
                raise Refusal(RedirectResponse(f"{VOTE}/", status_code=303))
            if path not in (*SIGN_IN, "/logout", VOTE) and not path.startswith(f"{VOTE}/"):
                raise refusal(403, "This page is for owners; the voting page is at /vote/.")
        return name

    def _check_session(self, scope: Scope, path: str, body: bytes) -> None:
        """A session hash belongs to who used it first; calls without one, whose state nobody owns, are refused."""
        name = scope["annotator"]
        hashes: list[Any] = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get(
            "session_hash", []
        )
        if path.startswith("/gradio_api/heartbeat/"):
            hashes.append(path.rpartition("/")[2])
        if WITH_SESSION.fullmatch(path):
            try:
                call = json.loads(body)
            except ValueError as error:
                raise refusal(400, "The body is not JSON.") from error
            hashes.append(call.get("session_hash") if isinstance(call, dict) else None)
        for session in hashes:
            if not isinstance(session, str) or not 1 <= len(session) <= 100:
                raise refusal(400, "session_hash: is to be a text of 1 to 100 characters.")
            if name is not None and self._bound.setdefault(session, name) != name:
                raise refusal(403, "This session belongs to somebody else.")
        while len(self._bound) > MAX_BOUND:
            self._bound.popitem(last=False)


def refusal(status: int, reason: str) -> Refusal:
    return Refusal(JSONResponse({"error": reason, "detail": reason}, status_code=status))


def _check_path(scope: Scope) -> str:
    """The path within its page, after checking that it is one of those that are open."""
    path, method = scope["path"], "GET" if scope["method"] == "HEAD" else scope["method"]
    if method not in OPEN:
        raise refusal(405, "Only GET and POST.")
    within = path.removeprefix(VOTE) if path.startswith(f"{VOTE}/") else path
    if not OPEN[method].fullmatch(within) and not OWN[method].fullmatch(path):
        raise refusal(404, "There is nothing here.")
    return str(within)


async def _read(receive: Receive, headers: Headers) -> bytes:
    too_large = f"A request may have {MAX_BODY_BYTES // 2**20} MB at most."
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise refusal(413, too_large)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise refusal(400, "The request ended early.")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MAX_BODY_BYTES:
            raise refusal(413, too_large)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read once more, then whatever comes: the disconnection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def _hostname(host: str) -> str:
    """The name in a Host header, without port and brackets.

    >>> _hostname("127.0.0.1:7860"), _hostname("[::1]:7860"), _hostname("evil.example")
    ('127.0.0.1', '::1', 'evil.example')
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(headers: Headers) -> str | None:
    return cookie_parser(headers.get("cookie", "")).get(COOKIE)
