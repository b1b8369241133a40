"""A machine to log in to that is this one: an sshd on the loopback interface with keys of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
MISSING = [
    name
    for name, found in (("sshd", SSHD), ("ssh", shutil.which("ssh")), ("rsync", shutil.which("rsync")))
    if not found
]
# On a machine of a user these tests skip; CI installs what they need, and there they may not
needs_sshd = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"needs {', '.join(MISSING)} (apt install openssh-server rsync)",
)
ROOT = Path(__file__).resolve().parents[1]
HOST = "loop"


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
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\nPrintMotd no\nMaxStartups 100\n"
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
        command = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        log = (self.folder / "sshd.log").open("ab")
        self.sshd = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def kill(self) -> None:
        """The daemon and every connection it serves, at once."""
        children = subprocess.run(["pgrep", "-P", str(self.sshd.pid)], capture_output=True, text=True).stdout.split()
        for pid in [str(self.sshd.pid), *children, *self._grandchildren(children)]:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.sshd.wait()

    def _grandchildren(self, parents: list[str]) -> list[str]:
        found = []
        for parent in parents:
            found += subprocess.run(["pgrep", "-P", parent, "sshd"], capture_output=True, text=True).stdout.split()
        return found

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "WANDB_API_KEY")}
        return {**kept, "PATH": f"{self.bin}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}

    def command(self, verb: str, *words: str, host: str = HOST) -> list[str]:
        cli = [sys.executable, "-m", "lowrank_rlhf.cli", "remote", verb]
        return [*cli, host, "--dir", str(self.there), *words]

    def run(self, verb, *words, cwd, check=True, timeout=300, env=None, host=HOST):
        """What `lowrank-rlhf remote VERB …` says; with `check` it must succeed."""
        done = subprocess.run(
            self.command(verb, *words, host=host), cwd=cwd, env={**self.env, **(env or {})},
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def begin(self, verb, *words, cwd, env=None):
        """The same, not waited for."""
        return subprocess.Popen(
            self.command(verb, *words), cwd=cwd, env={**self.env, **(env or {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def ready(self, cwd) -> None:
        """As after `up`, with the environment of these tests and without the minutes of `doctor`."""
        from lowrank_rlhf.remote import machine
        from lowrank_rlhf.remote.there.folders import Folders, write_json

        folders = Folders(str(self.there))
        folders.make()
        folders.venv.symlink_to(sys.prefix)
        write_json(folders.setup, {"fingerprint": machine.fingerprint(), "made": 0})

    def end(self) -> None:
        for job in self.there.glob("jobs/*/pid"):
            try:
                os.killpg(int(job.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
