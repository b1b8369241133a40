"""Win rates: from scores or from a judge's verdicts, without the judge's liking for a position or for length."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RIDGE = 0.1
NEWTON_STEPS = 50


class Verdict(NamedTuple):
    """What a pairwise judge says of two answers.

    Attributes:
        first: how much it prefers the first, in [0, 1]; 0.5 is a tie; None: what it said cannot be read.
        said: its words, where it has any.
    """

    first: float | None
    said: str = ""


def score_preference(score: float, other: float) -> float:
    """1 where the first score is the higher, 0.5 where they are equal, else 0.

    >>> score_preference(2.0, 1.0), score_preference(1.0, 1.0), score_preference(0.0, 1.0)
    (1.0, 0.5, 0.0)
    """
    return 0.5 + 0.5 * float(np.sign(score - other))


def both_orders(shown_first: float | None, shown_second: float | None) -> float | None:
    """The preference for an answer that was judged once as the first and once as the second of a pair.

    (P + 1 − P')/2, where P is the preference for the first shown when the answer is first and P' when it is second.
    A judge that adds the same amount for the first position adds it to P and to P', so it cancels; Zheng et al. 2023,
    arXiv:2306.05685, swap positions too but call disagreement a tie, which this is for verdicts of 0 and
    1. None where either verdict cannot be read: one order alone would bring the bias back.

    >>> both_orders(1.0, 1.0), both_orders(1.0, 0.0), both_orders(None, 0.0)
    (0.5, 1.0, None)
    """
    if shown_first is None or shown_second is None:
        return None
    return (shown_first + 1.0 - shown_second) / 2


def length_controlled_win_rate(
    preferences: Sequence[float],
    length_differences: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    weights: Sequence[float] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The win rate that the fitted model predicts for answers of equal length, with a 95 % interval by prompt.

    P(win_i) = σ(θ + φ·tanh(d_i / std(d))), fitted by maximum likelihood to preferences in [0, 1], and σ(θ) returned.
    It is the model of Dubois et al. 2024, arXiv:2404.04475, without its term for the difficulty of each
    instruction, which needs many policies on the same instructions, and without cross-validated regularisation; a
    ridge of 0.05(θ² + φ²), a tenth of a comparison, keeps θ and φ finite where one side always wins. With equal
    differences everywhere length explains nothing, and the rate is the raw one up to the ridge.

    Args:
        preferences: for the policy against the other, one per comparison.
        length_differences: length of the policy's answer minus the other's.
        clusters: the prompt of each comparison; whole prompts are resampled, and the model fitted again.
        weights: of each comparison; 1 where not given.

    Returns:
        rate, low, high.
    """
    wins, gaps = np.asarray(preferences, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    spread = gaps.std()
    features = np.stack([np.ones_like(gaps), np.tanh(gaps / spread) if spread > 0 else np.zeros_like(gaps)], axis=1)
    keys = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    owner = np.array([keys[c] for c in clusters])
    draws = np.random.default_rng(seed).multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=resamples)
    times = np.concatenate([np.ones((1, len(wins))), draws[:, owner]])
    times *= np.ones(len(wins)) if weights is None else np.asarray(weights, dtype=np.float64)
    rates = _sigmoid(fit_logistic(features, wins, times)[:, 0])
    low, high = np.percentile(rates[1:], [2.5, 97.5])
    return float(rates[0]), float(low), float(high)


def fit_logistic(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ridge-penalised logistic regression, for many weightings of the same rows at once, by Newton's method.

    argmin_w Σ_i weight_i·CE(target_i, σ(x_i·w)) + RIDGE/2·|w|²; strictly convex, so there is one answer.

    Args:
        features: shape (N, K).
        targets: in [0, 1]. Shape (N,).
        weights: of each row in each fit. Shape (R, N).

    Returns:
        coefficients, shape (R, K).

    >>> half = fit_logistic(np.ones((2, 1)), np.array([0.0, 1.0]), np.ones((1, 2)))
    >>> half.round(6).tolist()
    [[0.0]]
    """
    coefficients = np.zeros((len(weights), features.shape[1]))
    for _ in range(NEWTON_STEPS):
        predicted = _sigmoid(coefficients @ features.T)
        gradient = (weights * (predicted - targets)) @ features + RIDGE * coefficients
        curvature = weights * predicted * (1 - predicted)
        hessian = np.einsum("rn,nj,nk->rjk", curvature, features, features, optimize=True)
        hessian += RIDGE * np.eye(features.shape[1])
        # A bounded step: far from the minimum the curvature vanishes and a full one would overshoot
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -1, 1)
        coefficients -= step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
