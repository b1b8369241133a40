"""The policy's loss in PPO and GRPO, token by token, with what it reports."""

from collections import defaultdict

import torch
from torch import Tensor

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPO, OnPolicyRecipe
from lowrank_rlhf.config_grpo import GRPO
from lowrank_rlhf.kl import kl_per_token
from lowrank_rlhf.losses import ppo_policy_loss
from lowrank_rlhf.stages.experience import Experience


class PolicyLoss:
    """The clipped surrogate, the entropy bonus and, outside the reward, the KL.

    Args:
        settings: the recipe's group of the method.
    """

    def __init__(self, recipe: OnPolicyRecipe, settings: PPO | GRPO, backbone: Backbone):
        self.backbone, self.settings, self.kl = backbone, settings, recipe.kl
        self.temperature = recipe.rollout.temperature
        self.clip_range_high = settings.clip_range_high if isinstance(settings, GRPO) else None

    def __call__(
        self, e: Experience, logps: Tensor, entropy: Tensor, kl_coef: float, sums: defaultdict[str, float]
    ) -> Tensor:
        """The loss of each token (b, C), 0 outside the completions.

        Args:
            sums: the metrics, summed over completion tokens, are added here.
        """
        surrogate, clipped = ppo_policy_loss(
            logps,
            e.token_logps,
            e.advantages,
            clip_range=self.settings.clip_range,
            clip_range_high=self.clip_range_high,
        )
        loss = surrogate
        if self.settings.entropy_coef:  # without, backward would compute all logits once more, for a gradient of 0
            loss = loss - self.settings.entropy_coef * entropy
        if not self.kl.in_reward:
            loss = loss + kl_coef * kl_per_token(logps, e.reference_token_logps, self.kl.estimator)
        log_ratio = (logps.detach() - e.token_logps)[e.mask]
        sums["loss/policy_avg"] += masked_sum(surrogate, e.mask)
        sums["policy/approxkl_avg"] += float((0.5 * log_ratio**2).sum())
        sums["policy/clipfrac_avg"] += masked_sum(clipped, e.mask)
        sums["policy/entropy_avg"] += masked_sum(entropy, e.mask)
        sums["val/ratio"] += float(log_ratio.exp().sum())
        return torch.where(e.mask, loss, 0.0)

    def current_logps(self, e: Experience, value_role: str | None = None) -> tuple[Tensor, ...]:
        """Log-probs and entropies (b, C) of the role that is on, with gradient where it learns.

        Args:
            value_role: its values are read from the same states, and come last.
        """
        inputs = (e.batch.input_ids, e.batch.attention_mask, e.batch.completion_mask)
        logps, entropy, _, *values = self.backbone.read(*inputs, temperature=self.temperature, value_role=value_role)
        empty = logps.new_zeros(e.mask.shape)
        return tuple(empty.masked_scatter(e.mask, found) for found in (logps, entropy, *values))


def masked_sum(values: Tensor, mask: Tensor) -> float:
    return float(values.detach()[mask].sum())
