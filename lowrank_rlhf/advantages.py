"""From scores to advantages: token rewards, masked moments, whitening, GAE. Pure tensor functions."""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where `mask` is True; 0 when there are none.

    Args:
        values: any shape.
        mask: bool, the same shape. True = counts.

    >>> masked_mean(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(var + eps) over all entries that count together, 0 elsewhere.

    The variance has Bessel's correction (n − 1). With fewer than two counting entries there is no variance and the
    result is 0 (or the value itself, `shift_mean=False`).

    Args:
        values: shape (B, T).
        mask: bool, shape (B, T). True = counts.
        shift_mean: False keeps the mean, as for rewards.

    >>> whiten(torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([[True, True, False]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    count = mask.sum()
    mean = masked_mean(values, mask)
    if count < 2:
        return torch.where(mask, values - mean if shift_mean else values, 0.0)
    variance = torch.where(mask, (values - mean) ** 2, 0.0).sum() / (count - 1)
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def token_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, *, kl_coef: float) -> Tensor:
    """Per-token rewards: −kl_coef · KL at every completion token, plus the score at the last one.

    Ouyang et al. 2022, arXiv:2203.02155, §3.5 (the PPO objective without the pretraining term).

    Args:
        scores: one per completion. Shape (B,).
        kl: per-token KL, nats. Shape (B, T).
        completion_mask: bool, shape (B, T); each row is a run of True from column 0, of length ≥ 1.
        kl_coef: ≥ 0, score units per nat.

    Returns:
        Shape (B, T), 0 outside the completion.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[0.5, 0.5, 9.0]]), mask, kl_coef=0.1)
    tensor([[-0.0500,  0.9500,  0.0000]])
    """
    rewards = torch.where(completion_mask, -kl_coef * kl, 0.0)
    last = completion_mask.sum(dim=1) - 1
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def gae(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over completion tokens only; the state after the last token is worth 0.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γ λ A_{t+1},  return_t = A_t + V_t;
    Schulman et al. 2016, arXiv:1506.02438, eq. 11–16.

    Args:
        rewards: shape (B, T).
        values: V of the state *before* each token. Shape (B, T).
        completion_mask: bool, shape (B, T); each row is a run of True from column 0.
        gamma: discount per token, in [0, 1].
        gae_lambda: in [0, 1]; 0 is one-step TD, 1 is Monte Carlo.

    Returns:
        advantages and returns, each (B, T), 0 outside the completion.

    >>> mask = torch.tensor([[True, True]])
    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), mask, gamma=1.0, gae_lambda=1.0)
    (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    next_values = torch.where(completion_mask[:, 1:], values[:, 1:], 0.0)
    next_values = torch.cat([next_values, torch.zeros_like(values[:, :1])], dim=1)
    deltas = torch.where(completion_mask, rewards + gamma * next_values - values, 0.0)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    return advantages, torch.where(completion_mask, advantages + values, 0.0)
