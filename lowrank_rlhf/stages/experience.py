"""What an on-policy stage knows about its rollouts, per micro-batch, and the numbers it reports about them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_rlhf.advantages import whiten
from lowrank_rlhf.data import Batch

Metrics = dict[str, float]


@dataclass(frozen=True)
class Experience:
    """A micro-batch of b rollouts and all that the update needs; tensors are (b, C), column 0 the first token.

    `mask` is True at completion tokens; everything else is 0 outside it.
    """

    batch: Batch
    mask: Tensor
    token_logps: Tensor
    reference_token_logps: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor


def align(values: Tensor, completion_mask: Tensor) -> Tensor:
    """(b, T) at completion positions to (b, C), each row starting at its first completion token, zero (False) behind.

    >>> align(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[False, True, True], [False, False, True]])).tolist()
    [[1, 2], [5, 0]]
    """
    lengths = completion_mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()), device=values.device)
    mask = columns < lengths.unsqueeze(1)
    return values.new_zeros(mask.shape).masked_scatter(mask, values[completion_mask])


def whiten_advantages(experiences: list[Experience]) -> list[Experience]:
    """Whiten over all completion tokens of the batch, not per micro-batch."""
    flat = torch.cat([e.advantages[e.mask] for e in experiences])
    flat = whiten(flat, torch.ones_like(flat, dtype=torch.bool))
    parts = flat.split([int(e.mask.sum()) for e in experiences])
    return [
        replace(e, advantages=torch.zeros_like(e.advantages).masked_scatter(e.mask, part))
        for e, part in zip(experiences, parts, strict=True)
    ]


def objective_metrics(experiences: list[Experience], kl_coef: float) -> Metrics:
    """What the rollouts were like, per completion, under trl's metric names."""
    kl = torch.cat([(e.token_logps - e.reference_token_logps).sum(dim=1) for e in experiences])
    scores = torch.cat([e.scores for e in experiences])
    lengths = torch.cat([e.mask.sum(dim=1) for e in experiences]).float()
    entropy = torch.cat([e.entropy.sum(dim=1) for e in experiences])
    returns = torch.cat([e.returns[e.mask] for e in experiences])
    residual = returns - torch.cat([e.values[e.mask] for e in experiences])
    return {
        "objective/scores": float(scores.mean()),
        "objective/kl": float(kl.mean()),
        "objective/non_score_reward": float(-kl_coef * kl.mean()),
        "objective/rlhf_reward": float((scores - kl_coef * kl).mean()),
        "objective/entropy": float(entropy.mean()),
        "objective/length": float(lengths.mean()),
        "val/explained_variance": float(1 - residual.var() / returns.var().clamp(min=1e-8)),
    }
