"""Which group a row belongs to: by quantiles of a number, by a column's value, by how much longer an answer is."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

MISSING, OTHER = "(none)", "(others)"
MOST_GROUPS = 12
# Upper ends of the relative length difference (chosen − rejected) / longer
LENGTH_ENDS = ((-0.5, "much shorter"), (-0.1, "shorter"), (0.1, "about as long"), (0.5, "longer"), (1.0, "much longer"))


def by_quantile(values: ArrayLike, buckets: int = 4) -> list[str]:
    """The quantile bucket of each value, numbered and named by its range; equal values share one.

    Edges are values of the data (inverted empirical distribution function); a bucket holds what is above the edge
    before it and at most its own. Many equal values make fewer buckets.

    >>> by_quantile([1.0, 2.0, 3.0, 4.0], buckets=2)
    ['1: 1 to 2', '1: 1 to 2', '2: 3 to 4', '2: 3 to 4']
    >>> by_quantile([7.0, 7.0, 7.0])
    ['1: 7', '1: 7', '1: 7']
    """
    array = np.asarray(values, dtype=np.float64)
    ends = np.unique(np.quantile(array, np.arange(1, buckets + 1) / buckets, method="inverted_cdf"))
    owner = np.searchsorted(ends, array)
    names = []
    for bucket in range(len(ends)):
        low, high = array[owner == bucket].min(), array[owner == bucket].max()
        names.append(f"{bucket + 1}: {low:.3g}" + (f" to {high:.3g}" if low < high else ""))
    return [names[bucket] for bucket in owner]


def by_value(values: Sequence[Any]) -> list[str]:
    """A column's values as names; many different numbers become quantile buckets, many other values their commonest.

    >>> by_value(["a", None, 2, True])
    ['a', '(none)', '2', 'true']
    """
    names = [MISSING if v is None or v == "" else v if isinstance(v, str) else _written(v) for v in values]
    counts = Counter(names)
    if len(counts) <= MOST_GROUPS:
        return names
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) + counts[MISSING] == len(values) and np.isfinite(np.asarray(numbers, dtype=np.float64)).all():
        bucket = iter(by_quantile(numbers))
        return [name if name == MISSING else next(bucket) for name in names]
    kept = {name for name, _ in counts.most_common(MOST_GROUPS - 1)}
    return [name if name in kept else OTHER for name in names]


def by_length(chosen: ArrayLike, rejected: ArrayLike) -> list[str]:
    """How long the chosen answer is beside the rejected one: their difference in tokens over the longer of the two.

    >>> by_length([10, 10, 19, 10, 4], [10, 30, 20, 8, 0])
    ['about as long', 'much shorter', 'about as long', 'longer', 'much longer']
    """
    a, b = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    relative = (a - b) / np.maximum(np.maximum(a, b), 1)
    ends = [end for end, _ in LENGTH_ENDS]
    return [LENGTH_ENDS[int(i)][1] for i in np.searchsorted(ends, relative)]


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
