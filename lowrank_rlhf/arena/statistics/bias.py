"""What besides quality decides votes: the side, the length; and whether a reward model wants what people want."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_rlhf.arena.statistics.duels import Duel
from lowrank_rlhf.arena.statistics.shares import share
from lowrank_rlhf.evaluation.accuracy import Accuracy, accuracy, rightness
from lowrank_rlhf.evaluation.intervals import Interval, bootstrap_mean
from lowrank_rlhf.evaluation.winrate import length_controlled_win_rate

SUSPICIOUS = 0.05
FEW_PROMPTS, FEW_VOTES = 10, 30
GOOD_ACCURACY = 0.6
RESAMPLES = 200


def binomial_test(wins: int, games: int) -> float:
    """How probable a count at least as far from half is with a fair coin: twice the smaller tail, at most 1.

    Exact, in whole numbers. 1 where there are no games.

    >>> binomial_test(0, 5), binomial_test(3, 6)  # 2/2⁵
    (0.0625, 1.0)
    """
    fewer = min(wins, games - wins)
    term, tail = 1, 0
    for i in range(fewer + 1):
        tail += term
        term = term * (games - i) // (i + 1)
    return min(1.0, 2 * tail / 2**games)


@dataclass(frozen=True)
class SideBias:
    """Of blind votes for A or B. `p_value`: how probable a share at least as far from half is without a bias."""

    votes: int
    share: Interval
    p_value: float

    @property
    def found(self) -> bool:
        return self.p_value < SUSPICIOUS


def side_bias(duels: Sequence[Duel]) -> SideBias | None:
    """How often the answer shown as A is preferred, where the sides were shuffled.

    Without a liking for a side, shuffling alone makes every vote a fair coin, however much better one model is and
    however alike the votes on one prompt are: the binomial test is exact (a randomisation test). So only blind pairs
    count, the sides of open ones were somebody's choice, and repeats do not: their sides are the original's, swapped.
    None where no vote is left.
    """
    counted = [d for d in duels if d.blind and not d.ranking and d.repeat_of is None and d.outcome != 0.5]
    wins = [d.outcome for d in counted]
    found = share(wins, [d.prompt for d in counted])
    return SideBias(len(counted), found, binomial_test(int(sum(wins)), len(wins))) if found else None


def longer_wins(duels: Sequence[Duel]) -> Interval | None:
    """How often the longer of two answers is preferred, by prompt; ties and answers of equal length are left out."""
    counted = [d for d in duels if d.outcome != 0.5 and d.left_tokens != d.right_tokens]
    longer = [float((d.outcome == 1) == (d.left_tokens > d.right_tokens)) for d in counted]
    return share(longer, [d.prompt for d in counted], [d.weight for d in counted])


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, ties half: raw, and as fitted for answers of equal length.

    The latter is None where all lengths are equal or unknown, or one side always won: nothing can be fitted then.
    """

    raw: Interval
    length_controlled: Interval | None


def win_rate(duels: Sequence[Duel], player: str) -> WinRate | None:
    """A player against whoever it met, with 95 % intervals by prompt; None where it met nobody.

    The length-controlled rate is `evaluation.winrate.length_controlled_win_rate`. It compares like with like only as
    far as the opponents are the same: on a leaderboard read it beside the raw rate, not beside another player's.
    """
    rows = [d for d in duels if (d.left == player) != (d.right == player)]
    won = [d.outcome if d.left == player else 1 - d.outcome for d in rows]
    gaps = [float((d.left_tokens - d.right_tokens) * (1 if d.left == player else -1)) for d in rows]
    prompts, weights = [d.prompt for d in rows], [d.weight for d in rows]
    raw = share(won, prompts, weights)
    if raw is None:
        return None
    if not any(gaps) or raw[0] in (0.0, 1.0):
        return WinRate(raw, None)
    return WinRate(raw, length_controlled_win_rate(won, gaps, prompts, weights=weights, resamples=RESAMPLES))


@dataclass(frozen=True)
class RewardAgreement:
    """A reward model beside people, on the pairs that they decided and it scored.

    Attributes:
        accuracy: how often it gives the preferred answer the higher score, beside rules that look at length alone.
        favours: of each player, its win rate by the scores minus its win rate by people, paired.
        blind: whether only blind votes are counted; False where there are none, and scores may have been seen.
        consistency: how often people agree with themselves on repeats; no reward model can be expected to do better.
    """

    reward: str
    votes: int
    prompts: int
    accuracy: Accuracy
    favours: dict[str, Interval]
    blind: bool
    consistency: float | None = None


