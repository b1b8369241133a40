"""What an on-policy stage knows about its rollouts, per micro-batch, and the numbers it reports about them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_rlhf.data import Batch, Example

Metrics = dict[str, float]


@dataclass(frozen=True)
class Unjudged:
    """A micro-batch of b rollouts and what the policy and its reference say of them, without gradient.

    Tensors of tokens are (b, C), column 0 the first token of the completion, and 0 outside it.

    Attributes:
        minibatch: the optimizer step it is part of.
        rows: which rollouts of the batch these are.
        mask: True at completion tokens.
    """

    minibatch: int
    rows: list[int]
    batch: Batch
    mask: Tensor
    token_logps: Tensor
    reference_token_logps: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Rollouts(Unjudged):
    """The same with its rewards.

    Attributes:
        scores: after penalties and shaping. Shape (b,).
        rewards: per token.
    """

    scores: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Experience(Rollouts):
    """All that the policy's update needs."""

    advantages: Tensor


def align(values: Tensor, completion_mask: Tensor) -> Tensor:
    """(b, T) at completion positions to (b, C), each row starting at its first completion token, zero (False) behind.

    >>> align(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[False, True, True], [False, False, True]])).tolist()
    [[1, 2], [5, 0]]
    """
    lengths = completion_mask.sum(dim=1)
    columns = torch.arange(int(lengths.max()), device=values.device)
    mask = columns < lengths.unsqueeze(1)
    return values.new_zeros(mask.shape).masked_scatter(mask, values[completion_mask])


def add(sums: Metrics, part: Metrics) -> None:
    """What a micro-batch adds to the sums of a minibatch."""
    for name, value in part.items():
        sums[name] = sums.get(name, 0.0) + value


def kl_of_completions(rollouts: SequenceOf[Rollouts]) -> list[float]:
    """log π − log π_ref of each completion, nats, in the order of the micro-batches."""
    return [kl for part in rollouts for kl in (part.token_logps - part.reference_token_logps).sum(dim=1).tolist()]


def objective_metrics(rollouts: SequenceOf[Rollouts], kl_coef: float) -> Metrics:
    """What the rollouts were like, per completion, under trl's metric names; scores are what the update sees."""
    kl = torch.tensor(kl_of_completions(rollouts))
    scores = torch.cat([part.scores for part in rollouts]).cpu()
    lengths = torch.cat([part.mask.sum(dim=1) for part in rollouts]).float()
    entropy = torch.cat([part.entropy.sum(dim=1) for part in rollouts])
    rewards = torch.cat([part.rewards.sum(dim=1) for part in rollouts]).cpu()
    return {
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": float((rewards - scores).mean()),
        "objective/rlhf_reward": float(rewards.mean()),
        "objective/entropy": float(entropy.mean()),
        "objective/length": float(lengths.mean()),
    }


def in_order(values: SequenceOf[float], rollouts: SequenceOf[Rollouts]) -> list[float]:
    """Values in the order of the micro-batches, back in the order of the rollouts."""
    places = [i for part in rollouts for i in part.rows]
    return [value for _, value in sorted(zip(places, values, strict=True))]


class Said(NamedTuple):
    """The answers of an iteration: what each prompt got, its score and its KL to the reference, nats."""

    examples: SequenceOf[Example]
    texts: list[str]
    scores: list[float]
    kl: list[float]
