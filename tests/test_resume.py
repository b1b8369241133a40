"""A run that was killed, stopped or out of disk goes on to bit-identical weights.

Real SIGKILLs in processes of their own, also while a checkpoint is half on the disk; see tests/kill.py.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from lowrank_rlhf.checkpoints import Checkpoints
from lowrank_rlhf.cli import STAGES
from lowrank_rlhf.errors import UserError
from tests import kill

ROOT = Path(__file__).parent.parent
STEPS = 30

# Started once with everything imported, then forked: seconds less for each of the many processes
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.kill", *(f"lowrank_rlhf.stages.{stage}" for stage in STAGES)])


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def attempt(log, moment, count, *arguments):
    """Exit status of one training, which is disturbed at a moment; negative is the signal that killed it."""
    process = processes.Process(target=_child, args=(str(log), moment, count, arguments))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the training hangs"
    return process.exitcode


def _child(log, moment, count, arguments):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    status = kill.main(moment, count, *arguments)
    sys.stdout.flush()
    os._exit(status)


def arguments(stage, run_dir, steps, *more):
    changes = [*more, f"train.max_steps={steps}", "save.steps=2", f"run_dir={run_dir}"]
    if stage in ("ppo", "grpo"):
        changes.append(f"{stage}.inner_epochs=1")
    if stage in ("sft", "reward"):
        changes.append("lora.dropout=0.1")  # so that the random state matters
    return [stage, "--config", f"recipes/{stage}.yaml", "--tiny", *changes]


def weights(run_dir):
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in sorted(run_dir.glob("adapters/*/*.safetensors"))}


LOGS, RUNS = ("samples.jsonl", "warnings.jsonl"), ("whole", "broken")


def steps_logged(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check(tmp_path, stage, disturbances, steps, *more):
    """The disturbed run ends with the weights and the metrics rows of the undisturbed one."""
    log, whole, broken = tmp_path / "log", tmp_path / "whole", tmp_path / "broken"
    assert attempt(log, "never", 1, *arguments(stage, whole, steps, *more)) == 0, log.read_text()
    resume = []
    for moment, count, status in disturbances:
        assert attempt(log, moment, count, *arguments(stage, broken, steps, *more), *resume) == status, log.read_text()
        assert "final" not in json.loads((broken / "run.json").read_text()), "it was to be disturbed before its end"
        if moment == "sigterm":
            assert f"lowrank-rlhf {stage} --config {broken}/recipe.yaml --resume" in log.read_text()
        if moment == "disk":
            assert "the disk is full" in log.read_text()
            assert "Traceback" not in log.read_text()
        resume = ["--resume"]
    assert attempt(log, "never", 1, *arguments(stage, broken, steps, *more), "--resume") == 0, log.read_text()
    assert weights(whole)
    assert weights(broken) == weights(whole)
    assert steps_logged(broken) == steps_logged(whole)


KILLED = -signal.SIGKILL
STOPPED = 128 + signal.SIGTERM


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """Once between two steps, once inside the write of a checkpoint."""
    check(tmp_path, "ppo", [("log", 5, KILLED), ("write", 2, KILLED)], steps=8)


def test_everything_that_ppo_steers_by_goes_on_too(tmp_path):
    """KL controller, running statistics, SFT mix, refreshed reference, stop on approx-KL, schedule: killed twice."""
    options = [
        "kl.target=0.5",
        "kl.horizon=8",
        "kl.refresh_steps=3",
        "reference=auto",
        "shaping.scale=true",
        "shaping.whiten=true",
        "ptx.data=recipes/quickstart/data/demonstrations.jsonl",
        "ppo.target_kl_stop=0.01",
        "train.learning_rate=0.01",
        "train.lr_schedule=linear",
        "rollout.show_steps=1",
    ]
    check(tmp_path, "ppo", [("log", 4, KILLED), ("log", 4, KILLED)], 8, *options)
    logs = [{name: path.read_bytes() for name in LOGS if (path := tmp_path / run / name).exists()} for run in RUNS]
    assert logs[0] == logs[1]  # the same warnings too, or none
    assert logs[0]["samples.jsonl"] != b""


def test_what_grpo_steers_by_goes_on_too(tmp_path):
    """As above, with a reward that tells the tiny model's answers apart."""
    options = [
        "data.train=recipes/quickstart/data/prompts_train.jsonl",
        "data.eval=null",
        "reward=tests.reward_functions:lowercase",
        "kl.target=0.5",
        "kl.horizon=8",
        "kl.refresh_steps=3",
        "shaping.scale=true",
        "grpo.target_kl_stop=0.01",
        "train.learning_rate=0.01",
        "train.lr_schedule=linear",
        "rollout.show_steps=1",
    ]
    check(tmp_path, "grpo", [("log", 4, KILLED), ("write", 2, KILLED)], 8, *options)


