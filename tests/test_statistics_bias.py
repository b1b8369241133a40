"""Side bias, length and reward models, on votes that have a known amount of each."""

import numpy as np
import pytest
from vote_duels import duel

from lowrank_rlhf.arena.statistics.bias import (
    binomial_test,
    longer_wins,
    over_optimised,
    reward_agreements,
    side_bias,
    win_rate,
    worth_ppo,
)
from lowrank_rlhf.arena.statistics.shares import share
from lowrank_rlhf.evaluation.winrate import length_controlled_win_rate


def test_the_binomial_test_by_hand():
    """Two-sided, a fair coin: 9 of 10 is 2(1 + 10)/1024; and twice the smaller tail of 8 of 20 by its 9 terms."""
    assert binomial_test(9, 10) == 22 / 1024
    assert binomial_test(1, 10) == 22 / 1024
    assert binomial_test(5, 10) == 1
    assert binomial_test(0, 0) == 1
    assert binomial_test(12, 20) == pytest.approx(2 * 263950 / 2**20)  # Σ C(20, 0…8) = 263950
    assert binomial_test(5200, 10000) == pytest.approx(6.6e-5, rel=0.05)  # normal with continuity: z = 3.99


def people(lean: float, *, votes: int, seed: int) -> list:
    """Votes on x against a better y, sides shuffled; `lean` is added to the log-odds of what stands left."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(votes):
        left, right, gap = ("x", "y", -1.0) if random.random() < 0.5 else ("y", "x", 1.0)
        won = random.random() < 1 / (1 + np.exp(-(gap + lean)))
        found.append(duel(f"{i // 2}", left, right, won))
    return found


def test_a_planted_side_bias_is_found():
    """0.6 of log-odds for A makes about 62 % of votes: in 50 simulations of 400 votes hardly one may miss it."""
    found = [side_bias(people(0.6, votes=400, seed=seed)) for seed in range(50)]
    assert sum(bias.found and bias.share[0] > 0.5 for bias in found) >= 49
    leaning_right = side_bias(people(-0.6, votes=400, seed=0))
    assert leaning_right.found
    assert leaning_right.share[2] < 0.5


def test_no_side_bias_is_found_where_there_is_none():
    """The test is exact, so at most 5 % false alarms, also beside a much better model: 20 of 200 is 3.5σ above."""
    assert sum(side_bias(people(0.0, votes=100, seed=seed)).found for seed in range(200)) <= 20


def test_sides_that_nobody_shuffled_say_nothing():
    left_always_wins = [duel(f"{i}", "x", "y", 1, blind=False) for i in range(50)]
    repeats = [duel(f"{i}", "x", "y", 1, repeat_of="c") for i in range(50)]
    rankings = [duel(f"{i}", "x", "y", 1, ranking=True) for i in range(50)]
    ties = [duel(f"{i}", "x", "y", 0.5) for i in range(50)]
    assert side_bias([*left_always_wins, *repeats, *rankings, *ties]) is None


def test_unanimous_shares_keep_an_interval():
    """Ten prompts, all yes: the least share with which that has probability 2.5 % is 0.025^(1/10) = 0.6915."""
    assert share([1] * 20, [i // 2 for i in range(20)]) == pytest.approx((1, 0.69150, 1), abs=1e-5)
    assert share([0] * 10, range(10)) == pytest.approx((0, 0, 0.30850), abs=1e-5)


def test_win_rates_take_both_sides_and_leave_out_oneself():
    votes = [duel("1", "x", "y", 1), duel("2", "y", "x", 1), duel("3", "x", "z", 0.5), duel("4", "x", "x", 1)]
    assert win_rate(votes, "x").raw[0] == pytest.approx(0.5)
    assert win_rate(votes, "y").raw[0] == pytest.approx(0.5)
    assert win_rate(votes, "x").length_controlled is None  # all lengths are equal
    assert win_rate([duel("4", "x", "x", 1)], "x") is None


def test_a_win_rate_that_is_all_length_is_seen_through():
    """y always writes more, and the longer answer wins 4 of 5 times; between equally long ones neither is better."""
    random = np.random.default_rng(0)
    votes = []
    for i in range(600):
        gap = int(random.integers(-20, 60))
        won = random.random() < (0.8 if gap > 0 else 0.2 if gap < 0 else 0.5)
        votes.append(duel(f"{i}", "y", "x", won, left_tokens=100 + gap, right_tokens=100))
    rates = win_rate(votes, "y")
    assert rates.raw[1] > 0.55
    assert rates.length_controlled[1] < 0.55 < rates.raw[0]
    assert longer_wins(votes)[0] == pytest.approx(0.8, abs=0.05)


def test_a_ranking_counts_once_in_rates():
    """One ranking of three, three pairs of a third each, all lost; one vote, won: half."""
    lost = [duel("r", "x", other, 0, weight=1 / 3) for other in ("y", "z", "w")]
    assert win_rate([duel("p", "x", "y", 1), *lost], "x").raw[0] == pytest.approx(0.5)


def scored(
    right: float, *, votes: int = 400, prompts: int = 200, longer: float = 0.5, blind: bool = True, seed: int = 0
):
    """People's votes and scores that agree with them with probability `right`; the winner is longer with `longer`."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(votes):
        won = random.random() < 0.5
        sign = 1 if (random.random() < right) == won else -1
        length = 20 if (random.random() < longer) == won else -20
        scores = {"left_score": float(sign), "right_score": 0.0, "scored_by": "rm"}
        tokens = {"left_tokens": 100 + length, "right_tokens": 100}
        found.append(duel(f"{i % prompts}", "x", "y", won, blind=blind, **scores, **tokens))
    return found


