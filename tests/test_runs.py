"""What a run shows while it trains and leaves besides weights: progress, early stopping, trackers, plots, samples."""

import json
import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_rlhf import processes
from lowrank_rlhf.cli import main
from lowrank_rlhf.config import Data, Eval, SFTRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.early_stopping import Best

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(stage, run_dir, *overrides):
    assert main([stage, "--config", f"recipes/{stage}.yaml", "--tiny", f"run_dir={run_dir}", *overrides]) == 0
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_resuming_a_finished_run_leaves_it_as_it_is(tmp_path, capsys):
    run("ppo", tmp_path / "run", "save.steps=1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run("ppo", tmp_path / "run", "save.steps=1", "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# Early stopping


def test_the_best_weights_come_back_after_patience_runs_out():
    """Losses 3, 2, 4, 5 with patience 2: stop at the fourth, keep the weights of the second."""
    weight = nn.Parameter(torch.zeros(1))
    best = Best([weight], Eval(steps=1, patience=2))
    stops = []
    for loss in (3.0, 2.0, 4.0, 5.0):
        with torch.no_grad():
            weight += 1
        stops.append(best.update(loss))
    best.restore()
    assert stops == [False, False, False, True]
    assert weight.item() == 2


def test_without_patience_nothing_stops_and_the_last_weights_stay():
    weight = nn.Parameter(torch.ones(1))
    best = Best([weight], Eval(steps=1))
    assert not any(best.update(loss) for loss in (1.0, 2.0, 3.0))
    best.restore()
    assert weight.item() == 1


def test_patience_without_steps_is_refused():
    with pytest.raises(UserError, match=r"^eval\.patience: needs eval\.steps"):
        Best([], Eval(patience=1))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stage_stops_early_and_saves_its_best(stage, tmp_path, capsys):
    """A learning rate that only does harm: the first evaluation is the best, two worse ones end the run."""
    overrides = ["train.max_steps=40", "train.learning_rate=3", "train.lr_schedule=constant"]
    rows = run(stage, tmp_path / "run", *overrides, "eval.steps=2", "eval.patience=2")
    assert "stopping" in capsys.readouterr().out
    assert max(row["step"] for row in rows) < 40
    key, sign = ("eval_loss", 1) if stage == "sft" else ("eval_accuracy", -1)
    held_out = [sign * row[key] for row in rows if key in row and row["step"] > 0]
    final = json.loads((tmp_path / "run/run.json").read_text())["final"]
    assert sign * final[key] == min(held_out)


# Being stopped


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(tmp_path, monkeypatch):
    run = Run(SFTRecipe(run_dir=str(tmp_path / "run"), data=Data("data.jsonl")))

    def gather(stopping):
        os.kill(os.getpid(), signal.SIGTERM)
        return [stopping]

    with run.stop_on_signal():
        with monkeypatch.context() as patch:
            patch.setattr(processes, "gather", gather)
            assert not run.is_due(1)
        assert run.is_due(2)


# What a run leaves


def test_sft_leaves_plots_and_samples(tmp_path, capsys):
    run("sft", tmp_path / "run")
    assert {path.name for path in (tmp_path / "run/plots").iterdir()} >= {"loss.png", "accuracy.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (tmp_path / "run/plots").iterdir())
    samples = (tmp_path / "run/samples.md").read_text()
    assert samples.count("- before: ") == samples.count("- after: ") > 0
    out = capsys.readouterr().out
    assert "tokens/s" in out
    assert "0:00 left" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("run.json", "recipe.yaml", "metrics.jsonl", "samples.md", "adapters", "plots")
    }


def test_ppo_leaves_its_curves(tmp_path):
    run("ppo", tmp_path / "run")
    drawn = {path.stem for path in (tmp_path / "run/plots").iterdir()}
    assert drawn >= {"reward", "kl", "length", "entropy", "clip_fraction", "explained_variance", "loss", "frontier"}


def test_sft_without_held_out_rows(tmp_path):
    rows = run("sft", tmp_path / "run", "data.eval_fraction=0")
    assert not any("eval_loss" in row for row in rows)


def test_a_batch_that_micro_batches_do_not_fill_is_refused(tmp_path, capsys):
    arguments = ["sft", "--config", "recipes/sft.yaml", "--tiny", f"run_dir={tmp_path}/run", "train.batch_size=3"]
    assert main(arguments) == 2
    assert "train.batch_size: 3 is not a multiple of train.micro_batch_size (2)" in capsys.readouterr().err


# Trackers


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_every_number_of_metrics_jsonl(name, tmp_path, monkeypatch):
    """Against a stand-in that records the calls: both libraries have these three functions."""
    calls = {"init": [], "log": [], "finish": []}
    library = types.ModuleType(name)
    library.__spec__ = types.SimpleNamespace(name=name)
    for function, seen in calls.items():
        setattr(library, function, lambda *args, _seen=seen, **kwargs: _seen.append((args, kwargs)))
    monkeypatch.setitem(sys.modules, name, library)
    rows = run("reward", tmp_path / "run", f"track.report_to=[{name}]", "track.project=mine")
    assert calls["init"][0][1]["project"] == "mine"
    assert calls["init"][0][1]["name"] == "run"
    assert [{"step": kwargs["step"], **args[0]} for args, kwargs in calls["log"]] == rows
    assert len(calls["finish"]) == 1


def test_tensorboard_writes_into_the_run(tmp_path):
    pytest.importorskip("tensorboard", reason="the track extra is not installed")
    run("reward", tmp_path / "run", "track.report_to=[tensorboard]")
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert events.stat().st_size > 500


def test_a_tracker_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["reward", "--config", "recipes/reward.yaml", "--tiny", f"run_dir={tmp_path}/run"]
    assert main([*arguments, "track.report_to=[wandb]"]) == 2
    assert "track.report_to: wandb is not installed; pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
