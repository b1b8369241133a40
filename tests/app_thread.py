"""The app in a thread of the test, so that every byte it sends can be read; tests/app_server.py has it as a process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.options import Options
from lowrank_rlhf.arena.server import build


class Recorder:
    """ASGI middleware that keeps what is sent: (path and query, bytes of headers and body)."""

    def __init__(self, app: Any):
        self.app = app
        self.sent: list[tuple[str, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = f"{scope['path']}?{scope['query_string'].decode()}"

        async def recorded(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.sent += [(path, name + b": " + value) for name, value in message["headers"]]
            self.sent.append((path, message.get("body", b"")))
            await send(message)

        # Compressed bytes could not be searched
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self.app({**scope, "headers": headers}, receive, recorded)

    def all(self) -> bytes:
        """Everything, path by path, so that what is cut into pieces is whole again."""
        whole: dict[str, bytes] = {}
        for path, body in self.sent:
            whole[path] = whole.get(path, b"") + body
        return b"\n".join(whole.values())


class Served:
    """
    Attributes:
        url: of the workbench, with a slash at its end.
        app: the FastAPI application.
        recorder: of everything that is sent.
    """

    def __init__(self, options: Options):
        self.app = build(Arena(options))
        self.recorder = Recorder(self.app)
        config = uvicorn.Config(self.recorder, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        end = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"


@contextmanager
def served(**options: Any) -> Iterator[Served]:
    """The app on a free port while the block runs."""
    app = Served(Options(port=0, **options))
    try:
        yield app
    finally:
        app.server.should_exit = True
        app.thread.join(20)
        assert not app.thread.is_alive()