def reward_agreements(duels: Sequence[Duel], consistency: float | None = None) -> list[RewardAgreement]:
    """One for each reward model that scored both answers of some decided pair, sorted by name."""
    scored = [d for d in duels if d.scored_by is not None and d.repeat_of is None]
    found = []
    for reward in sorted({d.scored_by for d in scored if d.scored_by is not None}):
        rows = [d for d in scored if d.scored_by == reward]
        blind = any(d.blind and d.outcome != 0.5 for d in rows)
        rows = [d for d in rows if d.blind or not blind]
        decided = [d for d in rows if d.outcome != 0.5]
        if decided:
            prompts = [d.prompt for d in decided]
            sign = np.array([2 * d.outcome - 1 for d in decided])
            rates = accuracy(
                sign * np.array([_margin(d) for d in decided]),
                sign * np.array([d.left_tokens - d.right_tokens for d in decided]),
                [d.weight for d in decided],
                prompts,
            )
            found.append(
                RewardAgreement(reward, len(decided), len(set(prompts)), rates, _favours(rows), blind, consistency)
            )
    return found


def _favours(rows: Sequence[Duel]) -> dict[str, Interval]:
    found = {}
    for player in sorted({name for d in rows for name in (d.left, d.right) if d.left != d.right}):
        own = [d for d in rows if (d.left == player) != (d.right == player)]
        side = np.array([1.0 if d.left == player else -1.0 for d in own])
        more = side * (rightness([_margin(d) for d in own]) - np.array([d.outcome for d in own]))
        found[player] = bootstrap_mean(more, [d.prompt for d in own], weights=[d.weight for d in own])
    return found


def _margin(duel: Duel) -> float:
    assert duel.left_score is not None
    assert duel.right_score is not None
    return duel.left_score - duel.right_score


def worth_ppo(found: RewardAgreement) -> str:
    """Whether PPO on this reward model is worth it, in words, from how well it agrees with people."""
    value, low, high = found.accuracy.model
    agrees = f"{found.reward} agrees with people on {value:.0%} [{low:.0%}, {high:.0%}] of {found.votes} decided pairs"
    agrees += "" if found.blind else " (none of them blind: people may have seen the scores)"
    rule, gain = found.accuracy.better_rule, found.accuracy.gain
    by_length = (found.accuracy.longer_wins if rule == "longer-wins" else found.accuracy.shorter_wins)[0]
    if found.prompts < FEW_PROMPTS or found.votes < FEW_VOTES:
        enough = f"{FEW_VOTES} decided pairs on {FEW_PROMPTS} prompts"
        return f"Too early to say: {agrees}, on {found.prompts} prompts. From {enough} on this says more."
    if high < 0.5:
        return f"No: {agrees}. It prefers the worse answers, and PPO would make them."
    if low <= 0.5:
        return f"Not as it is: {agrees}, which a coin may reach too. PPO would follow noise; improve the reward first."
    if gain[1] <= 0:
        return (
            f"Not shown: {agrees}, but the rule “{rule}” alone reaches {by_length:.0%}, and the difference "
            f"[{100 * gain[1]:+.0f}, {100 * gain[2]:+.0f} points] does not lie above 0. PPO may learn length only."
        )
    best = f" People agree with themselves on {found.consistency:.0%} of repeats." if found.consistency else ""
    if value < GOOD_ACCURACY:
        return f"A little: {agrees}. Better than chance, but weak: use a high KL coefficient and compare often.{best}"
    return f"Yes: {agrees}, and length alone explains only {by_length:.0%}.{best}"


def over_optimised(found: RewardAgreement) -> list[str]:
    """A sentence for each player that the reward model likes surely more than people do: reward hacking's mark.

    >>> rate = (0.7, 0.6, 0.8)
    >>> accuracy = Accuracy(rate, rate, rate, "longer-wins", rate)
    >>> over_optimised(RewardAgreement("rm", 90, 30, accuracy, {"ppo": (0.2, 0.1, 0.3), "base": rate}, True))[0][:40]
    'rm favours ppo: by its scores ppo wins 2'
    """
    if found.prompts < FEW_PROMPTS:
        return []
    trained = {name: interval for name, interval in found.favours.items() if name != "base"}
    return [
        f"{found.reward} favours {name}: by its scores {name} wins {100 * more:.0f} points more often than people say "
        f"[{100 * low:+.0f}, {100 * high:+.0f}]; that looks like over-optimisation"
        for name, (more, low, high) in trained.items()
        if low > 0
    ]
