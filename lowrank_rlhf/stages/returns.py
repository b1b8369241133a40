"""PPO's experience: rollouts with values, advantages by GAE and returns."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_rlhf.advantages import gae, whiten
from lowrank_rlhf.config import PPO
from lowrank_rlhf.stages.experience import Experience, Metrics, Rollouts


@dataclass(frozen=True)
class ValuedExperience(Experience):
    """All that the updates of policy and value need."""

    values: Tensor
    returns: Tensor


def with_advantages(
    rollouts: SequenceOf[Rollouts], values: SequenceOf[Tensor], settings: PPO, *, whiten_rewards: bool
) -> list[ValuedExperience]:
    """GAE for every micro-batch; what is whitened is so over all completion tokens of the batch."""
    masks = [part.mask for part in rollouts]
    rewards = [part.rewards for part in rollouts]
    if whiten_rewards:
        rewards = whiten_together(rewards, masks, shift_mean=False)
    pairs = [
        gae(reward, value, mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
        for reward, value, mask in zip(rewards, values, masks, strict=True)
    ]
    advantages = [advantage for advantage, _ in pairs]
    if settings.whiten:
        advantages = whiten_together(advantages, masks)
    return [
        ValuedExperience(**vars(part), advantages=advantage, values=value, returns=returns)
        for part, value, advantage, (_, returns) in zip(rollouts, values, advantages, pairs, strict=True)
    ]


def whiten_together(values: list[Tensor], masks: list[Tensor], *, shift_mean: bool = True) -> list[Tensor]:
    """`whiten` over the tokens of all micro-batches at once.

    >>> mask = torch.tensor([[True, False]])
    >>> whiten_together([torch.tensor([[1.0, 9.0]]), torch.tensor([[3.0, 9.0]])], [mask, mask])
    [tensor([[-0.7071,  0.0000]]), tensor([[0.7071, 0.0000]])]
    """
    flat = torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)])
    flat = whiten(flat, torch.ones_like(flat, dtype=torch.bool), shift_mean=shift_mean)
    pieces = flat.split([int(mask.sum()) for mask in masks])
    return [
        torch.zeros_like(value).masked_scatter(mask, piece)
        for value, mask, piece in zip(values, masks, pieces, strict=True)
    ]


def explained_variance(experiences: SequenceOf[ValuedExperience]) -> Metrics:
    """How much of the variance of the returns the values explain: 1 is all, 0 what a constant would."""
    returns = torch.cat([e.returns[e.mask] for e in experiences])
    residual = returns - torch.cat([e.values[e.mask] for e in experiences])
    return {"val/explained_variance": float(1 - residual.var() / returns.var().clamp(min=1e-8))}
