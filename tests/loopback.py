"""A machine to log in to that is this one: an sshd on the loopback interface with keys of its own."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank_rlhf.remote import machine
from lowrank_rlhf.remote.there.folders import Folders, read_json, write_json
from lowrank_rlhf.remote.there.jobs import Job

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
FOUND = {"sshd": SSHD, "ssh": shutil.which("ssh"), "rsync": shutil.which("rsync")}
MISSING = [name for name, path in FOUND.items() if not path]
# On a machine of a user these tests skip; CI installs what they need, and there they may not
needs_sshd = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"needs {', '.join(MISSING)} (apt install openssh-server rsync)",
)
ROOT = Path(__file__).resolve().parents[1]
HOST = "loop"
# The command line of this side, which is to work on a laptop that has no torch
# Ctrl-C reaches it as it does in a terminal, also where a shell runs these tests in the background, which ignore it
LAPTOP = """
import signal, sys
from lowrank_rlhf import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    status = cli.main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
    assert not heavy, f"imported on the laptop: {heavy}"
sys.exit(status)
"""
# bin/python of an environment whose `lowrank_rlhf.cli` does something else; what starts it is the real one
PRETENDED = """#!{python}
import json, os, runpy, signal, sys, time, types
assert sys.argv[1:3] == ["-m", "lowrank_rlhf.launch"], sys.argv
sys.argv = sys.argv[2:]
cli = sys.modules["lowrank_rlhf.cli"] = types.ModuleType("lowrank_rlhf.cli")
exec(compile({training!r}, "training", "exec"), vars(cli).update(globals()) or vars(cli))
runpy.run_module("lowrank_rlhf.launch", run_name="__main__", alter_sys=True)
"""
# Until `enough` is there; hears no SIGTERM where `deaf` is
LIVES = """
def main(argv):
    signal.signal(signal.SIGTERM, signal.SIG_IGN) if os.path.exists("deaf") else None
    print("lives", os.getpid(), flush=True)
    while not os.path.exists("enough"):
        time.sleep(0.05)
    return 0
"""


class Loopback:
    """Its sshd, and an environment in which `ssh loop` reaches it; its folder is `--dir` of every command."""

    def __init__(self, folder: Path):
        self.folder, self.there = folder, folder / "there"
        self.port = free_port()
        self.sshd = None
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        (folder / "authorized").write_text((folder / "user_key.pub").read_text())
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host_key.pub').read_text()}")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "PidFile none\nPrintMotd no\nMaxStartups 100\n"
        )
        self.configure()
        self.bin = folder / "bin"
        self.bin.mkdir()
        wrapper = self.bin / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        self.end()

    def configure(self, **changed: str) -> None:
        options = {
            "HostName": "127.0.0.1",
            "Port": str(self.port),
            "IdentityFile": f"{self.folder}/user_key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": f"{self.folder}/known",
            "LogLevel": "ERROR",
        } | changed
        lines = "".join(f"  {key} {value}\n" for key, value in options.items())
        (self.folder / "ssh_config").write_text(f"Host {HOST}\n{lines}")

    def start(self) -> None:
        # It ends with these tests, also where they are killed
        with_them = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = [*with_them, str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("ab") as log:
            self.sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def kill(self) -> None:
        """The daemon and every connection it serves, at once."""
        self.sshd.send_signal(signal.SIGSTOP)  # so that none is added
        connections = children(self.sshd.pid)
        below = [pid for connection in connections for pid in children(connection) if name_of(pid).startswith("sshd")]
        for pid in (self.sshd.pid, *connections, *below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.sshd.wait()

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "WANDB_API_KEY")}
        return {**kept, "PATH": f"{self.bin}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}

    def command(self, verb: str, *words: str, host: str = HOST) -> list[str]:
        return [sys.executable, "-c", LAPTOP, "remote", verb, host, *words, "--dir", str(self.there)]

    def run(self, verb, *words, cwd, check=True, timeout=300, env=None, host=HOST):
        """What `lowrank-rlhf remote VERB …` says; with `check` it must succeed."""
        done = subprocess.run(
            self.command(verb, *words, host=host), cwd=cwd, env={**self.env, **(env or {})},
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def refused(self, verb, *words, cwd, env=None):
        """The words with which a command is refused."""
        done = self.run(verb, *words, cwd=cwd, check=False, env=env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: "), done.stderr
        return done.stderr

    def begin(self, verb, *words, cwd, env=None, errors=subprocess.STDOUT):
        """The same, not waited for, in a process group of its own."""
        return subprocess.Popen(
            self.command(verb, *words), cwd=cwd, env={**self.env, **(env or {})},
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip

    def ready(self, cwd) -> None:
        """As after `up`, with the environment of these tests and without the minutes of `doctor`."""
        folders = Folders(str(self.there))
        folders.make()
        self.use(Path(sys.prefix))
        write_json(folders.setup, {"fingerprint": machine.fingerprint(), "made": 0})

    def use(self, environment: Path) -> None:
        venv = self.there / "venv"
        venv.unlink(missing_ok=True)
        venv.symlink_to(environment)

    def pretend(self, training: str) -> None:
        """Jobs that are started from now on run this text in the place of `lowrank_rlhf.cli`; it defines main(argv)."""
        number = len(list(self.folder.glob("pretended-*")))
        python = self.folder / f"pretended-{number}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PRETENDED.format(python=sys.executable, training=training))
        python.chmod(0o755)
        self.use(python.parents[1])

    @contextlib.contextmanager
    def living(self):
        """Jobs that only live; yields the folder they work in."""
        self.pretend(LIVES)
        work = self.there / "work"
        yield work
        for name in ("enough", "deaf"):
            (work / name).unlink(missing_ok=True)

    def begun(self, cwd, *words: str) -> str:
        """A job of those that only live, once it does."""
        job = self.run("run", "sft.yaml", *words, cwd=cwd).stdout.partition(" ")[0]
        until(lambda: "lives" in (self.there / "jobs" / job / "log").read_text())
        return job

    def state(self, job: str) -> str:
        return Job(Folders(str(self.there)), job).state

    def wait_for(self, job: str, *states: str, seconds: float = 300) -> None:
        until(lambda: self.state(job) in states, seconds, f"{job} to be {' or '.join(states)}")

    def end(self) -> None:
        for job in self.there.glob("jobs/*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(job.read_text()), signal.SIGKILL)
        watch = read_json(self.there / "watch" / "watch.json")
        if watch:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(watch["pid"]), signal.SIGKILL)
        self.kill()


def laptop(folder: Path) -> Path:
    """A working directory with a data file, and sft.yaml that names it."""
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"Say {n}", "completion": f"{n}, as you say"} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sft.yaml").write_text("data:\n  train: data.jsonl\n")
    return folder


def until(holds, seconds: float = 300, what: str = "it") -> None:
    """Wait for something to hold."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:g} seconds for {what}"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    said = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in said.split()]


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
