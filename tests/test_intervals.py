"""Bootstrap intervals by prompt: hand-worked means, clusters that move together, coverage."""

import numpy as np
import pytest

from lowrank_rlhf.evaluation import intervals
from lowrank_rlhf.evaluation.intervals import bootstrap_mean, bootstrap_statistic


def test_a_weighted_mean_by_hand():
    """(1·½ + 0·½ + 1·1) / (½ + ½ + 1) = 3/4."""
    assert bootstrap_mean([1, 0, 1], ["a", "a", "b"], weights=[0.5, 0.5, 1.0])[0] == 0.75


def test_weights_of_1_are_no_weights():
    values, clusters = [1, 0, 1, 1, 0], ["a", "a", "b", "c", "d"]
    assert bootstrap_mean(values, clusters, weights=[1] * 5) == bootstrap_mean(values, clusters)


def test_the_pairs_of_a_ranked_row_count_once():
    """Row a is six pairs of weight 1/6, row b one pair: mean (1 + 0)/2, and the resamples are aa, ab or bb."""
    found = bootstrap_mean([1] * 6 + [0], ["a"] * 6 + ["b"], weights=[1 / 6] * 6 + [1])
    assert found == pytest.approx((0.5, 0.0, 1.0))


def test_rows_of_one_prompt_move_together():
    """100 prompts of 10 equal rows are as uncertain as 100 rows, not as 1,000."""
    rng = np.random.default_rng(0)
    once = rng.integers(2, size=100).astype(float)
    repeated = bootstrap_mean(np.repeat(once, 10), np.repeat(np.arange(100), 10).tolist())
    assert repeated == pytest.approx(bootstrap_mean(once, list(range(100))))
    independent = bootstrap_mean(np.repeat(once, 10), list(range(1000)))
    assert independent[2] - independent[1] < 0.5 * (repeated[2] - repeated[1])


def test_one_prompt_gives_its_mean_thrice():
    assert bootstrap_mean([1.0, 0.0], ["a", "a"]) == (0.5, 0.5, 0.5)


def test_drawing_in_parts_changes_nothing(monkeypatch):
    values, clusters = np.random.default_rng(0).normal(size=50), [i // 2 for i in range(50)]
    whole = bootstrap_mean(values, clusters)
    monkeypatch.setattr(intervals, "CHUNK", 60)
    assert bootstrap_mean(values, clusters) == whole


def test_the_interval_of_a_mean_covers_it():
    """200 simulations of 50 prompts with 1 to 4 rows around a value of the prompt's own; the truth is 0."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        sizes = rng.integers(1, 5, size=50)
        clusters = np.repeat(np.arange(50), sizes)
        values = rng.normal(size=50)[clusters] + rng.normal(size=len(clusters))
        _, low, high = bootstrap_mean(values, clusters.tolist(), resamples=500)
        covered += low <= 0 <= high
    assert covered >= 180


def test_a_mean_as_a_general_statistic_has_the_same_interval():
    values, clusters = np.random.default_rng(0).normal(size=40), [i // 4 for i in range(40)]
    general = bootstrap_statistic(lambda x: float(x.mean()), [values], clusters, resamples=300)
    assert general == pytest.approx(bootstrap_mean(values, clusters, resamples=300))


def test_a_statistic_that_is_undefined_on_most_resamples_has_no_interval():
    """All four prompts are drawn in 4!/4⁴ = 9 % of the resamples, two or more of them in 98 %."""

    def total_if(distinct):
        return lambda x: float(x.sum()) if len(np.unique(x)) >= distinct else None

    assert bootstrap_statistic(total_if(5), [[1, 2, 3, 4]], "abcd") is None
    assert bootstrap_statistic(total_if(4), [[1, 2, 3, 4]], "abcd") is None
    value, low, high = bootstrap_statistic(total_if(2), [[1, 2, 3, 4]], "abcd")
    assert value == 10
    assert 5 <= low < 10 < high <= 15
