"""Whether the length of an answer decides its score, in figures and in words."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lowrank_rlhf.evaluation.correlation import pearson, spearman
from lowrank_rlhf.evaluation.intervals import Floats, Interval, bootstrap_statistic

# Length "decides" beyond both of the first, and "matters" beyond either of the second
DECIDES_SHARE, DECIDES_CORRELATION = 0.9, 0.7
MATTERS_SHARE, MATTERS_CORRELATION = 0.75, 0.5


@dataclass(frozen=True)
class LengthBias:
    """None: undefined, because all scores or all lengths are equal.

    Attributes:
        pearson, spearman: between the score and the tokens of each distinct answer.
        margin_pearson, margin_spearman: between the differences of score and of tokens, each pair in both orders, so
            that which answer is the chosen one does not enter.
        longer_higher: share of the pairs of unequal length and score whose longer answer has the higher score.
        right_where_longer, right_where_shorter: accuracy where the chosen answer is the longer one, the shorter one.
    """

    pearson: Interval | None
    spearman: Interval | None
    margin_pearson: Interval | None
    margin_spearman: Interval | None
    longer_higher: float | None
    right_where_longer: float | None
    right_where_shorter: float | None


def both_orders(differences: ArrayLike) -> Floats:
    """
    >>> both_orders([1.0, 2.0])
    array([ 1.,  2., -1., -2.])
    """
    array = np.asarray(differences, dtype=np.float64)
    return np.concatenate([array, -array])


def longer_higher_share(margins: ArrayLike, length_differences: ArrayLike, weights: ArrayLike) -> float | None:
    """How often the longer answer has the higher score, ties of either left out.

    >>> longer_higher_share([1.0, -1.0, 0.0, 2.0], [5, -5, 5, -1], [1, 1, 1, 1])  # yes, yes, tie, no
    0.6666666666666666
    """
    agree = np.sign(np.asarray(margins)) * np.sign(np.asarray(length_differences))
    weight = np.where(agree == 0, 0.0, np.asarray(weights, dtype=np.float64))
    return float(weight[agree > 0].sum() / weight.sum()) if weight.any() else None


def margin_correlations(
    margins: ArrayLike, length_differences: ArrayLike, prompts: Sequence[Hashable]
) -> tuple[Interval | None, Interval | None]:
    """Pearson and Spearman of margin and length difference, each pair in both orders, with intervals by prompt."""
    columns, clusters = [both_orders(margins), both_orders(length_differences)], [*prompts, *prompts]
    return bootstrap_statistic(pearson, columns, clusters), bootstrap_statistic(spearman, columns, clusters)


def verdict(bias: LengthBias) -> str:
    """What the figures say about length, in one sentence or two.

    >>> verdict(LengthBias(None, None, None, None, None, None, None))
    'length: nothing to say, all scores or all lengths are equal'
    """
    if bias.longer_higher is None or bias.margin_spearman is None:
        return "length: nothing to say, all scores or all lengths are equal"
    correlation = bias.margin_spearman[0]
    longer = bias.longer_higher >= 0.5
    share = bias.longer_higher if longer else 1 - bias.longer_higher
    strength = correlation if longer else -correlation
    what = (
        f"the {'longer' if longer else 'shorter'} answer gets the higher score in {100 * share:.0f} % of pairs "
        f"(correlation {correlation:.2f} between the differences in score and in length)"
    )
    if share >= DECIDES_SHARE and strength >= DECIDES_CORRELATION:
        rates = [("longer", bias.right_where_longer), ("shorter", bias.right_where_shorter)]
        right = " and ".join(f"{100 * rate:.0f} % where it is the {name}" for name, rate in rates if rate is not None)
        return f"length decides: {what}; the chosen answer wins in {right}"
    if share >= MATTERS_SHARE or strength >= MATTERS_CORRELATION:
        return f"length matters: {what}"
    return f"length does not decide: {what}"
