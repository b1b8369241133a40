"""The app on the other machine for as long as somebody is connected, and the watch that ends an idle machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from lowrank_rlhf.remote.there.folders import SILENCE, Folders, Refused, is_locked, read_json, tell, write_json
from lowrank_rlhf.remote.there.jobs import Job, names
from lowrank_rlhf.remote.there.runner import daemon

POLL_SECONDS = 5.0


def free_port(folders: Folders) -> Any:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"port": probe.getsockname()[1]}


def app(folders: Folders, port: int, options: list[str]) -> None:
    """Serve the app on the loopback interface until the connection ends; lines {"text"} of what it says."""
    command = [str(folders.python), "-m", "lowrank_rlhf.cli", "compare", "--port", str(port), *options]
    running = subprocess.Popen(
        command,
        cwd=str(folders.work),
        env=folders.environ(folders.code),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def end_with_the_connection() -> None:
        with contextlib.suppress(OSError):
            while not select.select([0], [], [], SILENCE)[0]:
                tell()
        running.terminate()

    threading.Thread(target=end_with_the_connection, daemon=True).start()
    assert running.stdout is not None
    try:
        for line in running.stdout:
            tell(text=line.decode("utf-8", "replace"))
    finally:
        running.terminate()
        tell(end=running.wait())


def watch(folders: Folders, minutes: float, command: str) -> Any:
    """Run a command there once no job has run for so many minutes, whoever is connected; a new watch replaces it."""
    folder = folders.root / "watch"
    folder.mkdir(exist_ok=True)
    unwatch(folders)
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def work(ready: Callable[[], None]) -> None:
        about = {"minutes": minutes, "command": command, "pid": os.getpid(), "since": time.time()}
        write_json(folder / "watch.json", about)
        ready()
        _wait_until_idle(folders, minutes * 60)
        print(f"idle for {minutes:g} minutes: {command}", flush=True)
        lock.close()
        os.execv("/bin/sh", ["sh", "-c", command])

    daemon(folder / "log", work)
    lock.close()
    return {"watching": True}


def unwatch(folders: Folders) -> Any:
    """End the watch, where there is one."""
    folder = folders.root / "watch"
    if is_locked(folder / "lock"):
        os.kill(int(read_json(folder / "watch.json")["pid"]), signal.SIGTERM)
        for _ in range(50):
            if not is_locked(folder / "lock"):
                break
            time.sleep(0.1)
        else:
            raise Refused("the watch that is there does not end")
    return {"watching": False}


def _wait_until_idle(folders: Folders, seconds: float) -> None:
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < seconds:
        states = [Job(folders, name).state for name in names(folders)]
        if any(state in ("running", "stopping") for state in states):
            idle_since = time.monotonic()
        time.sleep(min(POLL_SECONDS, seconds / 4))
