"""Pairwise accuracy and its baselines: hand-worked numbers, paired intervals, groups."""

import numpy as np
import pytest

from lowrank_rlhf.evaluation.accuracy import accuracy, accuracy_by, rightness
from lowrank_rlhf.evaluation.intervals import bootstrap_mean


def test_a_tie_is_half_right():
    assert rightness([3.0, -2.0, 0.0]).tolist() == [1.0, 0.0, 0.5]


def test_accuracy_and_baselines_by_hand():
    """Margins + + − 0 are right 1, 1, 0, ½: 2.5/4. Lengths − − − 0: longer ½/4, shorter 3.5/4; gain −1/4."""
    found = accuracy([1, 2, -1, 0], [-3, -1, -9, 0], [1, 1, 1, 1], list("abcd"))
    assert (found.model[0], found.longer_wins[0], found.shorter_wins[0]) == (0.625, 0.125, 0.875)
    assert (found.better_rule, found.gain[0]) == ("shorter-wins", -0.25)


def test_weights_let_a_ranked_row_count_once():
    """Three pairs of one row, all right (weight 1/3), and one pair, wrong: 1/2 rather than 3/4."""
    found = accuracy([1, 1, 1, -1], [1, 1, 1, 1], [1 / 3, 1 / 3, 1 / 3, 1], ["a", "a", "a", "b"])
    assert found.model[0] == pytest.approx(0.5)


def test_a_model_that_is_the_rule_gains_exactly_nothing():
    differences = np.random.default_rng(0).normal(size=50)
    found = accuracy(differences, differences, np.ones(50), list(range(50)))
    assert found.better_rule == "longer-wins" or found.model == found.longer_wins
    same = accuracy(np.abs(differences), np.abs(differences), np.ones(50), list(range(50)))
    assert same.gain == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_interval():
    """Model and rule are right on nearly the same pairs: their difference is surer than either."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(0.3, 1, size=300)
    margins = np.where(rng.random(300) < 0.05, -lengths, lengths)
    found = accuracy(margins, lengths, np.ones(300), list(range(300)))
    assert found.gain[2] - found.gain[1] < 0.6 * (found.model[2] - found.model[1])


def test_the_paired_interval_covers_the_true_difference():
    """200 simulations. By prompt, the scores are right at a rate of mean 0.7, the longer answer is chosen at 0.6."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        clusters = np.repeat(np.arange(80), rng.integers(1, 4, size=80))
        right = rng.random(len(clusters)) < rng.beta(7, 3, size=80)[clusters]
        longer = rng.random(len(clusters)) < np.where(right, 0.65, 0.6 / 0.3 - 0.65 * 0.7 / 0.3)
        margins, lengths = np.where(right, 1, -1), np.where(longer, 1, -1)
        found = accuracy(margins, lengths, np.ones(len(clusters)), clusters.tolist())
        covered += found.gain[1] <= 0.7 - 0.6 <= found.gain[2]
    assert covered >= 180


def test_accuracy_by_group_is_the_accuracy_of_its_rows():
    names, margins = ["y", "x", None, "x"], [1, -1, 1, 1]
    found = accuracy_by(names, margins, [1, 1, 1, 3], ["a", "b", "c", "b"])
    assert [(g.name, g.pairs, g.prompts) for g in found] == [("x", 2, 1), ("y", 1, 1)]
    assert found[0].accuracy == bootstrap_mean([0, 1], ["b", "b"], weights=[1, 3])
    ordered = accuracy_by(["a", "long", "short"], [1, 1, 1], [1, 1, 1], "abc", order=["short", "long"])
    assert [g.name for g in ordered] == ["short", "long", "a"]
