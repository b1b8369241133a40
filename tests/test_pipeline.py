"""The pipeline in its tiny form: what it leaves, what it keeps, what a kill costs, and what it refuses."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from random import Random

import pytest

from lowrank_rlhf.cli import main
from lowrank_rlhf.pipeline import run_pipeline
from lowrank_rlhf.pipeline_recipes import load_pipeline
from lowrank_rlhf.runs import Interrupted, Run
from tests import kill

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "ppo", "dpo")
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.kill", "lowrank_rlhf.pipeline", *(f"lowrank_rlhf.stages.{s}" for s in STAGES)])


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def words(folder, *overrides):
    return ["pipeline", "--tiny", "--run-dir", str(folder), *overrides]


def weights(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/adapters/*/*.safetensors"))}


def report(folder):
    """All figures but what depends on the clock or the folder's name."""
    values = json.loads((folder / "comparison/report.json").read_text())
    answers = (folder / "comparison/answers.jsonl").read_bytes()
    figures = [(p["name"], p["against"], p["metrics"], p["differences"]) for p in values["policies"]]
    return figures, values["notes"], answers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "runs"
    os.chdir(ROOT)
    assert main(words(folder)) == 0
    return folder


def test_what_it_leaves(whole):
    page = (whole / "report.md").read_text()
    assert [p[0] for p in report(whole)[0]] == ["base", "sft", "ppo", "dpo"]
    assert {p[1] for p in report(whole)[0]} == {"sft"}
    heads = next(line for line in page.splitlines() if line.startswith("| policy |"))
    for head in ("reward", "gold", "win rate", "KL to base", "tokens", "gold − sft", "minutes", "memory, GiB"):
        assert f"| {head} |" in heads
    for name in STAGES:
        run = json.loads((whole / name / "run.json").read_text())
        assert f"| {name} | " in page
        assert f"| {run['minutes']} | {run['peak_memory_gib']['ram']} |" in page
    for plot in ("scores", "frontier"):
        assert (whole / f"comparison/{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(comparison/{plot}.png)" in page


def test_each_stage_starts_from_sft_and_is_scored_by_reward(whole):
    pipeline = load_pipeline("recipes/pipeline.yaml", [], run_dir=str(whole), everything=False, tiny=True)
    ppo = pipeline.recipes["ppo"]
    assert (ppo.policy_from, [source.run for source in ppo.reward_from]) == (f"{whole}/sft", [f"{whole}/reward"])


def test_again_it_keeps_everything(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != "report.md"}
    assert main(words(whole)) == 0
    said = capsys.readouterr().out
    for name in (*STAGES, "comparison"):
        assert f"{name}: unchanged, kept as it is in {whole}/{name}" in said
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != "report.md"} == before


def test_another_recipe_makes_that_stage_and_what_follows_anew_and_loses_nothing(whole, tmp_path, capsys):
    folder = tmp_path / "runs"
    assert main(words(folder)) == 0
    old = weights(folder)
    capsys.readouterr()
    assert main(words(folder, "reward.train.learning_rate=0.01")) == 0
    said = capsys.readouterr().out
    assert f"sft: unchanged, kept as it is in {folder}/sft" in said
    assert f"reward: made from other data or another recipe; the earlier one is now {folder}/reward.before-1" in said
    new = weights(folder)
    for name, value in old.items():
        stage, _, rest = name.partition("/")
        if stage in ("sft", "dpo"):  # no reward model is in them
            assert new[name] == value
        else:
            assert new[name] != value
            assert new[f"{stage}.before-1/{rest}"] == value
    assert (folder / "comparison.before-1/report.json").is_file()


def attempt(log, moment, count, *arguments):
    process = processes.Process(target=_child, args=(str(log), moment, count, arguments))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "the pipeline hangs"
    return process.exitcode


def _child(log, moment, count, arguments):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    status = kill.main(moment, count, *arguments)
    sys.stdout.flush()
    os._exit(status)


