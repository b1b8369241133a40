"""The machine itself: what it has, the environment that is made on it, and the check whether it is fit."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from typing import Any

from lowrank_rlhf.remote.there.folders import Folders, Refused, read_json, tell, write_json

NEWEST, OLDEST = 14, 11  # minor versions of Python 3 that are looked for


def look(folders: Folders) -> Any:
    """What is there: folders, rsync, graphics cards, free disk, and what the environment was made of."""
    folders.make()
    return {
        "root": str(folders.root),
        "rsync": shutil.which("rsync") is not None,
        "gpus": gpus(),
        "free_gib": round(shutil.disk_usage(str(folders.root)).free / 2**30, 1),
        "setup": read_json(folders.setup),
    }


def gpus() -> list[str]:
    """Names of the NVIDIA cards that the driver sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    said = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return said.stdout.decode("utf-8", "replace").split("\n")[:-1] if said.returncode == 0 else []


def install(folders: Folders, fingerprint: str, venv: str | None, env: dict[str, str]) -> None:
    """Make the environment, or take the one in `venv`, and remember what for; lines {"text"} while it goes on.

    Args:
        env: variables for all that will run there.

    Raises:
        Refused: no Python that is new enough, another `up` is running, or pip failed.
    """
    lock = (folders.root / "up.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused("another `up` is running there: wait for it") from None
    if folders.setup.exists():
        folders.setup.unlink()  # until it is whole again
    began = time.time()
    if venv is not None:
        _take(folders, venv)
    else:
        _make(folders)
        pip = [str(folders.python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        package = ["-c", str(folders.code / "constraints.txt"), "-e", str(folders.code)]
        _stream([*pip, *package], "pip could not install it")
    write_json(folders.setup, {"fingerprint": fingerprint, "made": time.time(), "env": env})
    tell(end={"seconds": round(time.time() - began)})


def doctor(folders: Folders) -> None:
    """Lines {"text"} of `lowrank-rlhf doctor` there, then {"end": its exit status}."""
    command = [str(folders.python), "-m", "lowrank_rlhf.cli", "doctor"]
    tell(end=_relay(command, cwd=str(folders.work), env=folders.environ(folders.code)))


def _take(folders: Folders, venv: str) -> None:
    given = os.path.expanduser(venv)
    if not os.access(os.path.join(given, "bin", "python"), os.X_OK):
        raise Refused(f"--venv: {venv} is no environment there (it has no bin/python)")
    if folders.venv.is_symlink():
        folders.venv.unlink()
    elif folders.venv.exists():
        shutil.rmtree(str(folders.venv))
    folders.venv.symlink_to(os.path.abspath(given))


def _make(folders: Folders) -> None:
    if folders.venv.is_symlink():
        folders.venv.unlink()
    if not os.access(str(folders.python), os.X_OK):
        python = _new_enough()
        tell(text=f"making the environment with {python}\n")
        why = "no environment could be made; on Debian and Ubuntu: sudo apt install python3-venv"
        _stream([python, "-m", "venv", "--clear", str(folders.venv)], why)


def _new_enough() -> str:
    """The newest Python there from 3.11 on that starts: a name of pyenv's stands for one that may not be chosen.

    Raises:
        Refused: there is none.
    """
    path = f"{os.environ.get('PATH', '')}:{os.path.expanduser('~/.local/bin')}"  # uv's place, often on no path here
    for minor in range(NEWEST, OLDEST - 1, -1):
        found = shutil.which(f"python3.{minor}", path=path)
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    if sys.version_info >= (3, OLDEST):
        return sys.executable
    has = ".".join(map(str, sys.version_info[:3]))
    raise Refused(
        f"its Python is {has}, too old; 3.{OLDEST} or newer is needed (sudo apt install python3.{OLDEST} "
        f"python3.{OLDEST}-venv, or give an environment that is there with --venv DIR)"
    )


def _stream(command: list[str], why: str) -> None:
    """
    Raises:
        Refused: the command failed; with its last words.
    """
    last: list[str] = []
    if _relay(command, last=last) != 0:
        raise Refused(f"{why}: {' '.join(last[-3:]).strip() or 'it said nothing'}")


def _relay(command: list[str], last: list[str] | None = None, **options: Any) -> int:
    """Run a command, and send what it says."""
    running = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert running.stdout is not None
    try:
        for raw in running.stdout:
            text = re.sub(r"\r(?!\n)", "\n", raw.decode("utf-8", "replace"))
            if last is not None:
                last.append(text.strip())
            tell(text=text)
    except BrokenPipeError:
        running.kill()
        raise
    return running.wait()