def test_rewards_beside_generation_leave_nothing_behind_in_a_checkpoint(tmp_path):
    """Two of eight answers at a time, so that there is always something to overlap."""
    options = ["reward=tests.reward_functions:each_lowercase", "rollout.batch_size=2", "train.learning_rate=0.01"]
    check(tmp_path, "grpo", [("log", 4, KILLED)], 6, *options)


def test_an_ensemble_goes_on_with_the_member_that_was_learning(tmp_path):
    """Six steps a member: killed in the first, between them and in the second."""
    kills = [("log", 4, KILLED), ("log", 6, KILLED), ("log", 4, KILLED)]
    check(tmp_path, "reward", kills, 6, "reward_model.members=2", "eval.steps=3", "eval.patience=9")


@pytest.mark.parametrize("stage", ["dpo", "orpo", "kto"])
def test_learning_from_preferences_goes_on_with_its_best_and_its_order(stage, tmp_path):
    """Killed between two steps and inside the write of a checkpoint, in the second epoch too."""
    options = ["eval.steps=3", "eval.patience=9", "train.learning_rate=0.01"]
    check(tmp_path, stage, [("log", 6, KILLED), ("write", 2, KILLED)], 8, *options)


def test_dpo_goes_on_with_the_reference_it_started_with(tmp_path):
    """A frozen copy of an SFT adapter, whose log-probs are computed before training."""
    sft = tmp_path / "sft"
    assert attempt(tmp_path / "log", "never", 1, *arguments("sft", sft, 2)) == 0
    options = [f"policy_from={sft}", "dpo.precompute_reference=true", "train.learning_rate=0.01"]
    check(tmp_path, "dpo", [("log", 6, KILLED)], 8, *options)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_many_kills_stops_and_a_full_disk(stage, tmp_path):
    """In each stage: 7 SIGKILLs, 4 of them while a checkpoint is written, 2 SIGTERMs and a full disk."""
    disturbances = [
        ("log", 4, KILLED),
        ("write", 1, KILLED),
        ("write", 3, KILLED),
        ("sigterm", 5, STOPPED),
        ("rename", 1, KILLED),
        ("log", 6, KILLED),
        ("disk", 5, 2),
        ("write", 6, KILLED),
        ("sigterm", 3, STOPPED),
        ("log", 3, KILLED),
    ]
    check(tmp_path, stage, disturbances, steps=STEPS)


@pytest.mark.slow
def test_ppo_killed_at_twenty_random_moments(tmp_path):
    """By the clock, wherever the run then is, and every third time while a checkpoint is written."""
    random, log, steps, kills = Random(0), tmp_path / "log", 40, 0
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert attempt(log, "never", 1, *arguments("ppo", whole, steps)) == 0, log.read_text()
    while kills < 20:
        moment = ("write", random.randint(1, 9)) if kills % 3 == 0 else ("clock", random.randint(0, 1500))
        resume = ["--resume"] if (broken / "run.json").exists() else []
        status = attempt(log, *moment, *arguments("ppo", broken, steps), *resume)
        assert status in (0, KILLED), log.read_text()
        kills += status == KILLED
        if status == 0:  # it was done before it was to be killed: the rest of the kills are another run's
            assert weights(broken) == weights(whole)
            shutil.rmtree(broken)
    assert attempt(log, "never", 1, *arguments("ppo", broken, steps), "--resume") == 0, log.read_text()
    assert weights(broken) == weights(whole)
    assert steps_logged(broken) == steps_logged(whole)


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A tmpfs of 2 MiB, filled up after the first checkpoint and emptied again."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        log, whole = tmp_path / "log", tmp_path / "whole"
        assert attempt(log, "never", 1, *arguments("ppo", whole, 8)) == 0
        broken = small / "run"
        assert attempt(log, "sigterm", 4, *arguments("ppo", broken, 8)) == STOPPED
        last = Checkpoints(broken / "checkpoints", 2).latest()
        before = {path.name: path.read_bytes() for path in last.iterdir()}
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        assert shutil.disk_usage(small).free == 0
        assert attempt(log, "never", 1, *arguments("ppo", broken, 8), "--resume") == 2
        assert "the disk is full" in log.read_text()
        assert "Traceback" not in log.read_text()
        assert {path.name: path.read_bytes() for path in last.iterdir()} == before
        (small / "filler").unlink()
        assert attempt(log, "never", 1, *arguments("ppo", broken, 8), "--resume") == 0, log.read_text()
        assert weights(broken) == weights(whole)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Checkpoints alone


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (9, 10, 11):
        with checkpoints.write(step) as folder:
            (folder / "state").write_text(str(step))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000010", "step-000011"]
    assert (checkpoints.latest() / "state").read_text() == "11"


def test_an_error_while_filling_a_checkpoint_leaves_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    with checkpoints.write(1) as folder:
        (folder / "state").write_text("1")
    words = "step 2 could not be written: the disk is full; step-000001 is intact"
    with pytest.raises(UserError, match=words), checkpoints.write(2):
        kill.fill_the_disk()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000001"]
