"""Whatever is killed on the way, a job goes on, the next command finds it, and no half file has a file's name."""

import hashlib
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.remote import running, ssh
from tests.loopback import FOUND, HOST, Loopback, laptop, needs_sshd, until

pytestmark = needs_sshd

# Each line in two halves, the first of which ends inside of a character
TICKS = """
def main(argv):
    for number in range(150):
        half, rest = f"line {number} é".encode()[:-1], b"\\xa9\\n"
        for part in (half, rest):
            os.write(1, part)
            time.sleep(0.03)
    return 0
"""
BIG = """
def main(argv):
    os.makedirs("runs/sft-1/adapters/sft")
    with open("runs/sft-1/adapters/sft/adapter_model.safetensors", "wb") as file:
        file.write(os.urandom(30_000_000))
    for name, text in (("run.json", "{}"), ("recipe.yaml", "")):
        open("runs/sft-1/" + name, "w").write(text)
    while not os.path.exists("enough"):
        time.sleep(0.1)
    return 0
"""


@pytest.fixture
def machine(tmp_path):
    with Loopback(tmp_path) as made:
        made.ready(tmp_path)
        yield made


@pytest.fixture
def here(tmp_path):
    return laptop(tmp_path / "laptop")


@pytest.fixture
def host(machine, monkeypatch):
    monkeypatch.setenv("PATH", machine.env["PATH"])
    return ssh.Host(HOST, str(machine.there))


def slow(machine):
    """rsync at a speed at which it can be killed on its way; returns what ends that."""
    wrapper = machine.bin / "rsync"
    wrapper.write_text(f'#!/bin/sh\nexec {FOUND["rsync"]} --bwlimit=3000 "$@"\n')
    wrapper.chmod(0o755)
    return wrapper.unlink


