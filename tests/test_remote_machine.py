"""A machine made ready from nothing, the app through the tunnel, and the watch; over a real sshd."""

import fcntl
import json
import signal
import subprocess
import time

import httpx
import psutil
import pytest

from lowrank_rlhf.remote import machine as laptop
from lowrank_rlhf.remote.there.folders import Folders
from lowrank_rlhf.remote.there.jobs import reserve
from tests.loopback import HOST, Loopback, free_port, needs_sshd


@pytest.fixture(scope="module")
def machine(new_machine):
    return new_machine  # nothing is installed on it


@pytest.fixture
def ready(machine, tmp_path):
    if not (machine.there / "setup.json").exists():
        machine.ready(tmp_path)
    return machine


def wait(what, seconds=300):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def listening_on(pid):
    """The addresses that a process listens on."""
    connections = psutil.Process(int(pid)).net_connections("tcp")
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


@needs_sshd
@pytest.mark.slow
def test_up_installs_from_nothing_and_what_it_installed_trains(tmp_path):
    loopback = Loopback(tmp_path)
    here = tmp_path / "laptop"
    here.mkdir()
    try:
        done = loopback.run("up", cwd=here, timeout=1800)
        assert "making the environment with" in done.stdout
        assert "Training works on this machine." in done.stdout
        assert f"warning: {HOST} has no CUDA card" in done.stdout
        again = loopback.run("up", cwd=here, timeout=600)
        assert "making the environment" not in again.stdout
        (here / "sft.yaml").write_text("data: {train: d.jsonl}\n")
        (here / "d.jsonl").write_text("".join(f'{{"prompt": "{i}", "completion": "{i}!"}}\n' for i in range(20)))
        done = loopback.run("run", "sft.yaml", "--tiny", "--follow", cwd=here)
        assert "sft-1 finished" in done.stdout
        loopback.run("pull", cwd=here)
        versions = json.loads((here / "runs/sft-1/run.json").read_text())["versions"]
        assert versions["trl"].startswith("1.16")
        assert (here / "runs/sft-1/adapters/sft/adapter_model.safetensors").is_file()
    finally:
        loopback.end()


@needs_sshd
def test_an_environment_that_is_there_is_taken_and_one_that_is_not_is_told(machine, tmp_path, monkeypatch):
    done = machine.run("up", "--venv", str(tmp_path / "nothing"), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"--venv: {tmp_path}/nothing is no environment there (it has no bin/python)" in done.stderr
    assert not (machine.there / "setup.json").exists()
    fake = tmp_path / "own environment" / "bin"
    fake.mkdir(parents=True)
    (fake / "python").write_text('#!/bin/sh\necho "fine in $HF_HOME"; exit 0\n')
    (fake / "python").chmod(0o755)
    done = machine.run("up", "--venv", str(fake.parent), "--env", "HF_HOME=/a place's $HOME", cwd=tmp_path)
    assert "fine in /a place's $HOME\n" in done.stdout
    assert json.loads((machine.there / "setup.json").read_text())["fingerprint"] == laptop.fingerprint()
    assert (machine.there / "code/lowrank_rlhf/cli.py").is_file()
    assert (machine.there / "code/recipes/sft.yaml").is_file()
    assert not (machine.there / "code/tests").exists()
    (machine.there / "setup.json").unlink()
    (machine.there / "venv").unlink()


@needs_sshd
def test_what_was_removed_here_is_removed_there(ready, tmp_path):
    ready.run("push", cwd=tmp_path)
    left = ready.there / "code/lowrank_rlhf/gone.py"
    left.write_text("")
    kept = ready.there / "code/lowrank_rlhf.egg-info"
    kept.mkdir()
    ready.run("push", cwd=tmp_path)
    assert not left.exists()
    assert kept.exists()


@needs_sshd
def test_the_app_is_reached_through_the_tunnel_and_ends_with_it(ready, tmp_path):
    (ready.there / "work").mkdir(exist_ok=True)
    (tmp_path / "my prompts.jsonl").write_text('{"prompt": "What is a tunnel?"}\n')
    port = free_port()
    app = ready.begin("ui", "--port", str(port), "--prompts", "my prompts.jsonl", cwd=tmp_path)
    try:
        lines = []
        for line in app.stdout:
            lines.append(line)
            if "blind votes" in line:
                break
        assert f"http://127.0.0.1:{port}/vote/" in lines[-1], lines
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=120).status_code == 200
        config = httpx.get(f"http://127.0.0.1:{port}/vote/config", timeout=120).json()
        assert "Which answer is better?" in json.dumps(config)
        served = subprocess.run(["pgrep", "-f", "lowrank_rlhf.cli compare --port"], capture_output=True, text=True)
        [pid] = served.stdout.split()
        assert listening_on(pid) == {"127.0.0.1"}
        busy = ready.run("ui", "--port", str(port), cwd=tmp_path, check=False)
        assert f"--port: {port} is taken here" in busy.stderr
        app.send_signal(signal.SIGINT)
        assert app.wait(300) == 0
        wait(lambda: subprocess.run(["pgrep", "-f", "lowrank_rlhf.cli compare --port"], capture_output=True).returncode)
    finally:
        app.kill()
        app.stdout.close()


