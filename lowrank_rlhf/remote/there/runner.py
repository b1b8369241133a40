"""The process that outlives the connection: starts a job's training, stops it when asked, and writes how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lowrank_rlhf.remote.there.folders import Folders, Refused, is_locked, read_json, take, write_text

SECONDS = 0.2  # between two looks at what is asked
TOO_LATE = "SIGKILL: it did not stop in time"


def detach(folders: Folders, job: Path, secrets: dict[str, str], lock: IO[str]) -> None:
    """Run the job's command in a process of its own that no hang-up reaches.

    Args:
        lock: the job's, which is free once the runner and the training have ended.

    Raises:
        Refused: the job could not be started.
    """
    own = take(job / "runner")
    if own is None:
        raise Refused("it is running already")
    daemon(job / "log", lambda ready: _run(folders, job, secrets, lock.fileno(), ready))
    own.close()


def end_orphan(job: Path) -> None:
    """Stop a training whose runner was killed, as the runner would have done it."""
    own = take(job / "runner")
    if own is None:
        return
    group = int((job / "pid").read_text())

    def work(ready: Callable[[], None]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group, signal.SIGTERM)
        ready()
        while is_locked(job / "lock"):
            if time.time() > (_deadline(job / "stop") or 0):
                print(TOO_LATE, flush=True)
                _kill(group)
                write_text(job / "exit", f"{-signal.SIGKILL}\n")
                return
            time.sleep(SECONDS)

    daemon(job / "log", work)
    own.close()


def daemon(log: Path, work: Callable[[Callable[[], None]], None]) -> None:
    """Have `work` done by a process of its own; returns when it says that it is ready.

    Raises:
        Refused: it ended before it was ready; the message is what it failed with.
    """
    sys.stdout.flush()
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read().decode("utf-8", "replace")
        if said != "ready":
            raise Refused(said or "it ended before it had begun")
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    status, told = 1, False
    try:
        os.close(read)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _redirect(log)

        def ready() -> None:
            nonlocal told
            told = True
            with contextlib.suppress(BrokenPipeError):  # who asked may be gone by now
                os.write(write, b"ready")
            os.close(write)

        work(ready)
        status = 0
    except BaseException as error:  # noqa: BLE001 - the process ends here, and nobody else would say why
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if not told:
            os.write(write, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


def _redirect(log: Path) -> None:
    """Everything that is said goes into the log; nothing holds the connection open."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, target in ((0, nothing), (1, out), (2, out)):
        os.dup2(target, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _run(folders: Folders, job: Path, secrets: dict[str, str], lock: int, ready: Callable[[], None]) -> None:
    about: dict[str, Any] = dict(read_json(job / "job.json"))
    command = about["resume_command"] if about.get("resumes") else about["command"]
    print(f"$ lowrank-rlhf {shlex.join(command)}", flush=True)
    _adopt_orphans()
    training = subprocess.Popen(
        [str(folders.python), "-m", "lowrank_rlhf.launch", *about["launcher"], *command],
        cwd=str(folders.work),
        env={**folders.environ(job / "code"), **about["env"]},
        stdin=subprocess.PIPE,
        start_new_session=True,
        pass_fds=(lock,),
    )
    assert training.stdin is not None
    try:
        training.stdin.write(json.dumps(secrets).encode() + b"\n")
        training.stdin.close()
    except BrokenPipeError:
        pass  # it has ended, and says why in the log
    secrets.clear()
    try:
        write_text(job / "pid", str(training.pid))
    except OSError:
        _kill(training.pid)  # nobody would know of it
        raise
    ready()
    status = _wait(training, job / "stop")
    _kill(training.pid)  # what it may have left behind
    write_text(job / "exit", f"{status}\n")


def _wait(training: subprocess.Popen[bytes], stop: Path) -> int:
    """The training's status; where a stop is asked, SIGTERM to it alone, and at the deadline SIGKILL to all of it."""
    asked = False
    while True:
        try:
            return training.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pass
        deadline = _deadline(stop)
        if deadline is None:
            continue
        if not asked:
            asked = True
            training.terminate()
        elif time.time() > deadline:
            print(TOO_LATE, flush=True)
            _kill(training.pid)
            return training.wait()


def _deadline(stop: Path) -> float | None:
    try:
        return float(stop.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _kill(training: int) -> None:
    """SIGKILL to a training and to all that it has started, also what has a session of its own by now."""
    for pid in (*_below(training), *_below(os.getpid())):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(training, signal.SIGKILL)


def _below(root: int) -> list[int]:
    """The processes that this one has started, and those that they have."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for parent in found:
        found.extend(pid for pid, its in parents.items() if its == parent)
    return found[1:]


def _adopt_orphans() -> None:
    """Have processes whose parent has ended become this one's children, so that they are found; on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
