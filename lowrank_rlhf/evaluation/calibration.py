"""Whether σ(margin) is the share of pairs in which the better answer wins, and the temperature that makes it so.

Every pair is written chosen first, so its label is always 1 and says nothing. What is judged is therefore the answer
with the higher score: its confidence σ(|m|) ∈ [½, 1) against whether it is the chosen one.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowrank_rlhf.evaluation.accuracy import rightness
from lowrank_rlhf.evaluation.intervals import Floats

MOST_BINS, PAIRS_PER_BIN = 10, 20


@dataclass(frozen=True)
class Bin:
    """A bin of the reliability curve: its pairs, their mean confidence, and how often they are right."""

    pairs: int
    weight: float
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Fit:
    """How well probabilities fit. `nll` in nats per pair, `ece` expected calibration error, `brier` squared error."""

    nll: float
    ece: float
    brier: float


def confidence(margins: ArrayLike, temperature: float = 1.0) -> Floats:
    """σ(|m|/T): the probability that the answer with the higher score is the chosen one, says the model.

    >>> confidence([0.0, -np.log(3.0)])
    array([0.5 , 0.75])
    """
    return np.exp(-nll(np.abs(np.asarray(margins, dtype=np.float64)), temperature))


def nll(margins: ArrayLike, temperature: float = 1.0) -> Floats:
    """−log σ(m/T), nats: what the Bradley–Terry model loses on each pair.

    >>> nll([0.0]).round(4)
    array([0.6931])
    """
    return np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64) / temperature)


def reliability(margins: ArrayLike, weights: ArrayLike, temperature: float = 1.0) -> list[Bin]:
    """Bins of equally many pairs in the order of their confidence: 10, or fewer that hold 20 pairs each.

    >>> [(b.pairs, round(b.confidence, 2), b.accuracy) for b in reliability([0.0, np.log(3.0)], [1, 1])]
    [(2, 0.62, 0.75)]
    """
    sure, right = confidence(margins, temperature), rightness(margins)
    weight = np.asarray(weights, dtype=np.float64)
    count = max(1, min(MOST_BINS, len(sure) // PAIRS_PER_BIN))
    bins = []
    for rows in np.array_split(np.argsort(sure, kind="stable"), count):
        share = weight[rows] / weight[rows].sum()
        bins.append(
            Bin(len(rows), float(weight[rows].sum()), float(share @ sure[rows]), float(share @ right[rows])),
        )
    return bins


def expected_calibration_error(bins: list[Bin]) -> float:
    """Σ_b (w_b / w) |accuracy_b − confidence_b|; Guo et al. 2017, arXiv:1706.04599, eq. 3, on equal-count bins.

    Never negative, so on few pairs it is above 0 also for a calibrated model.

    >>> expected_calibration_error([Bin(1, 1.0, 0.75, 0.5), Bin(3, 3.0, 0.75, 0.75)])
    0.0625
    """
    total = sum(b.weight for b in bins)
    return sum(b.weight * abs(b.accuracy - b.confidence) for b in bins) / total


def fit_of(margins: ArrayLike, weights: ArrayLike, temperature: float = 1.0) -> Fit:
    """NLL, ECE and the Brier score (1 − σ(m/T))² of some pairs (Brier 1950; the same for both orders of a pair).

    >>> fit_of([0.0, 0.0], [1, 1]).brier  # a coin, on every pair
    0.25
    """
    losses, weight = nll(margins, temperature), np.asarray(weights, dtype=np.float64)
    return Fit(
        nll=float(np.average(losses, weights=weight)),
        ece=expected_calibration_error(reliability(margins, weights, temperature)),
        brier=float(np.average((1 - np.exp(-losses)) ** 2, weights=weight)),
    )


def fit_temperature(margins: ArrayLike, weights: ArrayLike) -> float | None:
    """The T > 0 with the least mean −log σ(m/T); Guo et al. 2017, arXiv:1706.04599, section 4.2.

    Convex in 1/T: the root of its derivative −Σ w m σ(−m/T), by bisection. None where there is none: every pair is
    right (T → 0), or the scores are no better than chance (T → ∞).

    >>> round(fit_temperature([2.0, 2.0, 2.0, -2.0], [1, 1, 1, 1]), 4)  # σ(2/T) = ¾ at T = 2 / log 3
    1.8205
    """
    m, weight = np.asarray(margins, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not (m < 0).any() or weight @ m <= 0:
        return None

    def slope(inverse: float) -> float:
        return -float((weight * m) @ np.exp(-np.logaddexp(0.0, inverse * m)))

    low, high = 0.0, 1.0 / float(np.abs(m).max())
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


def is_judged(prompt: str) -> bool:
    """Whether a prompt is in the half on which the temperature is judged rather than fitted.

    Salted: a hash that the split into train and held-out prompts uses would put all held-out ones on one side.
    """
    return hashlib.sha256(b"calibration " + prompt.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0


@dataclass(frozen=True)
class TemperatureScaling:
    """Fitted on one half of the prompts; `before` (T = 1) and `after` are of the other half."""

    temperature: float
    fitted_pairs: int
    judged_pairs: int
    before: Fit
    after: Fit


def scale_temperature(margins: ArrayLike, weights: ArrayLike, judged: ArrayLike) -> TemperatureScaling | str:
    """Temperature scaling, judged on pairs that it was not fitted on; or why there is none, in words.

    Args:
        judged: bool, of each pair: see `is_judged`.

    >>> scale_temperature([1.0, 2.0], [1, 1], [True, False])
    'every pair of the half it is fitted on is right, so any lower temperature is better'
    """
    m, weight = np.asarray(margins, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    test: NDArray[np.bool_] = np.asarray(judged, dtype=bool)
    if test.all() or not test.any():
        return "all pairs are in one half: too few prompts to fit on some and judge on others"
    temperature = fit_temperature(m[~test], weight[~test])
    if temperature is None:
        perfect = not (m[~test] < 0).any() and bool((m[~test] > 0).any())
        return (
            "every pair of the half it is fitted on is right, so any lower temperature is better"
            if perfect
            else (
                "on the half it is fitted on the scores are no better than chance, so any higher temperature is better"
            )
        )
    before, after = fit_of(m[test], weight[test]), fit_of(m[test], weight[test], temperature)
    return TemperatureScaling(temperature, int((~test).sum()), int(test.sum()), before, after)
