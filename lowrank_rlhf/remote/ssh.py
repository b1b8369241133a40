"""Requests to another machine over the system's `ssh`, so that the user's own settings, agent and keys hold.

The command that ssh is given is always the same words, whatever is asked: the program that runs there and the request
go through standard input, where no shell reads them and no list of processes shows them.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.remote import FOLDER
from lowrank_rlhf.remote.failures import Lost, explain
from lowrank_rlhf.remote.there import agent

MARK = agent.MARK.encode()
# Double quotes hold it together in sh, bash, zsh, fish and csh alike
PROGRAM = (
    'exec python3 -c "import sys, json; '
    "sys.version_info >= (3, 8) or sys.exit('python3 is too old: ' + sys.version.split()[0]); "
    "asked = json.loads(sys.stdin.buffer.readline().decode()); exec(asked['program'])\""
)
BEGIN = """
import types
for name, text in asked["modules"]:
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    exec(compile(text, name, "exec"), module.__dict__)
    parent, _, last = name.rpartition(".")
    parent and setattr(sys.modules[parent], last, module)
sys.modules["lowrank_rlhf.remote.there.agent"].answer(asked["request"])
"""
PACKAGE = "lowrank_rlhf.remote.there"
MODULES = ("folders", "runner", "jobs", "follow", "files", "machine", "serving", "agent")  # each after what it imports
# A connection that answers nothing for a minute is lost; a name that begins with a dash is no flag
OPTIONS = ("-T", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4", "-o", "ConnectTimeout=20")
WAITS = (1, 2, 4, 8, 15)  # seconds before each further try


class Host:
    """A machine that `ssh NAME` reaches.

    Args:
        name: as ssh knows it: `user@address`, or a Host of ~/.ssh/config.
        folder: where everything lies there; relative to the home directory.

    Raises:
        UserError: that is no name, or the folder holds characters that a shell would read.
    """

    def __init__(self, name: str, folder: str):
        if not name or name.startswith("-") or any(character.isspace() for character in name):
            raise UserError(f"HOST: {name!r} is no host: give user@address, or a Host of ~/.ssh/config")
        safe = "/._-+~"
        if not folder or folder.startswith("-") or not all(c.isascii() and (c.isalnum() or c in safe) for c in folder):
            raise UserError(f"--dir: {folder!r} may hold letters, digits and {safe} only")
        self.name, self.folder = name, folder
        self.reached = False

    def command(self, verb: str, *words: str) -> str:
        """What to type for a verb of this machine."""
        folder = () if self.folder == FOLDER else ("--dir", self.folder)
        return shlex.join(("lowrank-rlhf", "remote", verb, self.name, *words, *folder))

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """The answer to a request that may be repeated; a connection that cannot be made is tried again for half a
        minute.

        Raises:
            UserError: it was refused, or the machine cannot be reached.
        """
        for seconds in (*WAITS, None):
            try:
                *_, answer = self.listen(do, **what)
            except Lost as error:
                if seconds is None:
                    raise UserError(f"{error}; what runs there goes on") from error
                waited(error, seconds)
            else:
                return answer
        raise AssertionError("unreachable")

    def listen(self, do: str, ssh: Sequence[str] = (), **what: Any) -> Iterator[dict[str, Any]]:
        """The lines of the answer as they come.

        Args:
            ssh: further options of ssh.

        Raises:
            Lost: the connection could not be made, or broke off.
            UserError: it was refused.
        """
        request = {"do": do, "dir": self.folder, "with": what}
        sent = json.dumps({"program": BEGIN, "modules": _modules(), "request": request}).encode() + b"\n"
        command = ["ssh", *OPTIONS, *ssh, "--", self.name, PROGRAM]
        with _running(command) as (running, errors):
            assert running.stdin is not None
            assert running.stdout is not None
            try:
                running.stdin.write(sent)
                running.stdin.flush()
            except BrokenPipeError:
                pass  # ssh says why
            whole = _skip_greeting(running.stdout)
            self.reached |= whole
            for line in running.stdout if whole else ():
                if not line.endswith(b"\n"):
                    break
                event = json.loads(line)
                if "refused" in event:
                    raise UserError(f"{self.name}: {event['refused']}")
                if event:
                    yield event
            running.stdin.close()
            status = running.wait()
            if status != 0 or not whole:
                raise explain(self.name, status, _tail(errors), self.reached)

    def copy_to(self, source: str, target: str, *options: str, names: Sequence[str] | None = None) -> None:
        """rsync files to a folder below the machine's own, only what has changed.

        Args:
            names: of files below `source`; None for all.

        Raises:
            UserError: rsync is missing, or failed; a lost connection is tried again.
        """
        self._rsync([*options, source, f"{self.name}:{self.folder}/{target}"], names)

    def copy_from(self, source: str, target: str, *options: str, names: Sequence[str]) -> None:
        """The other way, but for files that are there no more. Arguments and errors as of `copy_to`."""
        self._rsync([*options, f"{self.name}:{self.folder}/{source}/", target], names, may_vanish=True)

    def _rsync(self, words: list[str], names: Sequence[str] | None, may_vanish: bool = False) -> None:
        listed = ["--files-from=-", "--from0"] if names is not None else []
        command = ["rsync", "-rlpt", "-e", f"ssh {' '.join(OPTIONS)}", *listed, *words]
        # Without the ./ rsync takes a name that begins with # or ; for a comment
        given = b"\0".join(f"./{name}".encode("utf-8", "surrogateescape") for name in names or ())
        for seconds in (*WAITS, None):
            try:
                done = subprocess.run(command, input=given, capture_output=True, check=False)
            except FileNotFoundError:
                raise UserError("rsync: not found here; install it (sudo apt install rsync)") from None
            if done.returncode == 0 or (may_vanish and _vanished(done.returncode, done.stderr)):
                return
            failure = explain(self.name, done.returncode, done.stderr.decode("utf-8", "replace"), self.reached)
            if not isinstance(failure, Lost):
                raise failure
            if seconds is None:
                raise UserError(f"{failure}; what was copied is kept, ask again") from failure
            waited(failure, seconds)


def waited(error: Lost, seconds: float) -> None:
    """Say that the connection is lost, and wait."""
    print(f"{error}; trying again in {seconds:g} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


@contextmanager
def _running(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """ssh with its words of error in a file; ended with the block."""
    with tempfile.TemporaryFile() as errors:
        try:
            running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        except FileNotFoundError:
            raise UserError("ssh: not found here; install it (sudo apt install openssh-client)") from None
        try:
            yield running, errors
        finally:
            if running.poll() is None:
                running.terminate()
                running.wait()
            for pipe in (running.stdin, running.stdout):
                if pipe is not None and not pipe.closed:
                    pipe.close()


def _skip_greeting(stream: IO[bytes]) -> bool:
    """Read until after the mark; whether it came."""
    read = b""
    while not read.endswith(MARK):
        byte = stream.read(1)
        if not byte:
            return False
        read = (read + byte)[-len(MARK) :]
    return True


def _vanished(status: int, said: bytes) -> bool:
    """Whether rsync has copied all but files that were removed meanwhile."""
    told = [line for line in said.splitlines() if line and not line.startswith(b"rsync error:")]
    gone = all(b"No such file or directory" in line or b"vanished" in line for line in told)
    return status in (23, 24) and gone


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read().decode("utf-8", "replace")


@cache
def _modules() -> list[tuple[str, str]]:
    """Name and text of each module of `there`, in the order in which they are imported."""
    folder = Path(__file__).with_name("there")
    packages = ("lowrank_rlhf", "lowrank_rlhf.remote", PACKAGE)
    texts = [(f"{PACKAGE}.{name}", (folder / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES]
    return [*((name, "") for name in packages), *texts]
