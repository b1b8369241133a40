"""What the Runs tab shows of run directories in every state, and that nothing in them becomes markup."""

import json
import os
import time
from pathlib import Path

import pytest

from lowrank_rlhf.arena.chat.scan import Problem
from lowrank_rlhf.arena.pages import run_view
from lowrank_rlhf.arena.pages.charts import HEIGHT, WIDTH, chart, ticks
from lowrank_rlhf.arena.trainings import read_runs

RECIPE = "stage: ppo\nrun_dir: runs/ppo\n"


def make(folder, info=None, metrics="", **files):
    folder.mkdir(parents=True)
    if info is not None:
        (folder / "run.json").write_text(info if isinstance(info, str) else json.dumps(info))
    if metrics:
        (folder / "metrics.jsonl").write_text(metrics)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def age(folder, seconds):
    for file in folder.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    done = {"stage": "sft", "final": {"eval_loss": 1.3}, "minutes": 2.3, "recipe": {"train": {"max_steps": 20}}}
    make(folder / "sft", done, lines({"step": 0, "eval_loss": 1.5}, {"step": 20, "eval_loss": 1.3}))
    going = {"stage": "ppo", "recipe": {"train": {"max_steps": 50}}}
    make(folder / "pipeline" / "ppo", going, lines({"step": 1, "objective/kl": 0.0}), recipe_yaml=RECIPE)
    slow = make(
        folder / "slow", {"stage": "dpo"}, lines({"step": 1, "loss": 0.7, "seconds": 120.0}), recipe_yaml=RECIPE
    )
    age(slow, 900)  # 15 minutes of silence, where a step takes 2
    killed = make(
        folder / "killed", {"stage": "dpo"}, lines({"step": 1, "loss": 0.7, "seconds": 9.0}), recipe_yaml=RECIPE
    )
    age(killed, 900)
    make(folder / "evaluation-1", report_md="# Policies\n\n![wins](plots/wins.png) see [this](report.json) <b>!</b>\n")
    make(folder / "notes", text_txt="no run")
    make(folder / ".hidden", {"stage": "sft", "final": {}})
    return folder


def test_states_steps_and_names(runs):
    found = {run.name: run for run in read_runs(runs)}
    states = {name: run.state for name, run in found.items()}
    assert states == {
        "sft": "finished",
        "pipeline/ppo": "running",
        "slow": "running",
        "killed": "stopped",
        "evaluation-1": "report",
    }
    assert (found["sft"].step, found["sft"].minutes, found["sft"].stage) == (20, 2.3, "sft")
    assert (found["pipeline/ppo"].step, found["pipeline/ppo"].max_steps) == (1, 50)
    assert found["killed"].minutes == pytest.approx(0, abs=0.1)
    assert all(run.problems == [] for run in found.values())
    assert set(list(found)[-2:]) == {"slow", "killed"}  # they wrote longest ago


def test_no_folder_and_an_empty_one_say_what_to_do(tmp_path):
    assert read_runs(tmp_path / "none") == read_runs(tmp_path) == []
    assert "recipes/sft.yaml" in run_view.runs_table([], "runs")


def test_links_that_lead_out_of_the_folder_are_left_out(runs, tmp_path):
    make(tmp_path / "secret", {"stage": "sft", "final": {}})
    (runs / "out").symlink_to(tmp_path / "secret")
    (runs / "pipeline" / "up").symlink_to("../../secret")
    (runs / "again").symlink_to("sft")
    (runs / "loop").symlink_to(runs / "loop")
    names = {run.name for run in read_runs(runs)}
    assert names.isdisjoint({"out", "pipeline/up", "loop"})
    assert "again" in names


def test_broken_files_are_problems_in_words(tmp_path):
    broken = '{"step": 1, "loss": 0.7}\n{"step": 2, "lo\nnull\n[1]\n{"step": 3, "loss": 0.5}\n{"step": 4, "lo'
    make(tmp_path / "runs" / "a", "{garbled", broken)
    make(tmp_path / "runs" / "b", None, lines({"step": 1, "loss": 1.0}))
    make(tmp_path / "runs" / "c", "[]", "".join(f"{n}\n" for n in range(9)))
    make(tmp_path / "runs" / "d", {"final": "x", "recipe": 3, "minutes": "y"}, '{"step": "x"}\n{"loss": 1}\n')
    found = {run.name: run for run in read_runs(tmp_path / "runs")}
    # The last line has no end yet: it is being written, and no problem
    assert [row["step"] for row in found["a"].rows] == [1, 3]
    assert found["a"].problems[0].startswith("run.json: cannot be read")
    assert [words.split(":")[0] for words in found["a"].problems[1:]] == [f"metrics.jsonl, line {n}" for n in (2, 3, 4)]
    assert "run.json: missing" in found["b"].problems[0]
    assert found["c"].problems[-1] == "metrics.jsonl: 4 more lines like these"
    assert (found["d"].final, found["d"].max_steps, found["d"].minutes, found["d"].rows) == ({}, None, None, [])
    for run in found.values():  # and everything can be shown
        page = run_view.overview(run) + run_view.curves(run) + run_view.recipe(run) + run_view.report(run)
        assert page + run_view.runs_table([run], "runs")


