"""Two processes that share every step are one process with the same recipe, and one of them writes.

Real processes of `accelerate launch` with the shipped configuration, on the CPU, where they talk over gloo.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowrank_rlhf import processes
from lowrank_rlhf.cli import main
from tests import ddp
from tests.preference_runs import PAIRS, write

ROOT = Path(__file__).parent.parent
CONFIG = resources.files("lowrank_rlhf.remote") / "ddp.yaml"
STEPS = 3
CLOCKS = ("seconds", "tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
TIMEOUT = 900  # of a launch, on a machine that does other things too


def arguments(stage, data, run_dir, *more):
    """Float32 unless changed. 11 rows are 4 + 2 micro-batches in an epoch of two steps, the last of them half full."""
    changes = {
        "run_dir": run_dir,
        "data.train": data / f"{'sft' if stage == 'sft' else 'pairs'}.jsonl",
        "data.eval": data / f"{'sft' if stage == 'sft' else 'pairs'}_eval.jsonl",
        "data.max_rows": "null",
        "base.quantization": "none",
        "base.device": "cpu",
        "train.max_steps": STEPS,
        "train.batch_size": 8,
        "train.micro_batch_size": 2,
        "train.learning_rate": 1e-3,
        "eval.steps": 2,
    }
    settings = [f"{key}={value}" for key, value in changes.items()]
    return [stage, "--config", str(ROOT / f"recipes/{stage}.yaml"), "--tiny", *settings, *more]


def launch(count, module, *words, **options):
    """Started as in the documentation; never on another training's port."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--num_processes", str(count), "-m", module, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams, **options)


def finished(process):
    """All that it said, when it is done."""
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return said


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of different lengths, of which each process gets others."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [{**row, "prompt": row["prompt"] + "!" * i} for i, row in enumerate(PAIRS)]
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"] + "." * i} for i, row in enumerate(pairs)]
    # KTO makes two rows of a pair
    for name, rows in (("pairs", pairs), ("sft", demonstrations)):
        write(folder / f"{name}.jsonl", rows[:11])
        write(folder / f"{name}_eval.jsonl", rows[11:])
    return folder


COMMANDS = {
    **{stage: (stage, ()) for stage in processes.DIVIDED},
    "ensemble": ("reward", ("reward_model.members=2",)),
    "precomputed": ("dpo", ("dpo.precompute_reference=true",)),
    "nf4": ("dpo", ("base.quantization=nf4", "train.gradient_checkpointing=true")),
    "packed": ("sft", ("train.packing=true",)),
    "whole": ("sft", ("lora.dropout=0.1", "eval.steps=null")),
    "broken": ("sft", ("lora.dropout=0.1", "eval.steps=null")),
    "whole_reward": ("reward", ("lora.dropout=0.1", "eval.steps=null")),
    "broken_reward": ("reward", ("lora.dropout=0.1", "eval.steps=null")),
    "ppo": ("ppo", ()),
    "grpo": ("grpo", ()),
    "uneven": ("sft", ("train.batch_size=6",)),
}
ALIKE = (*processes.DIVIDED, "ensemble", "precomputed", "nf4", "packed")


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The folder of what two processes did with all of the commands: a run of each, and each process's own account."""
    folder = tmp_path_factory.mktemp("two")
    commands = []
    for name, (stage, changes) in COMMANDS.items():
        words = arguments(stage, data, folder / name, *changes)
        if stage in ("ppo", "grpo"):
            words = [stage, "--config", str(ROOT / f"recipes/{stage}.yaml"), "--tiny", f"run_dir={folder / name}"]
        commands.append({"name": name, "arguments": words, "stop": 1 if name.startswith("broken") else None})
        if name.startswith("broken"):
            commands.append({"name": f"{name}_resumed", "arguments": [*words, "--resume"]})
    (folder / "commands.json").write_text(json.dumps(commands))
    process = launch(2, "tests.ddp", folder)
    said = finished(process)
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """The same of a process alone."""
    folder = tmp_path_factory.mktemp("one")
    for name in ALIKE:
        stage, changes = COMMANDS[name]
        found = ddp.train(folder, name, arguments(stage, data, folder / name, *changes))
        assert found["status"] == 0, found["err"]
    return folder


def account(folder, name, rank):
    return torch.load(folder / f"{name}-{rank}.pt")


