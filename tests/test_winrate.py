"""Win rates: by hand, under judges whose bias is planted, and how often the intervals hold the truth."""

import numpy as np
import pytest

from lowrank_rlhf.data import Example
from lowrank_rlhf.evaluation.answers import Answers
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
from lowrank_rlhf.evaluation.judges import PairwiseJudge, ScoreJudge
from lowrank_rlhf.evaluation.winrate import Verdict, both_orders, fit_logistic, length_controlled_win_rate


def answers(texts, scores=None):
    n = len(texts)
    return Answers(list(texts), [len(t) for t in texts], [True] * n, {"reward": scores or [0.0] * n}, [0.0] * n, None)


def examples(n):
    return [Example(f"row {i}", [{"role": "user", "content": f"{i}?"}]) for i in range(n)]


# Judges


def test_the_higher_score_wins_and_equal_scores_and_equal_texts_tie():
    ours, theirs = answers("abcd", [2.0, 1.0, 0.0, 0.3]), answers("xyzd", [1.0, 1.0, 1.0, 0.1])
    assert ScoreJudge("reward", "reward")(examples(4), ours, theirs).preferences == [1.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("truth", [0.3, 0.5, 0.65])
def test_a_judge_that_likes_the_first_is_corrected_by_asking_both_orders(truth):
    """It picks the first with probability truth + 0.3: one order is off by 0.3, the mean of both is not."""
    random, n = np.random.default_rng(0), 4000
    single = []

    def ask(asked, first, second):
        p = truth if first[0].startswith("ours") else 1 - truth
        verdicts = (random.random(len(asked)) < p + 0.3).astype(float)
        single.append(verdicts.mean())
        return [Verdict(v) for v in verdicts]

    judged = PairwiseJudge(ask, "biased")(
        examples(n),
        answers([f"ours {i}" for i in range(n)]),
        answers([f"theirs {i}" for i in range(n)]),
    )
    assert np.mean(judged.preferences) == pytest.approx(truth, abs=0.02)
    assert single[0] == pytest.approx(truth + 0.3, abs=0.03)
    assert judged.first_rate == pytest.approx(0.8, abs=0.02)
    assert judged.unreadable == []


def test_equal_answers_are_not_asked_about_and_unreadable_ones_are_named():
    asked_about = []

    def ask(asked, first, second):
        asked_about.append([e.where for e in asked])
        return [
            Verdict(None, "hm") if "odd" in one + two else Verdict(1.0) for one, two in zip(first, second, strict=True)
        ]

    judged = PairwiseJudge(ask, "j")(examples(3), answers(["same", "odd", "good"]), answers(["same", "b", "c"]))
    assert judged.preferences == [0.5, None, 0.5]
    assert asked_about == [["row 1", "row 2"]] * 2
    assert judged.unreadable == [(1, "hm"), (1, "hm")]
    assert judged.first_rate == 1.0


def test_one_unreadable_order_leaves_no_preference():
    assert both_orders(1.0, None) is None
    assert both_orders(1.0, 0.5) == 0.75


# Length


def test_a_judge_that_only_likes_length_is_seen_through():
    """P(win) = σ(2·tanh(d/20)), whoever wrote it, and one side is mostly longer: at equal length nobody wins more."""
    random = np.random.default_rng(0)
    gaps = random.normal(15, 20, 3000)
    wins = (random.random(3000) < 1 / (1 + np.exp(-2 * np.tanh(gaps / 20)))).astype(float)
    assert wins.mean() > 0.65
    rate, low, high = length_controlled_win_rate(wins, gaps, range(3000), resamples=200)
    assert rate == pytest.approx(0.5, abs=0.02)
    assert low < 0.5 < high


def test_a_liking_for_length_of_another_form_is_mostly_seen_through():
    """The longer of two answers wins 9 in 10, by however little: no tanh has this step, so a part of it stays."""
    random = np.random.default_rng(0)
    gaps = np.where(random.random(3000) < 0.8, 1, -1) * random.integers(1, 40, 3000)
    wins = (random.random(3000) < np.where(gaps > 0, 0.9, 0.1)).astype(float)
    assert wins.mean() == pytest.approx(0.8 * 0.9 + 0.2 * 0.1, abs=0.02)
    assert abs(length_controlled_win_rate(wins, gaps, range(3000), resamples=10)[0] - 0.5) < 0.08


def test_the_planted_model_is_found_again():
    """P(win) = σ(0.4 + 1.5·tanh(d/std)): at equal length σ(0.4) = 0.599."""
    random = np.random.default_rng(1)
    gaps = random.normal(10, 20, 6000)
    wins = random.random(6000) < 1 / (1 + np.exp(-0.4 - 1.5 * np.tanh(gaps / gaps.std())))
    rate, low, high = length_controlled_win_rate(wins.astype(float), gaps, range(6000), resamples=200)
    assert rate == pytest.approx(0.5987, abs=0.02)
    assert low < 0.5987 < high


def test_without_a_difference_in_length_it_is_the_raw_rate():
    """3 of 4 wins at equal lengths: θ with 4(0.75 − σ(θ)) = 0.1·θ, so a little below log 3; σ(θ) ≈ 0.726."""
    rate, _, _ = length_controlled_win_rate([1.0, 1.0, 1.0, 0.0], [5, 5, 5, 5], "abcd")
    assert 4 * (0.75 - rate) == pytest.approx(0.1 * np.log(rate / (1 - rate)), abs=1e-6)
    assert length_controlled_win_rate([0.5] * 4, [1, 2, 3, 4], "abcd") == pytest.approx((0.5, 0.5, 0.5))


def test_a_policy_that_always_wins_has_a_finite_fit():
    rate, low, high = length_controlled_win_rate([1.0] * 50, list(range(50)), range(50))
    assert 0.9 < low <= rate <= high < 1.0


def test_the_fit_is_the_minimum():
    """The gradient of the penalised loss is 0 there, with weights and soft targets."""
    random = np.random.default_rng(2)
    x, y, w = random.normal(size=(30, 2)), random.random(30), random.integers(0, 3, (4, 30)).astype(float)
    found = fit_logistic(x, y, w)
    p = 1 / (1 + np.exp(-found @ x.T))
    assert np.abs((w * (p - y)) @ x + 0.1 * found).max() < 1e-8


# Intervals


def test_intervals_hold_the_truth_in_nine_of_ten_simulations():
    """40 prompts × 3 answers that share their prompt's luck; paired differences too, whose truth is 0.3."""
    random, held, paired = np.random.default_rng(0), 0, 0
    prompts = np.repeat(np.arange(40), 3)
    for i in range(200):
        luck = random.normal(size=40)[prompts]
        ours = luck + random.normal(size=120) + 0.3
        theirs = luck + random.normal(size=120)
        _, low, high = bootstrap_mean(ours.tolist(), prompts.tolist(), resamples=300, seed=i)
        held += low <= 0.3 <= high
        _, low, high = bootstrap_mean((ours - theirs).tolist(), prompts.tolist(), resamples=300, seed=i)
        paired += low <= 0.3 <= high
    assert held >= 180
    assert paired >= 180


def test_length_controlled_intervals_hold_the_truth_in_nine_of_ten_simulations():
    random, held = np.random.default_rng(3), 0
    for i in range(200):
        gaps = random.normal(5, 20, 150)
        wins = random.random(150) < 1 / (1 + np.exp(-0.4 - np.tanh(gaps / 20)))
        _, low, high = length_controlled_win_rate(wins.astype(float), gaps, range(150), resamples=100, seed=i)
        held += low <= 0.5987 <= high
    assert held >= 180