def test_numbers_that_break_charts(tmp_path):
    rows = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1' + "0" * 400 + '}\n{"step": 3, "loss": true}\n'
    rows += '{"step": 4, "loss": 2.0}\n{"step": 5, "loss": -1e308}\n{"step": 6, "loss": 1.0}\n'
    run = make(tmp_path / "runs" / "a", {}, rows) and read_runs(tmp_path / "runs")[0]
    [(plot, curves)] = run.curves()
    assert (plot.title, list(curves)) == ("Loss", ["loss"])
    assert "nan" not in run_view.curves(run).lower().replace("nanosecond", "")


def test_a_curve_is_where_its_numbers_say():
    """Steps 0 to 10 and values 0 to 1 fill the figure's box: (48, 176) is its lower left corner, (352, 8) the other."""
    drawn = chart("Loss", "loss", {"loss": ([0, 5, 10], [0.0, 0.5, 1.0])})
    assert 'points="48.0,176.0 200.0,92.0 352.0,8.0"' in drawn
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in drawn


def test_gaps_and_long_curves():
    nan = float("nan")
    drawn = chart("x", "y", {"a": ([0, 1, 2, 3, 4], [1.0, 2.0, nan, 3.0, 4.0])})
    assert drawn.count("<polyline") == 2
    long = chart("x", "y", {"a": (list(range(100_000)), [float(n % 7) for n in range(100_000)])})
    assert len(long) < 20_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.1), (1e-9, 2e-9), (0, 1e200), (5, 5), (0.999, 1.001)])
def test_ticks_are_within_and_few(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 5
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)


def test_text_of_runs_is_no_markup(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    folder = make(
        tmp_path / "runs" / "<b>x",
        {"stage": evil, "final": {evil: 1.0}, "base": {"model": evil, "quantization": evil}},
        lines({"step": 1, "loss": 1.0, "time/" + evil: 1.0}, {"step": 2, "loss": 1.0, "time/" + evil: 2.0}),
        recipe_yaml=evil,
        report_md=f"# {evil}\n\n[x](javascript:alert(1)) ![x](http://evil.example/x.png)\n\n{evil}\n",
    )
    row = {"step": 2, "prompt": evil, "completion": evil, "score": evil}
    (folder / "samples.jsonl").write_text(lines(row, {**row, "prompt": [{"role": evil, "content": evil}, evil]}))
    (folder / "warnings.jsonl").write_text(lines({"step": evil, "warning": evil}))
    [run] = read_runs(tmp_path / "runs")
    shown = [run_view.runs_table([run], evil), run_view.overview(run), run_view.curves(run), run_view.recipe(run)]
    shown += [run_view.report(run), run_view.samples(run.samples()[2]), run_view.problems([Problem(folder, evil)])]
    page = "".join(shown)
    assert "&lt;script&gt;" in page
    for piece in ("<script", "<img", "<b>x", "javascript:", "<a "):
        assert piece not in page, piece


NO_STEPS = ("NaN", "Infinity", "-Infinity", "1" + "0" * 400, "true", '"7"', "null", "[1]")


def test_lines_without_a_step_are_left_out_of_curves_and_samples(tmp_path):
    folder = make(
        tmp_path / "runs" / "a",
        {"stage": "ppo"},
        lines({"step": 1, "loss": 1.0}, {"step": 2.0, "loss": 2.0})
        + "".join(f'{{"step": {step}, "loss": 9.0}}\n' for step in NO_STEPS),
    )
    sample = {"prompt": "Why?", "completion": "Because."}
    (folder / "samples.jsonl").write_text(
        lines({"step": 1, **sample}, {"step": 2.0, **sample})
        + "".join(f'{{"step": {step}, "prompt": "x", "completion": "y"}}\n' for step in NO_STEPS)
    )
    [run] = read_runs(tmp_path / "runs")
    assert run.step == 2
    [(_, curves)] = run.curves()
    assert curves == {"loss": ([1, 2.0], [1.0, 2.0])}
    assert {step: len(rows) for step, rows in run.samples().items()} == {1: 1, 2: 1}
    assert run_view.runs_table([run], "runs") + run_view.overview(run) + run_view.curves(run)


def test_a_file_that_vanishes_between_two_looks_at_it_is_none(runs, monkeypatch):
    before = {run.name for run in read_runs(runs)}
    real = Path.stat

    def gone(path, **options):
        if path.name in {"metrics.jsonl", "recipe.yaml"}:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "exists", lambda path: os.path.exists(path))  # it was there when it was asked for
    monkeypatch.setattr(Path, "stat", gone)
    found = {run.name: run for run in read_runs(runs)}
    assert found.keys() == before
    assert found["slow"].minutes is None
    assert all(run_view.overview(run) for run in found.values())


def test_samples_by_step(tmp_path):
    folder = make(tmp_path / "runs" / "ppo", {"stage": "ppo"}, lines({"step": 1, "loss": 1.0}))
    best = {"step": 1, "prompt": "Why?", "completion": "Because.", "score": 1.25, "kl": 0.0}
    (folder / "samples.jsonl").write_text(lines(best, {**best, "score": -1.0}, {**best, "step": 5}) + "{broken")
    [run] = read_runs(tmp_path / "runs")
    assert {step: len(rows) for step, rows in run.samples().items()} == {1: 2, 5: 1}
    assert "score 1.25 · kl 0" in run_view.samples(run.samples()[1])
