"""How often the better answer gets the higher score, beside what an answer's length alone would give."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowrank_rlhf.evaluation.intervals import Floats, Interval, bootstrap_mean

RANDOM = 0.5


def rightness(differences: ArrayLike) -> Floats:
    """1 where chosen is above rejected, 0 where it is below, a tie is half right: a coin decides it.

    The mean is the pairwise accuracy, or the probability of superiority P(X > Y) + P(X = Y)/2; Vargha and Delaney 2000.

    Args:
        differences: chosen − rejected, of scores or of whatever else predicts the better answer. Shape (B,).

    >>> rightness([2.0, 0.0, -0.1])
    array([1. , 0.5, 0. ])
    """
    return 0.5 + 0.5 * np.sign(np.asarray(differences, dtype=np.float64))


@dataclass(frozen=True)
class Accuracy:
    """Of the scores, of two rules that look at nothing but the length, and the paired difference to the better rule.

    Attributes:
        better_rule: `longer-wins` or `shorter-wins`, whichever is right more often on these pairs.
        gain: accuracy − accuracy of `better_rule`, its interval paired: both are computed on the same resampled
            prompts. The rule is chosen once, on all pairs.
    """

    model: Interval
    longer_wins: Interval
    shorter_wins: Interval
    better_rule: str
    gain: Interval


def accuracy(
    margins: ArrayLike, length_differences: ArrayLike, weights: ArrayLike, prompts: Sequence[Hashable]
) -> Accuracy:
    """Weighted pairwise accuracy and its baselines, with 95 % intervals by prompt.

    Args:
        margins: score of chosen − score of rejected. Shape (B,).
        length_differences: tokens of chosen − tokens of rejected. Shape (B,).
        weights: 1, or 1 / number of pairs for the pairs of one ranked row. Shape (B,).
        prompts: of each pair.

    >>> found = accuracy([1.0, 2.0, -1.0, 3.0], [5, -5, 5, 5], [1, 1, 1, 1], "abcd")  # right: 1 1 0 1; longer: 1 0 1 1
    >>> found.model[0], found.longer_wins[0], found.shorter_wins[0], found.better_rule, found.gain[0]
    (0.75, 0.75, 0.25, 'longer-wins', 0.0)
    """
    right, longer = rightness(margins), rightness(length_differences)
    rules = {"longer-wins": longer, "shorter-wins": 1 - longer}
    rates = {name: bootstrap_mean(values, prompts, weights=weights) for name, values in rules.items()}
    better = max(rates, key=lambda name: rates[name][0])
    return Accuracy(
        model=bootstrap_mean(right, prompts, weights=weights),
        longer_wins=rates["longer-wins"],
        shorter_wins=rates["shorter-wins"],
        better_rule=better,
        gain=bootstrap_mean(right - rules[better], prompts, weights=weights),
    )


@dataclass(frozen=True)
class Group:
    """Accuracy within some of the pairs."""

    name: str
    pairs: int
    prompts: int
    accuracy: Interval


def accuracy_by(
    names: Sequence[str | None],
    margins: ArrayLike,
    weights: ArrayLike,
    prompts: Sequence[Hashable],
    order: Sequence[str] = (),
) -> list[Group]:
    """Accuracy of each group, sorted by name.

    Args:
        names: the group of each pair; None is in no group.
        order: names that stand first, in this order.

    >>> [(g.name, g.pairs, g.accuracy[0]) for g in accuracy_by(["x", "y", "x"], [1, 1, -1], [1, 1, 1], "abc")]
    [('x', 2, 0.5), ('y', 1, 1.0)]
    """
    right, weight = rightness(margins), np.asarray(weights, dtype=np.float64)
    groups = []
    there = {name for name in names if name is not None}
    for name in sorted(there, key=lambda name: (order.index(name) if name in order else len(order), name)):
        rows: NDArray[np.intp] = np.flatnonzero([other == name for other in names])
        who = [prompts[i] for i in rows]
        rate = bootstrap_mean(right[rows], who, weights=weight[rows])
        groups.append(Group(name, len(rows), len(set(who)), rate))
    return groups
