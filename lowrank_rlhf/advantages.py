"""From scores to advantages: token rewards, masked moments, whitening, GAE, groups. Pure tensor functions."""

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


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """How much better an answer is than its group, the answers to the same prompt; these sum to 0 in each group.

    (r_i − mean) / (std + eps), with Bessel's correction (n − 1); Shao et al. 2024 (GRPO), arXiv:2402.03300, §4.1.2.
    Without the division, Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783, §3: dividing gives prompts that are nearly
    always or nearly never answered right a larger weight. A group whose rewards are all equal gives exactly 0.

    Args:
        rewards: one per completion, a row per prompt. Shape (N, G), G ≥ 2.
        scale_by_std: divide.

    Returns:
        Shape (N, G); in standard deviations of the group, or in the unit of the rewards.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]))  # std √(1/3)
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale_by_std=False)
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        centred = centred / (rewards.std(dim=1, keepdim=True) + eps)
    return torch.where(all_equal(rewards).unsqueeze(1), 0.0, centred)


def leave_one_out_baseline(rewards: Tensor) -> Tensor:
    """The mean reward of the other answers to the same prompt, which an answer's own reward has no part in.

    b_i = 1/(G − 1) Σ_{j≠i} r_j; Ahmadian et al. 2024 (RLOO), arXiv:2402.14740, after Kool et al. 2019. As b_i
    does not depend on answer i, the gradient of (r_i − b_i) log π is that of r_i log π in expectation.

    Args:
        rewards: one per completion, a row per prompt. Shape (N, G), G ≥ 2.

    Returns:
        Shape (N, G); the advantage is `rewards` less this.

    >>> rewards = torch.tensor([[1.0, 2.0, 6.0]])
    >>> leave_one_out_baseline(rewards), rewards - leave_one_out_baseline(rewards)
    (tensor([[4.0000, 3.5000, 1.5000]]), tensor([[-3.0000, -1.5000,  4.5000]]))
    """
    size = rewards.shape[1]
    # A product and not (Σ r − r_i), whose rounding would depend on r_i
    others = 1 - torch.eye(size, dtype=rewards.dtype, device=rewards.device)
    return rewards @ others / (size - 1)


def all_equal(rewards: Tensor) -> Tensor:
    """Which groups teach nothing because every answer has the same reward. (N, G) → bool (N,).

    >>> all_equal(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    tensor([ True, False])
    """
    return (rewards == rewards[:, :1]).all(dim=1)