@pytest.mark.parametrize(
    ("votes", "verdict"),
    [
        (scored(0.8), "Yes: rm agrees with people on 78%"),
        (scored(0.56, votes=4000), "A little: "),
        (scored(0.8, longer=0.8), "Not shown: "),
        (scored(0.5), "Not as it is: "),
        (scored(0.3), "No: "),
        (scored(0.9, votes=20), "Too early to say: "),
        (scored(0.9, prompts=5), "Too early to say: "),
    ],
)
def test_whether_ppo_on_the_reward_is_worth_it(votes, verdict):
    (found,) = reward_agreements(votes)
    assert worth_ppo(found).startswith(verdict)


def test_the_verdict_names_the_ceiling():
    (found,) = reward_agreements(scored(0.8), consistency=0.9)
    assert "agree with themselves on 90% of repeats" in worth_ppo(found)


def test_scores_that_people_may_have_seen_count_only_where_there_are_no_others():
    hidden, seen = scored(0.9, votes=100), scored(0.1, votes=300, blind=False)
    (both,) = reward_agreements([*hidden, *seen])
    assert (both.votes, both.blind) == (100, True)
    (only_seen,) = reward_agreements(seen)
    assert (only_seen.votes, only_seen.blind) == (300, False)
    assert "people may have seen the scores" in worth_ppo(only_seen)
    assert "people may have seen the scores" not in worth_ppo(both)


def test_a_policy_that_pleases_only_the_reward_is_named():
    """By its scores ppo always wins; people like it half of the time."""
    votes = [
        duel(f"{i}", "ppo", "base", i % 2, left_score=1.0, right_score=0.0, scored_by="rm", left_tokens=i % 3)
        for i in range(100)
    ]
    (found,) = reward_agreements(votes)
    assert found.favours["ppo"][0] == pytest.approx(0.5)
    assert found.favours["base"][0] == pytest.approx(-0.5)
    (sentence,) = over_optimised(found)
    assert sentence.startswith("rm favours ppo: by its scores ppo wins 50 points more often than people say")
    assert over_optimised(reward_agreements(scored(0.8))[0]) == []


def test_scores_of_two_rewards_are_not_mixed():
    votes = scored(0.9, votes=100)
    other = [
        duel(v.prompt, "x", "y", 1 - v.outcome, left_score=v.left_score, right_score=0.0, scored_by="b") for v in votes
    ]
    first, second = reward_agreements([*votes, *other])
    assert (first.reward, second.reward) == ("b", "rm")
    assert first.accuracy.model[0] == pytest.approx(1 - second.accuracy.model[0])


def test_a_weight_of_two_is_two_copies():
    """In the length-controlled rate: the same prompts are drawn, so estimate and interval are equal."""
    won, gaps, prompts = [1, 0, 1, 1, 0.5], [3, -2, 5, -4, 1], list("abcde")
    twice = length_controlled_win_rate(won * 2, gaps * 2, prompts * 2, resamples=50)
    assert length_controlled_win_rate(won, gaps, prompts, weights=[2] * 5, resamples=50) == pytest.approx(twice)
    assert length_controlled_win_rate(won, gaps, prompts, resamples=50) != pytest.approx(twice)  # the ridge weighs less
