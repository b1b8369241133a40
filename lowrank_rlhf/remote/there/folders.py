"""The folder on the other machine, and the few things everything there does with files.

DIR/code/            what `push` sent of the package and its recipes
DIR/venv/            the environment; setup.json says what was installed into it
DIR/work/            the working directory of jobs: what a recipe names of the one here, inputs/ from elsewhere, runs/
DIR/jobs/NAME/       job.json, recipe.yaml, code/ as it was when the job started, log, exit
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

SILENCE = 10.0  # seconds after which a line is sent all the same, so that a connection that is gone is noticed
_speaking = threading.Lock()


class Refused(Exception):
    """What was asked cannot be done; the message is for the person who asked."""


class Folders:
    """The paths below the folder that `--dir` names, which is relative to the home directory."""

    def __init__(self, root: str):
        self.root = Path(root).expanduser() if root.startswith("~") else Path.home() / root
        self.code, self.venv = self.root / "code", self.root / "venv"
        self.work, self.jobs = self.root / "work", self.root / "jobs"
        self.setup = self.root / "setup.json"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    def environ(self, code: Path) -> dict[str, str]:
        """The environment of what runs there: this process's, what `up --env` gave, and the package in `code`."""
        kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        given = (read_json(self.setup) or {}).get("env", {})
        return {**kept, **given, "PYTHONPATH": str(code), "PYTHONUNBUFFERED": "1"}

    def make(self) -> None:
        """Make the folders; private, as the texts of data and logs are nobody else's."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.code, self.work / "inputs", self.work / "runs", self.jobs):
            folder.mkdir(parents=True, exist_ok=True)


def read_json(path: Path) -> Any:
    """The file's content, None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def take(path: Path) -> IO[str] | None:
    """The lock, for as long as the file is open in any process; None where another one holds it."""
    file = path.open("w")
    for _ in range(20):  # who only looks whether it is held holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return file
    file.close()
    return None


def tell(**event: Any) -> None:
    """Send one line to who asked; whoever listens no more is no error of the job."""
    with _speaking:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