@needs_sshd
def test_the_app_ends_when_the_laptop_vanishes(ready, tmp_path):
    app = ready.begin("ui", "--port", str(free_port()), cwd=tmp_path)
    assert any("workbench" in line for line in app.stdout)
    connections = psutil.Process(app.pid).children(recursive=True)
    app.kill()
    app.stdout.close()
    for connection in connections:
        connection.kill()
    wait(lambda: subprocess.run(["pgrep", "-f", "lowrank_rlhf.cli compare --port"], capture_output=True).returncode)


@needs_sshd
def test_votes_come_back_whole_while_they_are_being_written(ready, tmp_path):
    from vote_records import compared, vote

    from lowrank_rlhf.arena.votes.database import Store

    path = ready.there / "work/votes.db"
    for left in path.parent.glob("votes.db*"):
        left.unlink()  # of the app before
    nothing = ready.run("pull", "--votes", cwd=tmp_path, check=False)
    assert "there are no votes there" in nothing.stderr
    store = Store(path)
    comparison = compared("yes", "no")
    store.save_comparison(comparison)
    store.save_vote(vote(comparison, "a"))
    done = ready.run("pull", "--votes", cwd=tmp_path)
    assert f"{HOST}.votes.db" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{HOST}.votes.db"]
    (judged,) = Store(tmp_path / f"{HOST}.votes.db", create=False).judged()
    assert judged.votes[0].choice == "a"


@needs_sshd
def test_the_watch_waits_for_jobs_and_runs_its_command_once_none_is_left(ready, tmp_path):
    job = reserve(Folders(str(ready.there)), "sft", None)
    canary = tmp_path / "it's $(off)"
    with open(f"{job['dir']}/lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = f'echo off > "{tmp_path}/it\'s \\$(off)"'
        done = ready.run("watch", "--idle-stop", "0.03", "--command", command, cwd=tmp_path)
        assert "after 0.03 minutes without a job" in done.stdout
        assert "watch: after 0.03 idle minutes" in ready.run("ps", cwd=tmp_path).stdout
        time.sleep(3)
        assert not canary.exists()
    wait(canary.exists)
    wait(lambda: "watch:" not in ready.run("ps", cwd=tmp_path).stdout)
    ready.run("watch", "--idle-stop", "100", "--command", "echo no", cwd=tmp_path)
    ready.run("watch", "--idle-stop", "200", "--command", "echo no", cwd=tmp_path)
    assert "watch: after 200 idle minutes" in ready.run("ps", cwd=tmp_path).stdout
    ready.run("watch", "--off", cwd=tmp_path)
    assert "watch:" not in ready.run("ps", cwd=tmp_path).stdout
    for words in ([], ["--idle-stop", "5"], ["--idle-stop", "-1", "--command", "x"]):
        assert ready.run("watch", *words, cwd=tmp_path, check=False).returncode == 2
