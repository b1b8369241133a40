"""What an on-policy stage knows about its rollouts, per micro-batch, and the numbers it reports about them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_rlhf.advantages import gae, whiten
from lowrank_rlhf.config import PPO
from lowrank_rlhf.data import Batch, Example

Metrics = dict[str, float]


@dataclass(frozen=True)
class Rollouts:
    """A micro-batch of b rollouts and what passes without gradient say of them.

    Tensors of tokens are (b, C), column 0 the first token of the completion, and 0 outside it.

    Attributes:
        minibatch: the optimizer step it is part of.
        mask: True at completion tokens.
        scores: after penalties and shaping. Shape (b,).
        rewards: per token.
    """

    minibatch: int
    batch: Batch
    mask: Tensor
    token_logps: Tensor
    reference_token_logps: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Experience(Rollouts):
    """All that the update needs."""

    advantages: Tensor
    returns: Tensor


def with_advantages(parts: list[Rollouts], settings: PPO, *, whiten_rewards: bool) -> list[Experience]:
    """GAE for every micro-batch; what is whitened is so over all completion tokens of the batch."""
    masks = [part.mask for part in parts]
    rewards = [part.rewards for part in parts]
    if whiten_rewards:
        rewards = whiten_together(rewards, masks, shift_mean=False)
    pairs = [
        gae(reward, part.values, part.mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
        for part, reward in zip(parts, rewards, strict=True)
    ]
    advantages = [advantage for advantage, _ in pairs]
    if settings.whiten:
        advantages = whiten_together(advantages, masks)
    return [
        Experience(**{field.name: getattr(part, field.name) for field in fields(part)}, advantages=a, returns=returns)
        for part, a, (_, returns) in zip(parts, advantages, pairs, strict=True)
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


def align(values: Tensor, completion_mask: Tensor) -> Tensor:
    """(b, T) at completion positions to (b, C), each row starting at its first completion token, zero (False) behind.

    >>> align(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[False, True, True], [False, False, True]])).tolist()
    [[1, 2], [5, 0]]
    """
    lengths = completion_mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()), device=values.device)
    mask = columns < lengths.unsqueeze(1)
    return values.new_zeros(mask.shape).masked_scatter(mask, values[completion_mask])


def kl_of_completions(experiences: list[Experience]) -> list[float]:
    """log π − log π_ref of each completion, nats, in the order of the micro-batches."""
    return [kl for e in experiences for kl in (e.token_logps - e.reference_token_logps).sum(dim=1).tolist()]


def objective_metrics(experiences: list[Experience], kl_coef: float) -> Metrics:
    """What the rollouts were like, per completion, under trl's metric names; scores are what the update sees."""
    kl = torch.tensor(kl_of_completions(experiences))
    scores = torch.cat([e.scores for e in experiences]).cpu()
    lengths = torch.cat([e.mask.sum(dim=1) for e in experiences]).float()
    entropy = torch.cat([e.entropy.sum(dim=1) for e in experiences])
    rewards = torch.cat([e.rewards.sum(dim=1) for e in experiences]).cpu()
    returns = torch.cat([e.returns[e.mask] for e in experiences])
    residual = returns - torch.cat([e.values[e.mask] for e in experiences])
    return {
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": float((rewards - scores).mean()),
        "objective/rlhf_reward": float(rewards.mean()),
        "objective/entropy": float(entropy.mean()),
        "objective/length": float(lengths.mean()),
        "val/explained_variance": float(1 - residual.var() / returns.var().clamp(min=1e-8)),
    }


def in_order(values: SequenceOf[float], groups: SequenceOf[tuple[int, list[int]]]) -> list[float]:
    """Values in the order of the micro-batches, back in the order of the rollouts.

    >>> in_order([1.0, 2.0, 3.0], [(0, [2]), (1, [0, 1])])
    [2.0, 3.0, 1.0]
    """
    places = [i for _, group in groups for i in group]
    return [value for _, value in sorted(zip(places, values, strict=True))]


class Said(NamedTuple):
    """The answers of an iteration: what each prompt got, its score and its KL to the reference, nats."""

    examples: SequenceOf[Example]
    texts: list[str]
    scores: list[float]
    kl: list[float]
