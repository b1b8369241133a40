"""Bradley-Terry strengths and their intervals, against hand-worked numbers, simulations and each other."""

import numpy as np
import pytest
from vote_duels import duel, simulated

from lowrank_rlhf.arena.statistics.bradley_terry import fit, groups_of, lowest_plausible, never_lost, probabilities
from lowrank_rlhf.arena.statistics.duels import duels
from lowrank_rlhf.arena.statistics.ranking import elo, few_prompts_factor, ranking
from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Judged, Speaker, Vote

ONE_GROUP = np.zeros(3, dtype=np.intp)
EVALICA = [0.61412214, -0.13704993, -0.47707222]


def test_two_players_have_the_log_odds_of_their_points():
    """6 wins and 2 ties of 10: 7 points to 3, with the virtual draw 7.25 to 3.25: θ₁ − θ₂ = log(7.25/3.25)."""
    found = ranking([duel(f"{i}", "x", "y", outcome) for i, outcome in enumerate([1] * 6 + [0.5] * 2 + [0] * 2)])
    assert found.players == ("x", "y")
    assert found.theta[0] - found.theta[1] == pytest.approx(np.log(7.25 / 3.25), abs=1e-9)
    assert found.win_probability(0, 1) == pytest.approx(7.25 / 10.5, abs=1e-9)
    assert elo(found.theta[0]) + elo(found.theta[1]) == pytest.approx(2000)


def test_three_players_as_evalica_has_them():
    """evalica 0.4.2 on the same wins and one draw of weight 0.5 per pair, its tolerance at 1e-14."""
    wins = np.array([[[0.0, 7.0, 4.5], [3.0, 0.0, 6.0], [1.5, 4.0, 0.0]]])
    assert fit(wins, ONE_GROUP)[0] == pytest.approx(EVALICA, abs=1e-7)


def test_the_fit_is_where_expected_points_equal_points():
    """The likelihood equations: Σ_j n_ij σ(θ_i − θ_j) = points of i, in every one of many tables at once."""
    wins = np.random.default_rng(0).integers(0, 9, size=(50, 6, 6)).astype(float)
    theta = fit(wins, np.zeros(6, dtype=np.intp))
    won = (wins + 0.25) * ~np.eye(6, dtype=bool)
    expected = ((won + won.swapaxes(1, 2)) * probabilities(theta)).sum(axis=2)
    assert np.abs(expected - won.sum(axis=2)).max() < 1e-8
    assert np.abs(theta.mean(axis=1)).max() < 1e-12


def test_an_undefeated_player_is_ahead_and_not_at_infinity():
    """TRAPS 27: ten wins of ten, which plain Bradley-Terry has no maximum for: log(10.25/0.25) with the virtual draw.

    The upper end is open. The lower is where ten wins have probability 2.5 %: σ(δ)^10 = 0.025.
    """
    found = ranking([duel(f"{i}", "x", "y", 1) for i in range(10)])
    assert found.theta[0] - found.theta[1] == pytest.approx(np.log(41))
    assert found.high[0] == np.inf
    assert found.low[1] == -np.inf
    assert 1 / (1 + np.exp(-(found.low[0] - found.theta[1]))) ** 10 == pytest.approx(0.025, rel=1e-6)
    assert found.high[1] == pytest.approx(-found.low[0])
    assert (found.rank(0), found.rank(1)) == (1, 2)


@pytest.mark.parametrize(("wins", "sure"), [(1, False), (5, False), (6, True)])
def test_few_unanimous_votes_put_nobody_ahead(wins, sure):
    """A one-sided sign test at 2.5 %: 2⁻⁵ = 3.1 % is not enough, 2⁻⁶ = 1.6 % is."""
    found = ranking([duel(f"{i}", "x", "y", 1) for i in range(wins)])
    assert found.ahead[0, 1] == sure
    assert found.tied_with(0) == (() if sure else ("y",))


def test_unanimous_votes_on_one_prompt_are_one_vote():
    found = ranking([duel("the same", "x", "y", 1) for _ in range(50)])
    assert not found.ahead.any()
    assert np.isinf(found.low).all()
    assert np.isinf(found.high).all()


