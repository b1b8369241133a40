"""The recipe of GRPO, as typed as those of `config`."""

from dataclasses import dataclass, field
from typing import Literal

from lowrank_rlhf.config import KL, OnPolicyRecipe, ranged


@dataclass(frozen=True)
class GRPO:
    """The update. Each prompt is answered `group_size` times, and an answer is judged against its group.

    `advantage`: grpo is r − mean of the group, over its standard deviation where `scale_by_std`; rloo is r − mean of
    the others. `loss_aggregation`: the mean over all tokens of a minibatch, or over its sequences of each one's mean.
    `clip_range_high`: the bound of the ratio above 1, where it is to be wider than `clip_range`.
    The other keys are as in PPO's group.
    """

    group_size: int = ranged(8, 2)
    advantage: Literal["grpo", "rloo"] = "grpo"
    scale_by_std: bool = True
    loss_aggregation: Literal["token", "sequence"] = "token"
    inner_epochs: int = ranged(1, 1)
    minibatches: int = ranged(1, 1)
    clip_range: float = ranged(0.2, 0)
    clip_range_high: float | None = ranged(None, 0)
    entropy_coef: float = ranged(0.0, 0)
    target_kl_stop: float | None = ranged(None, 0)


@dataclass(frozen=True)
class GRPOKL(KL):
    """The same with other defaults: k3 in the policy's loss, as in the GRPO paper."""

    coef: float = ranged(0.01, 0)
    estimator: Literal["k1", "k2", "k3"] = "k3"
    in_reward: bool = False


@dataclass(frozen=True, kw_only=True)
class GRPORecipe(OnPolicyRecipe):
    stage = "grpo"
    kl: GRPOKL = field(default_factory=GRPOKL)
    grpo: GRPO = field(default_factory=GRPO)