def kill(process):
    """The laptop is gone: every process of a command at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def lines(text):
    return [line for line in text.splitlines() if line.startswith("line ")]


def test_a_follower_goes_on_through_lost_connections_and_shows_each_line_once(machine, here):
    machine.pretend(TICKS)
    follower = machine.begin("run", "sft.yaml", "--follow", cwd=here, errors=subprocess.PIPE)
    log = machine.there / "jobs" / "sft-1" / "log"
    for reached in (b"line 20 ", b"line 80 "):
        until(lambda at=reached: log.exists() and at in log.read_bytes())
        machine.kill()
        machine.start()
    said, errors = follower.communicate(timeout=120)
    assert follower.returncode == 0, said + errors
    assert lines(said) == [f"line {number} é" for number in range(150)]
    assert errors.count("sft-1 goes on; trying again in 1 s") == 2
    assert "sft-1 finished; fetch it with: lowrank-rlhf remote pull loop sft-1" in said


def test_a_job_outlives_the_one_who_follows_it(machine, here):
    machine.pretend(TICKS)
    follower = machine.begin("run", "sft.yaml", "--follow", cwd=here)
    until(lambda: machine.there.glob("jobs/sft-1/log") and machine.state("sft-1") == "running")
    kill(follower)
    assert machine.state("sft-1") == "running"
    again = machine.run("logs", "-f", cwd=here)
    assert lines(again.stdout) == [f"line {number} é" for number in range(150)]
    assert "finished" in machine.run("ps", cwd=here).stdout


def test_a_push_that_is_killed_leaves_no_half_file_and_the_next_completes_it(machine, here):
    machine.pretend(TICKS)
    machine.run("push", cwd=here)
    (here / "big.jsonl").write_bytes(os.urandom(30_000_000))
    at_full_speed = slow(machine)
    pushing = machine.begin("run", "sft.yaml", "data.train=big.jsonl", cwd=here)
    work = machine.there / "work"
    until(lambda: any(path.stat().st_size > 1_000_000 for path in work.glob(".big.jsonl.*")), what="the first bytes")
    kill(pushing)
    assert not (work / "big.jsonl").exists()
    assert not list(machine.there.glob("jobs/*/job.json"))
    until(lambda: not list(work.glob(".big.jsonl.*")), what="the half file to be removed")
    at_full_speed()
    machine.run("run", "sft.yaml", "data.train=big.jsonl", cwd=here)
    assert sha256(work / "big.jsonl") == sha256(here / "big.jsonl")


def test_a_pull_that_is_killed_leaves_nothing_under_the_name_and_the_next_completes_it(machine, here):
    machine.pretend(BIG)
    machine.run("run", "sft.yaml", cwd=here)
    run = machine.there / "work" / "runs" / "sft-1"
    until((run / "recipe.yaml").exists)
    at_full_speed = slow(machine)
    pulling = machine.begin("pull", cwd=here)
    half = here / "runs" / ".sft-1.pull"
    until(lambda: any(path.stat().st_size > 1_000_000 for path in half.rglob(".adapter*")), what="the first bytes")
    kill(pulling)
    assert machine.state("sft-1") == "running"
    assert not (here / "runs" / "sft-1").exists()
    at_full_speed()
    assert "sft-1 is running: pull again" in machine.run("pull", cwd=here).stdout
    assert not half.exists()
    pulled = {str(path.relative_to(here / "runs/sft-1")) for path in here.glob("runs/sft-1/**/*") if path.is_file()}
    assert pulled == {"adapters/sft/adapter_model.safetensors", "run.json", "recipe.yaml", ".remote.json"}
    name = "adapters/sft/adapter_model.safetensors"
    assert sha256(here / "runs/sft-1" / name) == sha256(run / name)
    (machine.there / "work" / "enough").touch()
    machine.wait_for("sft-1", "finished")


def test_a_command_waits_for_a_machine_that_does_not_answer(machine, here):
    machine.kill()
    asking = machine.begin("ps", cwd=here)
    said = [asking.stdout.readline(), asking.stdout.readline()]
    machine.start()
    rest, _ = asking.communicate(timeout=120)
    assert asking.returncode == 0, rest
    assert [line.rpartition("; ")[2] for line in said] == ["trying again in 1 s\n", "trying again in 2 s\n"]
    assert "Connection refused" in said[0]
    assert "no job on loop yet" in rest


def test_in_the_end_it_says_that_it_cannot_be_reached(machine, host, monkeypatch, capsys):
    monkeypatch.setattr(ssh, "WAITS", (0.01, 0.02))
    monkeypatch.setattr(running, "WAITS", (0.01,))
    machine.kill()
    with pytest.raises(UserError, match=r"loop: .*Connection refused; what runs there goes on"):
        host.ask("ps")
    with pytest.raises(UserError, match=r"loop: .*Connection refused; what was copied is kept, ask again"):
        host.copy_to("/etc/", "work/", names=["hostname"])
    with pytest.raises(UserError, match=r"loop: .*Connection refused; what runs there goes on"):
        list(running.listen_on(host, "log", None))
    waits = [line.rpartition(" in ")[2] for line in capsys.readouterr().err.splitlines()]
    assert waits == ["0.01 s", "0.02 s", "0.01 s", "0.02 s", "1 s"]
    machine.start()


COUNTED = """
def main(argv):
    with open("starts", "a") as file:
        file.write(json.dumps(argv) + "\\n")
    time.sleep(int(os.environ["SECONDS_TO_LIVE"]))
    return 3
"""


def test_a_start_whose_answer_is_lost_starts_once(machine, host):
    """Asked twice at the same time, while it runs, and when it has ended; of a resume likewise."""
    machine.pretend(COUNTED)
    push_code(machine)
    place = host.ask("reserve", stage="sft", run_dir=None)
    about = {"stage": "sft", "run_dir": place["run_dir"], "needs": [], "env": {"SECONDS_TO_LIVE": "2"}}
    about |= {"overwrite": False, "launcher": [], "command": ["sft"], "resume_command": ["sft", "--resume"]}
    asked = {"name": place["job"], "about": about, "files": {"recipe.yaml": "a: 1\n"}, "secrets": {}}
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: host.ask("start", **asked), range(3)))
    answers.append(host.ask("start", **asked))
    machine.wait_for("sft-1", "failed")
    answers.append(host.ask("start", **asked))
    assert {answer["job"] for answer in answers} == {"sft-1"}
    assert answers[-1]["exit"] == 3
    assert starts(machine) == [["sft"]]
    for _ in range(2):
        host.ask("resume", name="sft-1", secrets={}, token="first")
    machine.wait_for("sft-1", "failed")
    host.ask("resume", name="sft-1", secrets={}, token="first")
    assert starts(machine) == [["sft"], ["sft"]]  # from the start, as no run was begun
    assert len(list(machine.there.glob("jobs/*"))) == 1


def push_code(machine):
    """What is needed to start `launch`, without the seconds of a push."""
    code = machine.there / "code"
    subprocess.run(["cp", "-r", str(running.__file__).rpartition("/remote/")[0], str(code)], check=True)


def starts(machine):
    return [json.loads(line) for line in (machine.there / "work" / "starts").read_text().splitlines()]


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
