"""How nearly two columns of numbers rise and fall together."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² Σ(y − ȳ)²), in [−1, 1]; None where one of them is constant.

    >>> pearson([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), pearson([1.0, 1.0], [1.0, 2.0])
    (0.5, None)
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.min() == a.max() or b.min() == b.max():
        return None
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()  # squares of tiny scores would underflow
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's correlation of the ranks (Spearman 1904): how nearly one rises whenever the other does.

    >>> spearman([1.0, 2.0, 3.0], [1.0, 10.0, 100.0])
    1.0
    """
    return pearson(ranks(x), ranks(y))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs.

    >>> ranks([3.0, 1.0, 3.0])
    array([2.5, 1. , 2.5])
    """
    _, owner, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[owner])