def test_killed_at_ten_random_moments_it_reports_the_same(whole, tmp_path):
    """By the clock, from its start on: while a stage trains or loads, between two, and in the comparison."""
    random = Random(0)
    folder, log = tmp_path / "runs", tmp_path / "log"
    kills = 0
    while kills < 10:
        status = attempt(log, "start", random.randint(100, 4000), *words(folder))
        assert status in (0, -signal.SIGKILL), log.read_text()
        if status == 0:  # finished before the kill: once more from nothing
            assert report(folder) == report(whole)
            folder = tmp_path / f"runs-{kills}"
        else:
            kills += 1
    assert attempt(log, "never", 1, *words(folder)) == 0, log.read_text()
    assert weights(folder) == weights(whole)
    assert report(folder) == report(whole)


def test_sigterm_saves_and_the_same_command_goes_on(whole, tmp_path):
    folder, log = tmp_path / "runs", tmp_path / "log"
    assert attempt(log, "sigterm", 1, *words(folder, "sft.train.max_steps=6")) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in log.read_text()
    assert not (folder / "reward").exists()
    assert attempt(log, "never", 1, *words(folder, "sft.train.max_steps=6")) == 0, log.read_text()
    assert (folder / "report.md").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_steps=1"], "'train.max_steps=1': begin with a stage of the pipeline (sft, reward, ppo"),
        (["ppo.train.max_step=1"], "train.max_step: unknown key; did you mean train.max_steps?"),
        (["comparison.sample=2"], "comparison.sample: unknown key; did you mean comparison.samples?"),
        (["comparison.columns={prompt: question}"], "prompts_test.jsonl, row 1: there is no column 'question'"),
    ],
)
def test_bad_input_is_told_before_anything_trains(overrides, message, tmp_path, capsys):
    assert main(words(tmp_path / "runs", *overrides)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_comparison_reads_prompts_as_a_stage_does(tmp_path, monkeypatch):
    """Columns, rows that do not fit, and how many."""
    rows = [{"answer": "#### 0"}, *({"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9))]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"prompts={tmp_path}/gsm8k.jsonl", "columns={prompt: question}", "format=prompt", "on_bad_row=skip"]
    words = [f"comparison.{change}" for change in changes]
    pipeline = load_pipeline("recipes/pipeline.yaml", words, run_dir=str(tmp_path), everything=False, tiny=True)
    asked = []
    monkeypatch.setattr("lowrank_rlhf.pipeline.run_stage", lambda *stage: None)
    monkeypatch.setattr("lowrank_rlhf.pipeline.write_pipeline_report", lambda *page: None)
    monkeypatch.setattr("lowrank_rlhf.pipeline.compare_policies", lambda _, prompts, show: asked.extend(prompts))
    run_pipeline(pipeline)
    assert [e.prompt[0]["content"] for e in asked] == [f"{i} + 1?" for i in range(6)]
    assert {e.columns["answer"] for e in asked} == {f"#### {i + 1}" for i in range(6)}


def test_an_unknown_stage_is_told(tmp_path, capsys):
    config = tmp_path / "p.yaml"
    config.write_text("stages: {sft: recipes/sft.yaml, pppo: recipes/ppo.yaml}\ncomparison: {prompts: x.jsonl}\n")
    assert main([*words(tmp_path / "runs"), "--config", str(config)]) == 2
    assert f"{config}: stages.pppo: no such stage; there are sft, reward, ppo" in capsys.readouterr().err


def test_a_stop_in_the_last_step_of_a_stage_stops_before_the_next(tmp_path, monkeypatch):
    pipeline = load_pipeline("recipes/pipeline.yaml", [], run_dir=str(tmp_path), everything=False, tiny=True)
    finish = Run.finish

    def asked_at_the_end(self, **final):
        finish(self, **final)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "finish", asked_at_the_end)
    with pytest.raises(Interrupted, match=r"stopped after step 2, which is saved in .*sft"):
        run_pipeline(pipeline)
    assert "final" in json.loads((tmp_path / "sft" / "run.json").read_text())
    assert not (tmp_path / "reward").exists()
