"""One server of two pages behind one guard: the workbench at / and the blind voting page at /vote."""

import os
import signal
import socket
import sys
import threading
from typing import Any

# Before gradio is imported: it counts uses at import, and looks for newer versions when a page is made
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.exporting import Exports
from lowrank_rlhf.arena.guard import Guard
from lowrank_rlhf.arena.logins import Logins
from lowrank_rlhf.arena.options import Options
from lowrank_rlhf.arena.pages import ballot, look, run_view, vote_widgets, workbench
from lowrank_rlhf.arena.pages.vote import voting_page
from lowrank_rlhf.arena.signin import Sessions, signin_routes
from lowrank_rlhf.errors import UserError

GOODBYE_SECONDS = 3  # open connections are given before they are cut


def serve(options: Options) -> int:
    """Serve the app until SIGTERM or Ctrl-C; prints its address once it answers.

    Raises:
        UserError: an option is wrong, the address cannot be listened on, or the vote store cannot be opened.
    """
    options.check()
    listener = _listen(options)
    arena = Arena(options)
    guard = build(arena)
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    config = uvicorn.Config(
        guard, log_level="warning", timeout_graceful_shutdown=GOODBYE_SECONDS, server_header=False, ws="none"
    )
    # uvicorn hands the signal on after it has shut down; what is left to do with it is nothing
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_load_ahead, args=(arena,), daemon=True).start()
    _Server(config, guard, f"http://{host}:{port}").run(sockets=[listener])
    print("stopped; every vote is in the store", flush=True)
    return 0


def build(arena: Arena) -> Guard:
    """The whole app as an ASGI application: the guard, sign-in, both pages, and the download of exports."""
    logins = arena.options.logins
    sessions = Sessions(Logins.read(logins)) if logins else None
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if sessions:
        app.include_router(signin_routes(sessions))

    @app.get("/vote")
    def slash() -> Response:
        return RedirectResponse("/vote/", status_code=307)

    @app.get("/downloads/{name}.zip")
    def download(name: str) -> Response:
        try:
            files = Exports(arena.store).zipped(name)
        except UserError as error:
            return PlainTextResponse(str(error), status_code=404)
        disposition = {"content-disposition": f'attachment; filename="{name}.zip"'}
        return Response(files, media_type="application/zip", headers=disposition)

    # An error that nobody foresaw could name a model, so the voting page shows none
    _mount(app, voting_page(arena), "/vote", sessions, vote_widgets.HEAD, show_error=False)
    _mount(app, workbench.workbench(arena), "/", sessions, ballot.HEAD, workbench.CSS + run_view.CSS)
    return Guard(app, sessions)


def _load_ahead(arena: Arena) -> None:
    """Have the base in memory before the first prompt comes, which else waits seconds for it."""
    try:
        arena.engine.load()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _mount(
    app: FastAPI,
    page: gr.Blocks,
    path: str,
    sessions: Sessions | None,
    head: str,
    css: str = "",
    show_error: bool = True,
) -> None:
    gr.mount_gradio_app(
        app,
        page,
        path,
        auth_dependency=_annotator if sessions else None,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=show_error,
        max_file_size=0,
        theme=look.THEME,
        css=look.CSS + css,
        head=look.HEAD + head,
    )


def _annotator(request: Request) -> str | None:
    """Who is signed in, as the guard found."""
    name: str | None = request.scope["annotator"]
    return name


def _listen(options: Options) -> socket.socket:
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=256)
    except OSError as error:
        raise UserError(
            f"--host, --port: cannot listen on {options.host}:{options.port} ({error.strerror or error}); "
            "is another app running there? Choose another --port"
        ) from error


class _Server(uvicorn.Server):
    """Tells its addresses when it answers, and open pages when it ends."""

    def __init__(self, config: uvicorn.Config, guard: Guard, address: str):
        super().__init__(config)
        self.guard, self.address = guard, address

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        print(f"workbench    {self.address}/\nblind votes  {self.address}/vote/", flush=True)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        self.guard.close()
        await super().shutdown(sockets)
