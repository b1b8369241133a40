"""What is drawn of a run's metrics, and from how little."""

import json
import math

import pytest

from lowrank_rlhf.plots import PLOTS, bought_score, curves_of, plot_run

ITERATION = {
    "objective/scores": 0.5,
    "objective/rlhf_reward": 0.4,
    "objective/scores/helpful": 0.3,
    "objective/scores/short": 0.2,
    "objective/disagreement": 0.3,
    "objective/kl": 2.0,
    "objective/kl_coef": 0.05,
    "objective/length": 30.0,
    "objective/entropy": 60.0,
    "loss/policy_avg": -0.1,
    "policy/clipfrac_avg": 0.1,
    "val/eos_rate": 0.5,
    "val/distinct_2": 0.7,
    "val/explained_variance": 0.2,
    "time/generate": 4.0,
}


def drawn(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = plot_run(folder)
    assert sorted(files) == sorted((folder / "plots").glob("*")) if files else not (folder / "plots").exists()
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files)
    return {path.stem for path in files}


def changed(factor):
    return {name: factor * value for name, value in ITERATION.items()}


def test_every_group_that_a_run_has_numbers_for(tmp_path):
    rows = [{"step": step, **changed(step)} for step in (1, 2, 3)]
    assert drawn(tmp_path, rows) == (set(PLOTS) - {"accuracy", "margin"}) | {"frontier"}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, **ITERATION}],
        [{"step": step, **changed(math.nan)} for step in (1, 2, 3)],
        [{"step": 1, **ITERATION}, {"step": 2, **changed(math.inf)}],
    ],
    ids=["nothing", "one iteration", "nan", "one finite iteration"],
)
def test_nothing_is_drawn_of_less_than_two_numbers(rows, tmp_path):
    assert drawn(tmp_path, rows) == set()


def test_gaps_do_not_keep_a_group_from_being_drawn(tmp_path):
    rows = [{"step": 1, **ITERATION}, {"step": 2, **changed(math.nan)}, {"step": 3, **changed(-math.inf)}]
    assert "kl" in drawn(tmp_path, [*rows, {"step": 4, **ITERATION}])


def test_what_never_changes_and_says_nothing_is_left_out(tmp_path):
    """A coefficient that is not steered, and the disagreement of an ensemble of one."""
    rows = [{"step": step, **ITERATION, "objective/disagreement": 0.0} for step in (1, 2, 3)]
    assert drawn(tmp_path, rows).isdisjoint({"kl_coef", "disagreement"})


def test_a_prefix_stands_for_all_that_begin_with_it():
    rows = [{"step": step, **changed(step)} for step in (1, 2)]
    assert set(curves_of(PLOTS["reward_sources"], rows)) == {"objective/scores/helpful", "objective/scores/short"}
    assert set(curves_of(PLOTS["reward"], rows)) == {"objective/scores", "objective/rlhf_reward"}


def test_row_0_is_no_second_point_of_the_frontier():
    """It is the rollout of row 1."""
    rows = [{"step": step, **ITERATION} for step in (0, 1)]
    assert bought_score(rows) == []
    assert bought_score([*rows, {"step": 2, **changed(2)}]) == [(2.0, 0.5, 1), (4.0, 1.0, 2)]
