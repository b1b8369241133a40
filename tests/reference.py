"""The formulas of lowrank_rlhf a second time, in float64 and plain loops, and the random batches fed to both.

Written from the equations in the docstrings, by case analysis and direct sums where the package recurses or
tensor tricks. Padding is never read: the loops run over completion tokens only.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


def random_masks(seed: int, count: int = 1000) -> Iterator[tuple[np.random.Generator, Mask]]:
    """Completion masks (runs of True from column 0; B 1..5, T 1..12), with the generator to draw the rest."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        rows, columns = rng.integers(1, 6), rng.integers(1, 13)
        yield rng, np.arange(columns) < rng.integers(1, columns + 1, size=(rows, 1))


def draw(rng: np.random.Generator, mask: Mask, dtype: str, low: float = -1, high: float = 1) -> Array:
    """Uniform values where `mask` is True, NaN elsewhere: whatever reads the padding shows."""
    return np.where(mask, rng.uniform(low, high, size=mask.shape), np.nan).astype(dtype)


def agrees_in_float64_and(float32_tolerance: float) -> pytest.MarkDecorator:
    """Parametrise a test by input type and absolute tolerance: 1e-6 in float64, the one given in float32."""
    return pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [("float64", 1e-6), ("float32", float32_tolerance)],
        ids=["float64", "float32"],
    )


def positions(mask: Mask) -> Iterator[tuple[int, int]]:
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                yield b, t


def kl_per_token(policy: Array, reference: Array, mask: Mask, estimator: str) -> Array:
    kl = np.zeros(mask.shape)
    for at in positions(mask):
        log_r = float(reference[at]) - float(policy[at])
        kl[at] = {"k1": -log_r, "k3": math.exp(log_r) - 1 - log_r}[estimator]
    return kl


def masked_mean(values: Array, mask: Mask) -> float:
    counting = [float(values[at]) for at in positions(mask)]
    return math.fsum(counting) / len(counting)


def whiten(values: Array, mask: Mask, shift_mean: bool, eps: float) -> Array:
    mean, n = masked_mean(values, mask), int(mask.sum())
    squares = [(float(values[at]) - mean) ** 2 for at in positions(mask)]
    whitened = np.zeros(mask.shape)
    for at in positions(mask):
        if n > 1:
            whitened[at] = (float(values[at]) - mean) / math.sqrt(math.fsum(squares) / (n - 1) + eps)
        if not shift_mean:
            whitened[at] += mean
    return whitened


def token_rewards(scores: Array, kl: Array, mask: Mask, kl_coef: float) -> Array:
    rewards = np.zeros(mask.shape)
    for b, t in positions(mask):
        rewards[b, t] = -kl_coef * float(kl[b, t])
        if t + 1 == mask.shape[1] or not mask[b, t + 1]:
            rewards[b, t] += float(scores[b])
    return rewards


def gae(rewards: Array, values: Array, mask: Mask, gamma: float, lam: float) -> tuple[Array, Array]:
    """A_t = Σ_l (γλ)^l δ_{t+l} over the rest of the completion: the sum of eq. 16, not its recursion."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, t in positions(mask):
        length = int(mask[b].sum())
        for s in range(t, length):
            after = float(values[b, s + 1]) if s + 1 < length else 0.0
            delta = float(rewards[b, s]) + gamma * after - float(values[b, s])
            advantages[b, t] += (gamma * lam) ** (s - t) * delta
        returns[b, t] = advantages[b, t] + float(values[b, t])
    return advantages, returns


def bradley_terry_loss(chosen: Array, rejected: Array) -> Array:
    return np.array([math.log(1 + math.exp(float(r) - float(c))) for c, r in zip(chosen, rejected, strict=True)])


def ppo_policy_loss(new: Array, old: Array, advantages: Array, mask: Mask, clip: float) -> tuple[Array, Mask]:
    """By the sign of A: a good token's ratio is capped at 1 + ε, a bad one's is floored at 1 − ε."""
    loss, clipped = np.zeros(mask.shape), np.zeros(mask.shape, dtype=bool)
    for at in positions(mask):
        ratio, advantage = math.exp(float(new[at]) - float(old[at])), float(advantages[at])
        bounded = min(ratio, 1 + clip) if advantage > 0 else max(ratio, 1 - clip)
        loss[at], clipped[at] = -advantage * bounded, advantage != 0 and bounded != ratio
    return loss, clipped


def ppo_value_loss(values: Array, old: Array, returns: Array, mask: Mask, clip: float) -> tuple[Array, Mask]:
    """The prediction scored is whichever of V and V moved back to within ε of V_old is farther from R."""
    loss, clipped = np.zeros(mask.shape), np.zeros(mask.shape, dtype=bool)
    for at in positions(mask):
        value, centre, target = float(values[at]), float(old[at]), float(returns[at])
        step = value - centre
        near = value if abs(step) <= clip else centre + math.copysign(clip, step)
        clipped[at] = abs(near - target) > abs(value - target)
        loss[at] = (near - target if clipped[at] else value - target) ** 2 / 2
    return loss, clipped


def token_logp_and_entropy(
    hidden: Array,
    weight: Array,
    target: int,
    bias: Array | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> tuple[float, float]:
    """log p(target) and −Σ p log p at one position, from its hidden state (H,) and the weights (V, H)."""
    logits = []
    for v in range(weight.shape[0]):
        z = math.fsum(float(h) * float(w) for h, w in zip(hidden, weight[v], strict=True))
        z = logit_scale * (z if bias is None else z + float(bias[v]))
        z = z if logit_softcap is None else logit_softcap * math.tanh(z / logit_softcap)
        logits.append(z / temperature)
    log_normaliser = math.log(math.fsum(math.exp(z) for z in logits))
    logps = [z - log_normaliser for z in logits]
    return logps[target], -math.fsum(math.exp(logp) * logp for logp in logps)
