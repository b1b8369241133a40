"""Bootstrap intervals that resample prompts, not rows: answers to one prompt are not independent."""

from collections.abc import Hashable, Sequence

import numpy as np


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean with a 95 % percentile interval from resampling whole clusters with replacement.

    Args:
        values: one per row.
        clusters: the prompt of each row.

    Returns:
        mean, low, high.

    >>> bootstrap_mean([1.0, 1.0], ["a", "b"])
    (1.0, 1.0, 1.0)
    """
    keys = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    owner = np.array([keys[c] for c in clusters])
    sums = np.bincount(owner, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(owner)
    draws = np.random.default_rng(seed).integers(len(keys), size=(resamples, len(keys)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