def rows(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def weights(run_dir):
    files = sorted(run_dir.glob("adapters/*/*.safetensors"))
    return torch.cat([w.flatten().double() for path in files for _, w in sorted(load_file(path).items())])


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_gradients_and_weights_are_those_of_one_process(name, one, two, record_property):
    ours, theirs = account(one, name, 0)["gradients"], [account(two, name, rank)["gradients"] for rank in (0, 1)]
    assert len(ours) == len(theirs[0]) == len(theirs[1]) >= STEPS
    for step, gradient in enumerate(ours):
        assert torch.equal(theirs[0][step], theirs[1][step])
        assert gradient.norm() > 0
    differences = [relative(b, a) for a, b in zip(ours, theirs[0], strict=True)]
    print(f"\n{name}: relative difference of the gradients {differences}")
    assert max(differences) < 1e-5
    moved = relative(weights(two / name), weights(one / name))
    print(f"{name}: relative difference of the weights {moved}")
    assert moved < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_metrics_are_those_of_one_process(name, one, two):
    ours, theirs = rows(one / name), rows(two / name)
    assert [row["step"] for row in theirs] == [row["step"] for row in ours]
    for a, b in zip(ours, theirs, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_one_process_writes_and_prints(name, one, two):
    def files(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*")}

    assert files(two / name) == files(one / name)
    assert json.loads((two / name / "run.json").read_text())["processes"] == 2
    main_process, other = account(two, name, 0), account(two, name, 1)
    assert (main_process["status"], other["status"]) == (0, 0)
    assert other["out"] == ""
    lines = [
        [re.sub(r"\d+ tokens/s.*", "", line) for line in found["out"].splitlines() if " step " in line]
        for found in (main_process, account(one, name, 0))
    ]
    assert lines[0] == lines[1] != []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_stages_with_rollouts_are_refused(stage, two):
    for rank in (0, 1):
        found = account(two, stage, rank)
        assert found["status"] == 2
        assert f"{stage}: rollouts are not divided over processes yet" in found["err"]
    assert not (two / stage).exists()


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share_is_refused(two):
    for rank in (0, 1):
        found = account(two, "uneven", rank)
        assert found["status"] == 2
        assert "train.batch_size: 6 is not a multiple of train.micro_batch_size (2) times 2 processes" in found["err"]
    assert not (two / "uneven").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "step"), [("", 2), ("_reward", 1)])
def test_a_signal_to_one_process_stops_both_and_resuming_gives_the_same_bits(suffix, step, two):
    """While step 1 is logged, which transformers does when it has been decided whether to save.

    Dropout is on, so that each process's own random state matters.
    """
    broken, whole = f"broken{suffix}", f"whole{suffix}"
    assert f"stopped after step {step}" in account(two, broken, 0)["out"]
    for rank in (0, 1):
        assert account(two, broken, rank)["status"] == account(two, f"{broken}_resumed", rank)["status"] == 0
        assert len(account(two, broken, rank)["gradients"]) == step
    assert [path.name for path in (two / broken / "checkpoints").iterdir()] == [f"step-00000{step}"]
    assert torch.equal(weights(two / broken), weights(two / whole))
    assert [row["step"] for row in rows(two / broken)] == [row["step"] for row in rows(two / whole)]


@pytest.mark.slow
def test_sigterm_to_the_launcher_leaves_a_checkpoint_to_go_on_from(data, tmp_path):
    """As `kill` and remote schedulers do it; torchrun hands it on and waits."""
    words = arguments("dpo", data, tmp_path / "run", "train.max_steps=5000", "eval.steps=null", "save.steps=null")
    process = launch(2, "lowrank_rlhf.cli", *words)
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not log.exists() or log.read_text().count("\n") < 4:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = finished(process)
    again = f"accelerate launch --config_file {CONFIG} --num_processes 2 -m lowrank_rlhf.cli dpo --config {tmp_path}"
    assert said.count("go on with:") == said.count(again) == 1, said
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert rows(tmp_path / "run")[-1]["step"] == done < 5000
    recipe = tmp_path / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 5000", f"max_steps: {done + 2}"))
    info = json.loads((tmp_path / "run/run.json").read_text())
    info["recipe"]["train"]["max_steps"] = done + 2
    (tmp_path / "run/run.json").write_text(json.dumps(info))
    process = launch(2, "lowrank_rlhf.cli", "dpo", "--config", recipe, "--resume")
    said = finished(process)
    assert process.returncode == 0, said
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == list(range(1, done + 3))


# Without other processes


def test_not_started_by_a_launcher(tmp_path, monkeypatch, capsys):
    """Their gradients would never meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["sft", "--config", str(ROOT / "recipes/sft.yaml"), "--tiny", f"run_dir={tmp_path}/run"]) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE: says 2 processes, but RANK is not set; unset it, or")
    assert not (tmp_path / "run").exists()


def test_one_card_for_all_is_refused(tmp_path, monkeypatch, capsys):
    for name in ("WORLD_SIZE", *processes.LAUNCHER_SETS):
        monkeypatch.setenv(name, "2")
    words = ["--tiny", f"run_dir={tmp_path}/run", "base.device=cuda:0"]
    assert main(["sft", "--config", str(ROOT / "recipes/sft.yaml"), *words]) == 2
    assert "base.device: cuda:0 is one card for 2 processes" in capsys.readouterr().err


def test_a_pipeline_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(ROOT)
    assert main(["pipeline", "--tiny", "--run-dir", str(tmp_path / "runs")]) == 2
    assert "pipeline: several processes cannot share it" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_process_alone_has_everything():
    assert processes.is_main()
    assert processes.share([1, 2, 3]) == processes.together([1, 2, 3]) == [1, 2, 3]
    assert processes.gather("mine") == ["mine"]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_put_together_are_the_whole(count):
    whole = list(range(7))
    assert processes.interleave([whole[rank::count] for rank in range(count)]) == whole
