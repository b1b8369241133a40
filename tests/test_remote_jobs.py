"""A job over loopback from push to pull: what is sent, what comes back, and how it is stopped and goes on."""

import hashlib
import json
import os
import re
import shutil

import pytest

from tests.loopback import ROOT, needs_sshd, until

pytestmark = needs_sshd

STEPS = 60
# Dropout, so that the random state matters; no checkpoint but that of the stop
TRAINING = ("sft.yaml", "--tiny", "lora.dropout=0.1", f"train.max_steps={STEPS}", "train.epochs=60", "save.steps=null")


def hashes(folder):
    """Of every file below, without its own mark."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".remote.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def figures(run):
    """The metrics without what a clock says, and without trl's own counts, which begin anew in each process."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = re.compile("second|runtime|num_tokens|train_loss")
    return [{key: row[key] for key in row if not left_out.search(key)} for row in rows]


# Trainings


@pytest.fixture(scope="module")
def whole(machine, here):
    """A job that was followed to its end."""
    machine.ready(machine.folder)
    return machine.run("run", *TRAINING, "--follow", "run_dir=runs/whole", cwd=here, timeout=900).stdout


@pytest.mark.slow
def test_a_training_is_sent_followed_and_fetched_to_the_byte(machine, here, whole):
    job = whole.partition(" ")[0]
    assert f"{job} runs on loop, into runs/whole (1 input file)" in whole
    assert f"sft step {STEPS}/{STEPS}  loss " in whole
    assert f"{job} finished; fetch it with: lowrank-rlhf remote pull loop {job}" in whole
    assert machine.run("logs", job, cwd=here).stdout in whole
    assert f"{job:<14}finished   {STEPS:>7}" in machine.run("ps", cwd=here).stdout
    rows = machine.run("metrics", job, cwd=here).stdout
    assert all(f"sft step {step}  loss " in rows for step in range(1, STEPS + 1))
    said = machine.run("pull", job, cwd=here).stdout
    assert "every hash as on loop" in said
    theirs = machine.there / "work" / "runs" / "whole"
    assert "adapters/sft/adapter_model.safetensors" in hashes(here / "runs/whole")
    assert hashes(here / "runs/whole") == hashes(theirs)


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_bits(machine, here, whole):
    machine.ready(machine.folder)
    job = machine.run("run", *TRAINING, "run_dir=runs/broken", cwd=here).stdout.partition(" ")[0]
    run, metrics = (machine.there / "work" / "runs" / name for name in ("whole", "broken/metrics.jsonl"))
    until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3, 300, "the first steps")
    said = machine.run("stop", job, cwd=here).stdout
    assert f"{job} stopped; go on with: lowrank-rlhf remote resume loop {job}" in said
    assert machine.state(job) == "stopped"
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert 3 < step < STEPS
    assert [path.name for path in (metrics.parent / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    said = machine.run("resume", job, "--follow", cwd=here, timeout=900).stdout
    assert "SIGTERM" not in said  # of the log before
    assert f"sft step {STEPS}/{STEPS}" in said
    assert machine.state(job) == "finished"
    assert figures(metrics.parent) == figures(run)
    name = "adapters/sft/adapter_model.safetensors"
    assert (metrics.parent / name).read_bytes() == (run / name).read_bytes()
    machine.run("pull", job, "--checkpoints", cwd=here)
    assert hashes(here / "runs/broken") == hashes(metrics.parent)
    said = machine.refused("resume", job, cwd=here)
    assert f"{job} is finished; there is nothing to resume" in said


@pytest.mark.slow
def test_a_pipeline_runs_stops_and_goes_on(machine):
    """In the repository itself, whose recipes it names."""
    machine.ready(machine.folder)
    words = ["recipes/pipeline.yaml", "--tiny", "run_dir=runs/remote-pipeline"]
    job = machine.run("run", *words, cwd=ROOT).stdout.partition(" ")[0]
    folder = machine.there / "work" / "runs" / "remote-pipeline"
    until((folder / "sft" / "adapters").exists, 600, "the first stage")
    machine.run("stop", job, cwd=ROOT)
    assert machine.state(job) == "stopped"
    assert not (folder / "report.md").exists()
    said = machine.run("resume", job, "--follow", cwd=ROOT, timeout=1800).stdout
    assert "sft: unchanged, kept as it is" in said
    assert f"{job} finished" in said
    machine.run("pull", job, "--to", str(machine.folder / "pulled"), cwd=ROOT)
    pulled = hashes(machine.folder / "pulled")
    assert {"report.md", "ppo/adapters/policy/adapter_model.safetensors"} <= set(pulled)
    assert not any("checkpoints" in name for name in pulled)
    theirs = hashes(folder)
    assert pulled == {name: theirs[name] for name in pulled}


# What is sent, and what is refused


def test_what_is_missing_is_refused_before_any_connection(machine, here):
    env = {"PATH": "/nowhere"}  # there is no ssh
    said = machine.refused("run", "sft.yaml", "data.train=absent.jsonl", cwd=here, env=env)
    assert "data.train: there is no file absent.jsonl here" in said
    assert "ssh: not found here" in machine.refused("run", "sft.yaml", cwd=here, env=env)


def test_a_machine_that_is_not_ready_is_told_in_words(machine, here):
    setup = machine.there / "setup.json"
    kept = setup.read_text()
    setup.write_text(kept.replace(json.loads(kept)["fingerprint"], "another"))
    said = machine.refused("run", "sft.yaml", cwd=here)
    assert "set up for other versions of the packages than constraints.txt has here; run again: lowrank-rlhf" in said
    setup.unlink()
    said = machine.refused("run", "sft.yaml", cwd=here)
    assert "loop: nothing is installed there yet; run: lowrank-rlhf remote up loop" in said
    setup.write_text(kept)


def test_a_run_to_start_from_is_sent_without_its_checkpoints(machine, here, alive):
    earlier = here / "runs" / "earlier"
    for name in ("run.json", "adapters/sft/adapter_model.safetensors", "checkpoints/step-000002/state.pt"):
        (earlier / name).parent.mkdir(parents=True, exist_ok=True)
        (earlier / name).write_text(name)
    shutil.copy(ROOT / "recipes" / "dpo.yaml", here / "dpo.yaml")
    words = ["dpo.yaml", "data.train=data.jsonl", "data.eval=null", "policy_from=runs/earlier"]
    job = machine.run("run", *words, cwd=here).stdout.partition(" ")[0]
    sent = {name: digest for name, digest in hashes(earlier).items() if "checkpoints" not in name}
    assert hashes(alive / f"inputs{earlier}") == sent
    machine.run("stop", job, cwd=here)
    said = machine.refused("run", *words[:-1], "policy_from=runs/neither", cwd=here)
    assert "policy_from: runs/neither is neither here nor there" in said


def test_a_push_leaves_a_running_job_its_code(machine, here, alive, tmp_path):
    """Sent from a copy of this package, which is changed meanwhile; what is started later has the change."""
    copy = tmp_path / "clone"
    shutil.copytree(ROOT / "lowrank_rlhf", copy / "lowrank_rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    env = {"PYTHONPATH": str(copy)}
    job = machine.run("run", "sft.yaml", cwd=here, env=env).stdout.partition(" ")[0]
    code = machine.there / "jobs" / job / "code"
    before = hashes(code / "lowrank_rlhf")
    with (copy / "lowrank_rlhf" / "kl.py").open("a") as file:
        file.write("# changed\n")
    (copy / "lowrank_rlhf" / "losses.py").unlink()
    machine.run("push", cwd=here, env=env)
    now = hashes(machine.there / "code" / "lowrank_rlhf")
    assert now["kl.py"] == hashlib.sha256((copy / "lowrank_rlhf" / "kl.py").read_bytes()).hexdigest() != before["kl.py"]
    assert "losses.py" not in now
    assert {name: digest for name, digest in hashes(code / "lowrank_rlhf").items() if name in before} == before
    machine.run("stop", job, cwd=here)


def test_pull_takes_no_other_folder_and_brings_what_came_later(machine, here, alive):
    job = machine.begun(here, "run_dir=runs/pulled")
    said = machine.refused("pull", job, cwd=here)
    assert f"{job} has written nothing yet; see its log" in said
    run = alive / "runs" / "pulled"
    (run / "adapters").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    (run / "adapters" / "weights").write_text("first")
    (here / "mine").mkdir()
    said = machine.refused("pull", job, "--to", "mine", cwd=here)
    assert f"mine is here already and is not {job} of loop; choose --to DIR" in said
    assert list((here / "mine").iterdir()) == []
    assert f"{job} is running: pull again" in machine.run("pull", job, cwd=here).stdout
    assert (here / "runs/pulled/metrics.jsonl").read_text() == '{"step": 1}\n'  # the whole lines
    times = (run / "adapters" / "weights").stat()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "adapters" / "weights").write_text("other")  # as long, and as old
    os.utime(run / "adapters" / "weights", ns=(times.st_atime_ns, times.st_mtime_ns))
    (alive / "enough").touch()
    machine.wait_for(job, "finished")
    assert "pull again" not in machine.run("pull", job, cwd=here).stdout
    assert hashes(here / "runs/pulled") == hashes(run)
    other = machine.begun(here)
    said = machine.refused("pull", job, "--to", "runs", cwd=here)
    assert f"runs is here already and is not {job}" in said
    (alive / "runs" / other).mkdir()
    (alive / "runs" / other / "run.json").write_text("{}")
    said = machine.refused("pull", other, "--to", "runs/pulled", cwd=here)
    assert f"runs/pulled is here already and is not {other} of loop" in said
