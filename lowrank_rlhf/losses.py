"""The losses, each a pure function of tensors. Masked means are the caller's to take, where they differ per batch."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Reward-model loss, one value per pair.

    −(1 − ε) log σ(d) − ε log σ(−d) with d = r_chosen − r_rejected − margin. Without margin and ε: Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1. Margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2. ε is the probability that a label is
    wrong, as in conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).

    Args:
        chosen_scores: shape (B,).
        rejected_scores: shape (B,).
        margin: by how much the chosen answer is to lead, in units of the score. Shape (B,).
        label_smoothing: ε in [0, 0.5].

    Returns:
        Shape (B,).

    >>> bradley_terry_loss(torch.zeros(1), torch.zeros(1))  # no preference: log 2
    tensor([0.6931])
    """
    lead = chosen_scores - rejected_scores - margin
    loss = -F.logsigmoid(lead)
    # Not a weighted sum at ε = 0: 0 times the infinite loss of a wrong label would not be 0
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-lead) if label_smoothing else loss


def centering_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """(r_chosen + r_rejected)², one value per pair: what keeps scores near 0, which differences leave free.

    Eisenstein et al. 2023, arXiv:2312.09244, section 2.

    >>> centering_loss(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0]))
    tensor([0., 9.])
    """
    return (chosen_scores + rejected_scores) ** 2


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(P / (1 − P)) of a probability given as its logarithm, finite with a finite gradient at both ends.

    Hong et al. 2024, arXiv:2403.07691, section 4, where P = exp(mean log-prob of the completion's tokens).
    1 − P is −expm1(log P) where P is near 1 and 1 − exp(log P) where it is near 0; float32 cannot tell log P above
    −1.2e-7 from 0, so it is cut there.

    Args:
        mean_logps: at most 0, nats per token. Any shape.

    >>> log_odds(torch.log(torch.tensor([0.5, 0.2])))  # odds 1 and 1/4
    tensor([ 0.0000, -1.3863])
    """
    cut = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    near_one = cut > -math.log(2)
    # Each branch sees only values it can take: the gradient of one that is not chosen would be 0 · inf = nan
    near = torch.log(-torch.expm1(torch.where(near_one, cut, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_one, -1.0, cut)))
    return mean_logps - torch.where(near_one, near, far)


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Odds-ratio preference optimisation, one value per pair.

    −log P(chosen) − λ log σ(log odds(chosen) − log odds(rejected)) with odds = P / (1 − P); Hong et al. 2024,
    arXiv:2403.07691, eq. 6 and 7. P is the geometric mean of the completion's token probabilities, so that the
    first term is the SFT loss of the chosen answer, a mean over its tokens. trl's term is a mean over all tokens of the
    batch's chosen texts, prompts included.

    Args:
        chosen_logps: mean over completion tokens, nats per token, at most 0. Shape (B,).
        rejected_logps: shape (B,).
        beta: λ.

    Returns:
        loss and log odds ratio, each of shape (B,).

    >>> half, fifth = torch.log(torch.tensor([0.5])), torch.log(torch.tensor([0.2]))
    >>> orpo_loss(half, fifth, beta=1.0)  # odds ratio 4: log 2 − log σ(log 4) = log 2 + log 5/4
    (tensor([0.9163]), tensor([1.3863]))
    """
    log_odds_ratio = log_odds(chosen_logps) - log_odds(rejected_logps)
    return -chosen_logps - beta * F.logsigmoid(log_odds_ratio), log_odds_ratio


def ppo_policy_loss(
    token_logps: Tensor,
    old_token_logps: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, one value per token, to be minimised.

    max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε_high)) with ρ = π/π_old; Schulman et al. 2017, arXiv:1707.06347, eq. 7, where
    ε_high = ε. A larger ε_high lets unlikely tokens grow: Yu et al. 2025 (DAPO), arXiv:2503.14476, §3.1.

    Args:
        token_logps: under the policy being updated, nats; carries the gradient. Shape (B, T).
        old_token_logps: under the policy that sampled, nats. Shape (B, T).
        advantages: shape (B, T).
        clip_range: ε > 0.
        clip_range_high: ε_high > 0; None is ε.

    Returns:
        loss (B, T), and a bool (B, T) that is True where the clipped branch was the larger.

    >>> ppo_policy_loss(torch.log(torch.tensor([[1.5]])), torch.zeros(1, 1), torch.ones(1, 1), clip_range=0.2)
    (tensor([[-1.2000]]), tensor([[True]]))
    """
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = torch.exp(token_logps - old_token_logps)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def aggregate_loss(
    token_losses: Tensor, mask: Tensor, how: Literal["token", "sequence"], *, tokens: int, sequences: int
) -> Tensor:
    """The share that a micro-batch has in the loss of a minibatch: over all its micro-batches these add up to a mean.

    token: Σ_i Σ_t loss_it / Σ_i |o_i|, every token counts the same (Yu et al. 2025 (DAPO), arXiv:2503.14476, §3.3);
    sequence: 1/N Σ_i 1/|o_i| Σ_t loss_it, every completion counts the same, so the tokens of a long one count less
    (Shao et al. 2024 (GRPO), arXiv:2402.03300, eq. 3).

    Args:
        token_losses: shape (b, T).
        mask: bool, True at completion tokens, of which each row has at least one. Shape (b, T).
        tokens: completion tokens of the minibatch, Σ_i |o_i|.
        sequences: completions of the minibatch, N.

    Returns:
        A scalar.

    >>> losses, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> aggregate_loss(losses, mask, "token", tokens=3, sequences=2)  # (1 + 2 + 6) / 3
    tensor(3.)
    >>> aggregate_loss(losses, mask, "sequence", tokens=3, sequences=2)  # (1.5 + 6) / 2
    tensor(3.7500)
    """
    counted = torch.where(mask, token_losses, 0.0)
    if how == "token":
        return counted.sum() / tokens
    return (counted.sum(dim=1) / mask.sum(dim=1)).sum() / sequences


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped value loss, one value per token.

    ½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²); described for RLHF by Huang et al. 2024, arXiv:2403.17031.

    Args:
        values: predictions being trained; carry the gradient. Shape (B, T).
        old_values: predictions at rollout time. Shape (B, T).
        returns: shape (B, T).
        clip_range: ε > 0, in units of the score.

    Returns:
        loss (B, T), and a bool (B, T) that is True where the clipped branch was the larger.

    >>> ppo_value_loss(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), clip_range=0.2)
    (tensor([[0.3200]]), tensor([[True]]))
    """
    clipped_values = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped
