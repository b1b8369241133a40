"""Signing in: a page for the name and password, and a cookie that stands for who gave them."""

import html
import secrets
import threading
import time
from collections import OrderedDict
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from lowrank_rlhf.arena.logins import Logins

COOKIE = "lowrank_rlhf_session"
HOURS = 12
MAX_SESSIONS = 10_000

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sign in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark }} body {{ font: 16px/1.5 system-ui, sans-serif; margin: 12vh auto; max-width: 20rem;
padding: 0 1rem }} h1 {{ font-size: 1.3rem }} label {{ display: block; margin: .8rem 0 }}
input {{ font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; border-radius: 6px;
border: 1px solid #8888 }}
button {{ font: inherit; width: 100%; padding: .6rem; margin-top: .6rem; border: 0; border-radius: 6px; color: #fff;
background: #4f46e5 }} .problem {{ color: #b91c1c }}
@media (prefers-color-scheme: dark) {{ .problem {{ color: #fca5a5 }} }}
</style></head><body><h1>Sign in</h1>{problem}<form method="post">
<label>Name <input name="username" autocomplete="username" required autofocus></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required></label>
<button>Sign in</button></form></body></html>"""


class Sessions:
    """Who is signed in, by an unguessable token; in memory, so that a restart signs everybody out.

    Args:
        logins: whose names and passwords are taken.
    """

    def __init__(self, logins: Logins):
        self.logins = logins
        self._open: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, name: str) -> str:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._open[token] = (name, time.monotonic())
            while len(self._open) > MAX_SESSIONS:
                self._open.popitem(last=False)
        return token

    def close(self, token: str | None) -> None:
        with self._lock:
            self._open.pop(token or "", None)

    def name(self, token: str | None) -> str | None:
        """Whose token it is, None for one that was not given out or is older than `HOURS`."""
        with self._lock:
            name, since = self._open.get(token or "", ("", 0.0))
        return name if name and time.monotonic() - since < HOURS * 3600 else None


def signin_routes(sessions: Sessions) -> APIRouter:
    """GET and POST /login and /vote/login (a form's fields username and password), GET /logout.

    A browser is sent on to what it may see; another client gets {"success": true} and the cookie.
    """
    router = APIRouter()

    @router.get("/login")
    @router.get("/vote/login")
    def page() -> Response:
        return HTMLResponse(PAGE.format(problem=""))

    @router.post("/login")
    @router.post("/vote/login")
    async def sign_in(request: Request) -> Response:
        form = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=8)
        name, password = form.get("username", [""])[0].strip(), form.get("password", [""])[0]
        client = request.client.host if request.client else ""
        wait = sessions.logins.wait_seconds(name, client)
        if wait > 0:
            return _refused(request, 429, f"Too many failed attempts. Try again in {wait:.0f} seconds.")
        if not await run_in_threadpool(sessions.logins.check, name, password, client):
            return _refused(request, 401, "Name and password do not belong together.")
        answer: Response = JSONResponse({"success": True})
        if _is_browser(request):
            answer = RedirectResponse("/" if sessions.logins.is_owner(name) else "/vote/", status_code=303)
        secure = request.url.scheme == "https"
        answer.set_cookie(
            COOKIE, sessions.open(name), max_age=HOURS * 3600, httponly=True, samesite="lax", secure=secure
        )
        return answer

    @router.get("/logout")
    def sign_out(request: Request) -> Response:
        sessions.close(request.cookies.get(COOKIE))
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(COOKIE)
        return answer

    return router


def _is_browser(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _refused(request: Request, status: int, reason: str) -> Response:
    if _is_browser(request):
        problem = f'<p class="problem" role="alert">{html.escape(reason)}</p>'
        return HTMLResponse(PAGE.format(problem=problem), status_code=status)
    return JSONResponse({"error": reason}, status_code=status)
