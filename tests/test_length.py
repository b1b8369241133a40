"""Length bias: correlations by hand, and what the figures are called in words."""

import numpy as np
import pytest

from lowrank_rlhf.evaluation.correlation import pearson, ranks, spearman
from lowrank_rlhf.evaluation.length import LengthBias, longer_higher_share, margin_correlations, verdict


def test_pearson_by_hand():
    """x − x̄ = −1, 0, 1 and y − ȳ = −1, 1, 0: Σ = 1, over √(2·2)."""
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


def test_spearman_looks_at_ranks_only():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Σ(centred) = 4.5, over √(4.5 · 5)."""
    assert ranks([10, 20, 20, 1e9]).tolist() == [1, 2.5, 2.5, 4]
    assert spearman([10, 20, 20, 1e9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_tiny_scores_and_constants():
    assert pearson([1e-200, 2e-200, 3e-200], [1, 2, 3]) == pytest.approx(1.0)
    assert pearson([5, 5, 5], [1, 2, 3]) is None
    assert spearman([1], [1]) is None


def test_the_longer_answers_share_by_hand():
    """Of the pairs without a tie the longer one is higher with weight 1 + ½ of 1 + ½ + 1."""
    share = longer_higher_share([1, -1, 2, 0, 3], [4, -4, -1, 9, 0], [1, 0.5, 1, 1, 1])
    assert share == pytest.approx(1.5 / 2.5)
    assert longer_higher_share([0, 1], [1, 0], [1, 1]) is None


def test_which_answer_is_the_chosen_one_does_not_enter_the_correlation():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, size=60)
    margins, prompts = lengths + rng.normal(size=60), list(range(60))
    sides = np.where(rng.random(60) < 0.5, -1, 1)
    first, again = (
        margin_correlations(margins, lengths, prompts),
        margin_correlations(sides * margins, sides * lengths, prompts),
    )
    assert first[0] == pytest.approx(again[0])
    assert first[1] == pytest.approx(again[1])
    assert first[0][0] > 0.9


def bias(share, correlation):
    around = (correlation, correlation - 0.1, correlation + 0.1)
    return LengthBias(around, around, around, around, share, 0.98, 0.04)


@pytest.mark.parametrize(
    ("share", "correlation", "words"),
    [
        (0.97, 0.95, "length decides: the longer answer gets the higher score in 97 % of pairs (correlation 0.95"),
        (0.03, -0.95, "length decides: the shorter answer gets the higher score in 97 % of pairs (correlation -0.95"),
        (0.97, 0.4, "length matters: the longer answer gets the higher score in 97 %"),
        (0.60, 0.6, "length matters: the longer answer"),
        (0.20, -0.1, "length matters: the shorter answer gets the higher score in 80 %"),
        (0.55, 0.1, "length does not decide: the longer answer gets the higher score in 55 %"),
    ],
)
def test_the_verdict_in_words(share, correlation, words):
    assert verdict(bias(share, correlation)).startswith(words)


def test_where_length_decides_the_verdict_says_whom_it_costs():
    assert "the chosen answer wins in 98 % where it is the longer and 4 % where it is the shorter" in verdict(
        bias(0.97, 0.95)
    )