def test_two_that_share_all_wins_are_undefeated_together():
    """a and b beat each other now and then and everybody else always: no maximum either, and both ends are open."""
    votes = [duel(f"{i}", "a", "b", i % 2) for i in range(20)]
    votes += [duel(f"{i}", winner, "c", 1) for i in range(20) for winner in "ab"]
    found = ranking(votes)
    assert np.isinf(found.high[:2]).all()
    assert np.isfinite(found.low[:2]).all()
    assert found.low[2] == -np.inf
    assert found.rank(2) == 3
    assert found.tied_with(0) == (found.players[1],)


def test_a_tie_is_enough_to_bound_a_record():
    lost_none = [duel(f"{i}", "x", "y", 1) for i in range(9)]
    found = ranking([*lost_none, duel("9", "x", "y", 0.5)])
    assert np.isfinite(found.high).all()


def test_players_that_never_met_are_not_compared():
    votes = [duel(f"{i}", "a", "b", i % 3 > 0) for i in range(30)] + [duel(f"{i}", "c", "d", 1) for i in range(30)]
    found = ranking([*votes, duel("x", "e", "e", 1)])
    where = {name: i for i, name in enumerate(found.players)}
    assert len(set(found.group)) == 3
    assert found.win_probability(where["a"], where["c"]) is None
    assert found.win_probability(where["a"], where["b"]) > 0.5
    assert found.rank(where["a"]) == found.rank(where["c"]) == found.rank(where["e"]) == 1
    assert found.theta[where["a"]] + found.theta[where["b"]] == pytest.approx(0)
    assert (found.low[where["e"]], found.theta[where["e"]], found.high[where["e"]]) == (-np.inf, 0, np.inf)
    alone = ranking(votes[:30])
    assert found.theta[where["a"]] == pytest.approx(alone.theta[0])


def test_one_bridge_connects_two_groups():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 1
    assert groups_of(wins).tolist() == [0, 0, 1, 1]
    wins[1, 2] = 0.5
    assert groups_of(wins).tolist() == [0, 0, 0, 0]


