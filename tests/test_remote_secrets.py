"""Secrets reach the training and nothing else: no list of processes, no environment that is shown, no file."""

import hashlib
import json
import os
import secrets
import subprocess
from pathlib import Path

import pytest

from tests.loopback import needs_sshd, until

pytestmark = needs_sshd

NAMES = ("HF_TOKEN", "WANDB_API_KEY", "MY_OWN")
# Says what it was given without giving it away
TRAINING = """
def main(argv):
    import hashlib
    names = ("HF_TOKEN", "WANDB_API_KEY", "MY_OWN")
    given = {name: hashlib.sha256(os.environ[name].encode()).hexdigest() for name in names if name in os.environ}
    with open(".given", "w") as file:
        json.dump({"given": given, "plain": os.environ.get("PLAIN"), "stdin": sys.stdin.read()}, file)
    os.rename(".given", "given")
    print("given", sorted(given), flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def machine(machine):
    machine.pretend(TRAINING)
    return machine


def values():
    """New ones, with all that a shell or JSON would read; `MARK` of each is enough to find it."""
    return {name: f'sk-{secrets.token_hex(16)} "$HOME" \'é\\' for name in NAMES}


def given(machine):
    """What the training says it was given, once it has begun."""
    told = machine.there / "work" / "given"
    until(told.exists)
    said = json.loads(told.read_text())
    told.unlink()
    return said


def hashes(values):
    return {name: hashlib.sha256(value.encode()).hexdigest() for name, value in values.items()}


def places_of(values, *folders):
    """Where a value, or its unique part, can be read: files, and what /proc and ps tell of every process."""
    marks = [value.partition(" ")[0].encode() for value in values.values()]
    listed = subprocess.run(["ps", "auxeww"], capture_output=True, check=True).stdout
    found = ["ps"] if any(mark in listed for mark in marks) else []
    told = [path / name for path in Path("/proc").glob("[0-9]*") for name in ("cmdline", "environ")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in (*told, *files):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # a process that has ended, or is another user's
        if any(mark in content for mark in marks):
            found.append(str(path))
    return found


def test_they_are_given_to_the_training_and_are_nowhere(machine, here):
    sent = values()
    said = machine.run("run", "sft.yaml", "--secret", "MY_OWN", "--env", "PLAIN=a 'b'", cwd=here, env=sent).stdout
    assert "secrets: HF_TOKEN, WANDB_API_KEY, MY_OWN" in said
    assert given(machine) == {"given": hashes(sent), "plain": "a 'b'", "stdin": ""}
    pid = (machine.there / "jobs" / "sft-1" / "pid").read_text()
    assert b"PLAIN=" in Path("/proc", pid, "environ").read_bytes()  # so what is searched can be read
    assert places_of(sent, machine.folder) == []
    # The search finds what is there to be found
    (machine.there / "work" / "leak").write_text(sent["MY_OWN"])
    assert places_of(sent, machine.folder) == [str(machine.there / "work" / "leak")]
    (machine.there / "work" / "leak").unlink()
    for verb in ("ps", "logs", "stop"):
        done = machine.run(verb, cwd=here)
        assert not any(value in done.stdout + done.stderr for value in sent.values())

    resumed = {name: value for name, value in values().items() if name != "WANDB_API_KEY"}
    machine.run("resume", "--secret", "MY_OWN", cwd=here, env=resumed)
    assert given(machine)["given"] == hashes(resumed)
    assert places_of(sent | resumed, machine.folder) == []
    machine.run("stop", cwd=here)
    machine.run("resume", cwd=here)
    assert given(machine)["given"] == {}
    machine.run("stop", cwd=here)
    assert places_of(sent | resumed, machine.folder) == []


def test_what_a_run_is_refused_for_does_not_leak_them(machine, here):
    """The training cannot be started: the traceback and the words hold no value."""
    sent = values()
    machine.use(Path("/nowhere"))
    try:
        done = machine.run("run", "sft.yaml", "--secret", "MY_OWN", cwd=here, env=sent, check=False)
        assert done.returncode == 2
        assert not any(value.partition(" ")[0] in done.stdout + done.stderr for value in sent.values())
        assert places_of(sent, machine.folder) == []
    finally:
        machine.pretend(TRAINING)


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_SECRET", "password", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_env_takes_no_secret(machine, here, name):
    said = machine.refused("run", "sft.yaml", "--env", f"{name}=quiet-please", cwd=here)
    assert f"--env: {name} looks like a secret and would be written down: give --secret {name}" in said
    assert "quiet-please" not in said


def test_env_takes_what_only_looks_like_one(machine, here):
    machine.run("run", "sft.yaml", "--env", "TOKENIZERS_PARALLELISM=false", "--env", "PLAIN=", cwd=here)
    assert given(machine)["plain"] == ""
    machine.run("stop", cwd=here)


def test_a_secret_is_to_be_set(machine, here):
    said = machine.refused("run", "sft.yaml", "--secret", "NOT_SET_HERE", cwd=here)
    assert "--secret: NOT_SET_HERE is not set here; export it first" in said
    assert "NOT_SET_HERE" not in os.environ
