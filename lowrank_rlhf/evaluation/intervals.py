"""Bootstrap intervals that resample prompts, not rows: answers to one prompt are not independent."""

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float, float]  # value, low, high

LEVEL = (2.5, 97.5)
CHUNK = 2**22  # draws held at a time


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    weights: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Weighted mean with a 95 % percentile interval from resampling whole clusters with replacement.

    Σ wᵢvᵢ / Σ wᵢ over the rows of the drawn clusters; Efron 1979, with clusters as the units (Davison and Hinkley 1997,
    section 3.8). On differences of two figures of the same row this is the paired interval of their difference.

    Args:
        values: one per row.
        clusters: the prompt of each row.
        weights: of each row, above 0; 1 where not given.

    Returns:
        mean, low, high.

    >>> bootstrap_mean([1.0, 1.0], ["a", "b"])
    (1.0, 1.0, 1.0)
    >>> bootstrap_mean([1.0, 0.0, 0.0], ["a", "a", "a"], weights=[0.5, 0.25, 0.25])[0]
    0.5
    """
    owner = _owners(clusters)
    weight = np.ones(len(owner)) if weights is None else np.asarray(weights, dtype=np.float64)
    sums = np.bincount(owner, weights=weight * np.asarray(values, dtype=np.float64))
    totals = np.bincount(owner, weights=weight)
    means = [sums[draws].sum(axis=1) / totals[draws].sum(axis=1) for draws in _draws(len(sums), resamples, seed)]
    low, high = np.percentile(np.concatenate(means), LEVEL)
    return float(sums.sum() / totals.sum()), float(low), float(high)


def bootstrap_statistic(
    statistic: Callable[..., float | None],
    columns: Sequence[ArrayLike],
    clusters: Sequence[Hashable],
    *,
    resamples: int = 500,
    seed: int = 0,
) -> Interval | None:
    """Any statistic of some columns, with a 95 % percentile interval over resampled clusters; slower than a mean.

    Args:
        statistic: of the columns, restricted to the drawn rows; None where it is undefined.
        columns: each with one value per row.

    Returns:
        value, low, high; None where the statistic is undefined on the data, or on most resamples of it.

    >>> bootstrap_statistic(lambda x: float(x.max()), [[1.0, 3.0]], ["a", "a"])
    (3.0, 3.0, 3.0)
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    value = statistic(*arrays)
    if value is None:
        return None
    owner = _owners(clusters)
    order, sizes = np.argsort(owner, kind="stable"), np.bincount(owner)
    found = []
    for draw in (draw for draws in _draws(len(sizes), resamples, seed) for draw in draws):
        rows = order[_ranges((np.cumsum(sizes) - sizes)[draw], sizes[draw])]
        again = statistic(*(array[rows] for array in arrays))
        if again is not None:
            found.append(again)
    if 2 * len(found) < resamples:
        return None
    low, high = np.percentile(found, LEVEL)
    return value, float(low), float(high)


def _owners(clusters: Sequence[Hashable]) -> NDArray[np.intp]:
    """The number of each row's cluster, in the order in which they appear."""
    keys = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    return np.array([keys[c] for c in clusters], dtype=np.intp)


def _ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, … of each range, one after the other.

    >>> _ranges(np.array([5, 0]), np.array([3, 2]))
    array([5, 6, 7, 0, 1])
    """
    return np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Numbers of clusters, (some resamples, clusters) at a time: memory does not grow with the data squared."""
    random = np.random.default_rng(seed)
    step = max(1, CHUNK // clusters)
    for first in range(0, resamples, step):
        yield random.integers(clusters, size=(min(step, resamples - first), clusters))
