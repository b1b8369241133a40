"""From the scores of reward sources to the scores PPO is rewarded with: scaled, clipped, less a price of length."""

import math

import torch
from torch import Tensor

from lowrank_rlhf.config import ScoreShaping


class RunningMoments:
    """Count, mean and variance of all values so far, as exact as if they had come at once.

    Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances": of two
    sets with n, mean, M2 = Σ(x − mean)² each and δ = mean_b − mean_a,

        n = n_a + n_b,  mean = mean_a + δ n_b / n,  M2 = M2_a + M2_b + δ² n_a n_b / n.

    >>> moments = RunningMoments()
    >>> moments.update(torch.tensor([1.0, 3.0]))
    >>> moments.update(torch.tensor([5.0]))
    >>> moments.count, moments.mean, moments.std  # √((4 + 0 + 4) / 2)
    (3, 3.0, 2.0)
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Take in a batch of any shape.

        Raises:
            ValueError: a value is not finite; what is kept is as it was.
        """
        batch = values.detach().to("cpu", torch.float64)
        if not torch.isfinite(batch).all():
            raise ValueError("running moments take finite values only")
        n = batch.numel()
        if n == 0:
            return
        mean = float(batch.mean())
        m2 = float(((batch - mean) ** 2).sum())
        total, delta = self.count + n, mean - self.mean
        self.m2 += m2 + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Sample standard deviation (n − 1); 0 with fewer than two values."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def scale(self) -> float:
        """What to divide by: the standard deviation, or 1 where the values are all the same but for rounding."""
        return self.std if self.std > 1e-6 * abs(self.mean) else 1.0

    def state_dict(self) -> dict[str, float]:
        """
        >>> RunningMoments().state_dict()
        {'count': 0, 'mean': 0.0, 'm2': 0.0}
        """
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), state["mean"], state["m2"]


def shape_scores(scores: Tensor, lengths: Tensor, settings: ScoreShaping, moments: RunningMoments) -> Tensor:
    """clip(score / σ, ±clip) − length_penalty · length, each where `settings` asks for it.

    σ is the running standard deviation of all scores so far, these included; the mean is not taken off. Engstrom et
    al. 2020, arXiv:2005.12729, §3 (reward scaling and clipping): a completion has one score, so that their discounted
    sum of rewards is the score itself.

    Args:
        scores: of the reward sources, one per completion. Shape (B,).
        lengths: completion tokens. Shape (B,).
        settings: the recipe's `shaping`.
        moments: of the scores before these; takes them in where `settings.scale`.

    Returns:
        Shape (B,); in units of σ where `settings.scale`.

    >>> settings = ScoreShaping(scale=True, clip=1.0, length_penalty=0.01)
    >>> shape_scores(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([10, 20, 30]), settings, RunningMoments())  # σ = 2
    tensor([0.4000, 0.8000, 0.7000])
    """
    if settings.scale:
        moments.update(scores)
        scores = scores / moments.scale
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    return scores - settings.length_penalty * lengths.to(scores)
