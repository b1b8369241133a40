"""Shares of people's verdicts, with intervals that do not shrink to nothing where everybody said the same."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from lowrank_rlhf.evaluation.intervals import Interval, bootstrap_mean

TAIL = 0.025


def share(values: ArrayLike, prompts: Sequence[Hashable], weights: Sequence[float] | None = None) -> Interval | None:
    """Weighted mean of values in [0, 1] with a 95 % interval by prompt; None where there are none.

    The bootstrap of `evaluation.intervals`, but where all are 0 or all are 1 every resample is too, and the interval
    would be a point: there the exact bound 0.025^(1/n) of n prompts that all say yes (Clopper and Pearson 1934).

    >>> share([1, 1, 1], "abc") == (1.0, 0.025 ** (1 / 3), 1.0), share([], "")
    (True, None)
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return None
    bound = TAIL ** (1 / len(set(prompts)))
    if (array == 1).all():
        return 1.0, bound, 1.0
    if (array == 0).all():
        return 0.0, 0.0, 1 - bound
    return bootstrap_mean(array, prompts, weights=weights)