def test_sets_without_a_loss():
    """0 beats all; 1 and 2 beat each other; 3 loses to all: only 0 never lost, only 3 never won."""
    wins = np.array([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=float)
    assert [members.tolist() for members in never_lost(wins)] == [[True, False, False, False]]
    assert [members.tolist() for members in never_lost(wins.T)] == [[False, False, False, True]]
    assert never_lost(np.array([[0.0, 1.0], [1.0, 0.0]])) == []


def test_the_bound_moves_with_the_opponents():
    """Against an opponent that is 2 stronger, five wins say 2 more."""
    wins, first = np.array([[0.0, 5.0], [0.0, 0.0]]), np.array([True, False])
    even, strong = np.array([4.0, 0.0]), np.array([4.0, 2.0])
    assert lowest_plausible(strong, wins, first) - lowest_plausible(even, wins, first) == pytest.approx(2)


def test_copies_of_a_vote_on_a_prompt_do_not_narrow_the_interval():
    """Prompts are resampled, so ten identical annotators are worth one; as separate prompts they would be worth ten."""
    votes = simulated(np.array([0.4, 0.0, -0.4]), votes=150, prompts=150, seed=1)
    once, copied = ranking(votes), ranking([vote for vote in votes for _ in range(10)])
    separate = ranking([duel(f"{i}-{v.prompt}", v.left, v.right, v.outcome) for i in range(10) for v in votes])
    width, copies, apart = (float((r.high - r.low).mean()) for r in (once, copied, separate))
    assert copies == pytest.approx(width, rel=0.05)  # the virtual draws weigh a little less
    assert apart == pytest.approx(width / np.sqrt(10), rel=0.25)


def test_the_order_of_sides_and_of_votes_does_not_matter():
    votes = simulated(np.array([0.5, 0.0, -0.5]), votes=120, prompts=40, seed=3)
    turned = [duel(v.prompt, v.right, v.left, 1 - v.outcome) for v in votes]
    one, other = ranking(votes), ranking(turned)
    assert one.players == other.players
    assert one.theta == pytest.approx(other.theta)
    assert one.low == pytest.approx(other.low)


def test_a_ranking_weighs_as_much_as_a_vote():
    """Four samples ranked: six pairs of weight 1/6; x first, y last, z and w tied between."""
    who = [Speaker(name) for name in "xzwy"]
    prompt = ({"role": "user", "content": "?"},)
    comparison = Comparison(tuple(Answer(s, Decoding(), prompt, s.name) for s in who), "ann", True)
    found = duels([Judged(comparison, (Vote(comparison.id, "ann", "ranking", ranking=(1, 2, 2, 3)),))])
    assert len(found) == 6
    assert sum(d.weight for d in found) == pytest.approx(1)
    assert {(d.left, d.right): d.outcome for d in found} == {
        ("x", "z"): 1, ("x", "w"): 1, ("x", "y"): 1, ("z", "w"): 0.5, ("z", "y"): 1, ("w", "y"): 1
    }  # fmt: skip


def test_few_prompts_widen_as_student_says():
    """t(0.975; 9) = 2.262157 (Student's table), so 2.262157/1.959964·√(10/9) = 1.21663."""
    assert few_prompts_factor(np.array([10]))[0] == pytest.approx(1.21663, rel=2e-3)


def test_no_votes_rank_nobody():
    assert ranking([]).players == ()


@pytest.mark.parametrize(
    ("truth", "votes", "prompts"),
    [
        ((1.0, 0.5, 0.0, -0.5, -1.0), 1000, 200),
        ((1.0, 0.5, 0.0, -0.5, -1.0), 100, 50),
        ((2.0, 1.0, 0.0, -1.0, -2.0), 150, 50),  # undefeated players are common here
        ((0.5, 0.0, -0.5), 45, 15),
    ],
    ids=["many votes", "few votes", "lopsided", "few prompts"],
)
def test_intervals_cover_the_truth_in_nine_of_ten_simulations(truth, votes, prompts):
    """200 simulations; nobody is called ahead of a stronger player more often than the level allows."""
    strengths, covered, wrong, correlations = np.array(truth), [], 0, []
    for seed in range(200):
        found = ranking(simulated(strengths, votes=votes, prompts=prompts, seed=seed), resamples=300, seed=seed)
        true = np.array([strengths[int(name)] for name in found.players])
        covered.append(((found.low <= true) & (true <= found.high)).mean())
        wrong += bool((found.ahead & (true[:, None] < true[None, :])).any())
        correlations.append(np.corrcoef(found.theta, true)[0, 1])
    assert np.mean(covered) >= 0.9
    assert wrong <= 10
    assert np.mean(correlations) > 0.8


def test_the_order_is_recovered():
    strengths = np.array([1.2, 0.6, 0.0, -0.6, -1.2])
    orders = [ranking(simulated(strengths, votes=2000, prompts=200, seed=s), resamples=20).players for s in range(50)]
    assert sum(order == ("0", "1", "2", "3", "4") for order in orders) >= 49


def test_intervals_cover_also_where_most_favourites_never_lose():
    """Odds of e³ to one between neighbours, five prompts each: the best is undefeated in nearly every simulation."""
    strengths, covered, open_ends = np.array([3.0, 0.0, -3.0]), [], 0
    for seed in range(200):
        found = ranking(simulated(strengths, votes=15, prompts=15, seed=seed), resamples=200, seed=seed)
        true = np.array([strengths[int(name)] for name in found.players])
        covered.append(((found.low <= true) & (true <= found.high)).mean())
        open_ends += bool(np.isinf(found.high).any())
    assert open_ends > 150
    assert np.mean(covered) >= 0.9


def test_intervals_cover_where_a_prompt_decides_for_all_its_voters():
    """x wins on 60 % of the prompts, and all six people agree there: as single votes the intervals would be too narrow.

    Truth: θ_x − θ_y = log(0.6/0.4). Votes taken for independent have an interval 1/√6 as wide, which covers only
    P(|z| < 1.96/√6) = 58 %.
    """
    half = np.log(0.6 / 0.4) / 2
    covered = {"by prompt": 0, "by vote": 0}
    for seed in range(200):
        won = np.random.default_rng(seed).random(40) < 0.6
        together = [duel(f"{i}", "x", "y", won[i]) for i in range(40) for _ in range(6)]
        apart = [duel(f"{i}", "x", "y", vote.outcome) for i, vote in enumerate(together)]
        for name, votes in (("by prompt", together), ("by vote", apart)):
            found = ranking(votes, resamples=200, seed=seed)
            x = found.players.index("x")
            covered[name] += bool(found.low[x] <= half <= found.high[x])
    assert covered["by prompt"] >= 180
    assert covered["by vote"] <= 150
