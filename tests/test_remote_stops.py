"""A job is stopped, killed, lost and taken up again, with a training that only lives."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.loopback import children, needs_sshd, until

pytestmark = needs_sshd


def test_a_training_that_does_not_stop_is_killed(machine, here, alive):
    (alive / "deaf").touch()
    job = machine.begun(here)
    said = machine.run("stop", job, "--grace", "0.5", cwd=here).stdout
    assert "SIGKILL: it did not stop in time" in said
    assert f"{job} killed; it did not stop in time, and goes on from an earlier checkpoint" in said
    assert f"{job:<14}killed" in machine.run("ps", cwd=here).stdout
    assert f"{job} is killed" in machine.run("stop", job, cwd=here).stdout


LEAVES = """
import subprocess
def main(argv):
    left = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print("lives", left.pid, flush=True)
    while not os.path.exists("enough"):
        time.sleep(0.05)
    os._exit(0)
"""


def test_a_training_that_another_than_us_has_stopped_is_stopped_too(machine, here):
    machine.pretend("def main(argv):\n    print('lives', flush=True)\n    os._exit(128 + signal.SIGTERM)\n")
    job = machine.begun(here)
    machine.wait_for(job, "stopped")
    assert f"go on with: lowrank-rlhf remote resume loop {job}" in machine.run("logs", "-f", cwd=here).stdout


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_nothing_that_a_training_has_started_outlives_it(machine, here, ends):
    machine.pretend(LEAVES)
    job = machine.begun(here)
    left = int((machine.there / "jobs" / job / "log").read_text().split("lives ")[1].split()[0])
    assert psutil.pid_exists(left)
    if ends == "killed":
        training, _ = runner_of(machine, job)
        os.kill(training, signal.SIGKILL)
    else:
        (machine.there / "work" / "enough").touch()
    machine.wait_for(job, "finished" if ends == "by itself" else "failed")
    (machine.there / "work" / "enough").unlink(missing_ok=True)
    until(lambda: not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE)


def test_a_second_stop_may_be_less_patient(machine, here, alive):
    (alive / "deaf").touch()
    job = machine.begun(here)
    patient = machine.begin("stop", job, cwd=here)
    machine.wait_for(job, "stopping")
    machine.run("stop", job, "--grace", "0", cwd=here)
    patient.communicate(timeout=300)
    assert machine.state(job) == "killed"


def runner_of(machine, job):
    training = int((machine.there / "jobs" / job / "pid").read_text())
    return training, int(Path(f"/proc/{training}/stat").read_text().rpartition(") ")[2].split()[1])


@pytest.mark.parametrize("deaf", [False, True])
def test_a_training_whose_runner_was_killed_is_found_and_stopped(machine, here, alive, deaf):
    if deaf:
        (alive / "deaf").touch()
    job = machine.begun(here)
    training, runner = runner_of(machine, job)
    os.kill(runner, signal.SIGKILL)
    assert f"{job:<14}running" in machine.run("ps", cwd=here).stdout
    assert "is running; there is nothing to resume" in machine.refused("resume", job, cwd=here)
    machine.run("stop", job, "--grace", "1", cwd=here)
    assert machine.state(job) == ("killed" if deaf else "stopped")
    assert not Path(f"/proc/{training}/exe").exists()


def test_a_lost_job_goes_on(machine, here, alive):
    """As after a restart of the machine: the runner and its training are gone, and nothing says how they ended."""
    job = machine.begun(here, "run_dir=runs/lost")
    for pid in reversed(runner_of(machine, job)):
        os.kill(pid, signal.SIGKILL)
    machine.wait_for(job, "lost")
    assert f"{job:<14}lost" in machine.run("ps", cwd=here).stdout
    done = machine.run("logs", job, "-f", cwd=here, check=False)
    assert done.returncode == 1
    assert f"{job} lost; the machine was restarted, or its memory ran out; go on with" in done.stdout
    machine.run("resume", job, cwd=here)
    assert "lives" in (machine.there / "jobs" / job / "log").read_text()
    later = machine.refused("run", "sft.yaml", "run_dir=runs/lost", cwd=here)
    assert f"run_dir: {job} is writing into runs/lost there" in later
    (alive / "enough").touch()
    machine.wait_for(job, "finished")


def test_a_job_that_was_to_overwrite_an_earlier_run_does_not_go_on_with_that(machine, here, alive):
    """It was lost before it had written anything; and an earlier job does not go on with a later one's run."""
    run = alive / "runs" / "old"
    run.mkdir(parents=True)
    for name, text in (("run.json", '{"final": {}}'), ("recipe.yaml", "")):
        (run / name).write_text(text)
    assert "is not empty there" in machine.refused("run", "sft.yaml", "run_dir=runs/old", cwd=here)
    job = machine.begun(here, "run_dir=runs/old", "--overwrite")
    machine.run("stop", job, cwd=here)
    assert machine.state(job) == "stopped"
    machine.run("resume", job, cwd=here)
    log = machine.there / "jobs" / job / "log"
    until(lambda: log.read_text().count("lives") == 2)
    started = [line for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert started[0] == started[1]
    assert started[0].endswith("recipe.yaml --overwrite")
    machine.run("stop", job, cwd=here)
    other = machine.begun(here, "run_dir=runs/old", "--overwrite")
    machine.run("stop", other, cwd=here)
    assert f"{job}: runs/old is that of {other} by now" in machine.refused("resume", job, cwd=here)


def test_the_newest_job_is_meant_and_others_are_named(machine, here, alive):
    job = machine.begun(here)
    assert machine.run("logs", cwd=here).stdout == machine.run("logs", job, cwd=here).stdout
    said = machine.refused("logs", "absent-1", cwd=here)
    assert "there is no job 'absent-1' there; jobs: " in said
    assert job in said
    assert children(machine.sshd.pid) == []
