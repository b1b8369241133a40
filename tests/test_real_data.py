"""SFT, reward model, PPO and DPO on the embedded model and published data, one base in memory throughout.

Minutes rather than seconds, so only `pytest -m slow` runs it; it reads the files from $LOWRANK_RLHF_DATA.
"""

import json
import math
import os
import re
from pathlib import Path

import pytest

from lowrank_rlhf.cli import main

DATA = os.environ.get("LOWRANK_RLHF_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="LOWRANK_RLHF_DATA does not name the folder of the real data"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch, bases_seen):
    monkeypatch.chdir(Path(__file__).parent.parent)
    yield
    assert bases_seen == {(210, 210)}, "30 layers × 7 quantised projections, each once"


def stage(name, run_dir, *overrides):
    """Run a stage with its recipe; its metrics rows."""
    assert main([name, "--config", f"recipes/{name}.yaml", f"run_dir={run_dir}", *overrides]) == 0
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_sft_on_alpaca_lowers_the_held_out_loss(runs):
    rows = stage(
        "sft",
        runs / "sft",
        f"data.train={DATA}/alpaca_en.json",
        "data.max_rows=200",
        "data.max_completion_tokens=128",
        "train.max_steps=15",
        "train.micro_batch_size=4",
        "train.batch_size=8",
    )
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert rows[0]["step"] == 0
    assert losses[0] == rows[0]["eval_loss"]
    assert losses[-1] < losses[0]
    print(f"eval_loss {losses[0]:.4f} -> {losses[-1]:.4f}")


HH = [
    f"data.train={DATA}/hh_harmless_train.jsonl.gz",
    "data.max_rows=400",
    "data.max_prompt_tokens=192",
    "data.max_completion_tokens=96",
]


def test_reward_model_on_hh_trains_and_prints_its_accuracy(runs, capsys):
    rows = stage("reward", runs / "reward", *HH, "train.epochs=1", "train.batch_size=8", "train.micro_batch_size=2")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert abs(rows[0]["eval_loss"] - 0.6931) < 1e-3, "a zero head gives log 2"
    assert sum(losses[-20:]) / 20 < math.log(2), "of pairs that were not trained on before: one epoch"
    printed = capsys.readouterr().out
    accuracy, low, high = map(float, re.search(r"^accuracy (0\.\d+) \[(0\.\d+), (0\.\d+)\]$", printed, re.M).groups())
    assert low <= accuracy <= high


def test_ppo_against_that_reward_model_runs_three_iterations(runs):
    rows = stage(
        "ppo",
        runs / "ppo",
        *HH,
        "data.max_completion_tokens=48",
        f"policy_from={runs}/sft",
        f"reward_from=[{{run: {runs}/reward}}]",
        "reward=null",
        "reference=auto",
        "train.max_steps=3",
        "train.micro_batch_size=4",
    )
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["objective/kl"] == 0
    assert rows[0]["val/ratio"] == 1
    assert all(row["policy/grad_norm"] > 0 and row["value/grad_norm"] > 0 for row in rows[1:])
    assert {path.name for path in (runs / "ppo/adapters").iterdir()} == {"policy", "value"}


def test_dpo_on_sharegpt_preferences_loads_and_trains(runs):
    """Dialogues of up to thousands of tokens, cut; from the base, so the first loss is log 2 in 4 bit too."""
    rows = stage(
        "dpo",
        runs / "dpo",
        f"data.train={DATA}/dpo_sharegpt.json",
        "data.max_rows=60",
        "data.max_completion_tokens=64",
        "train.max_steps=2",
        "train.batch_size=4",
        "train.micro_batch_size=2",
    )
    assert abs(rows[0]["eval_loss"] - math.log(2)) < 1e-3
    assert rows[0]["eval_rewards/margins"] == 0
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    assert rows[-1]["eval_rewards/margins"] != 0
