"""The update of PPO: the clipped policy loss, and the clipped value loss beside it.

The value role has its own trunk, optimizer and backward, so the two losses never compete and one set of activations is
alive at a time; with `value_model.trunk: policy` both are one forward and one backward of the policy's adapter.
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.losses import ppo_value_loss
from lowrank_rlhf.stages.experience import Metrics, add, align
from lowrank_rlhf.stages.policy_loss import PolicyLoss, masked_sum
from lowrank_rlhf.stages.ptx import SFTMix
from lowrank_rlhf.stages.returns import ValuedExperience
from lowrank_rlhf.stages.steps import Steps


class Updater:
    """Both losses and the steps on them.

    Args:
        mix: demonstrations to learn from beside, or None.
    """

    def __init__(self, recipe: PPORecipe, backbone: Backbone, mix: SFTMix | None):
        self.recipe, self.backbone, self.mix = recipe, backbone, mix
        self.loss = PolicyLoss(recipe, recipe.ppo, backbone)
        self.shares_trunk = recipe.value_model.trunk == "policy"
        policy = backbone.parameters("policy")
        if self.shares_trunk:
            policy, value = policy[:-1], policy[-1:]  # the head stands last
        else:
            value = backbone.parameters("value")
        self.steps = Steps(
            recipe.stage,
            recipe.train,
            {"policy": policy, "value": value},
            learning_rates={"value": recipe.value_model.learning_rate},
            target_kl_stop=recipe.ppo.target_kl_stop,
        )

    def __call__(self, experiences: list[ValuedExperience], kl_coef: float, order: torch.Generator) -> Metrics:
        """`inner_epochs` passes over the batch in minibatches."""
        epochs = self.recipe.ppo.inner_epochs
        return self.steps.passes(experiences, epochs, order, lambda minibatch: self.minibatch(minibatch, kl_coef))

    def minibatch(self, minibatch: list[ValuedExperience], kl_coef: float) -> Metrics:
        """One step of the policy and one of the value, unless the policy is too far from the one that sampled."""
        row = self.policy_gradients(minibatch, kl_coef)
        if self.steps.stops(row):
            return row
        if self.mix is not None:
            with self.backbone.use("policy", train=True):
                row["loss/ptx_avg"] = self.mix.backward()
        row["policy/grad_norm"] = self.steps.step("policy")
        if not self.shares_trunk:
            row |= self.value_gradients(minibatch)
        row["value/grad_norm"] = self.steps.step("value")
        self.steps.count_skipped(row)
        return row

    def policy_gradients(self, minibatch: list[ValuedExperience], kl_coef: float) -> Metrics:
        """Accumulate the gradient of the policy loss, the mean over the minibatch's completion tokens."""
        tokens = sum(int(e.mask.sum()) for e in minibatch)
        sums: Metrics = {}
        with self.backbone.use("policy", train=True):
            for e in minibatch:
                add(sums, self.backbone.learn(len(e.rows), partial(self._learn_policy, e, kl_coef, tokens)))
        return {name: value / tokens for name, value in sums.items()}

    def value_gradients(self, minibatch: list[ValuedExperience]) -> Metrics:
        """Accumulate the gradient of the value loss, the mean over the minibatch's completion tokens."""
        tokens = sum(int(e.mask.sum()) for e in minibatch)
        sums: Metrics = {}
        with self.backbone.use("value", train=True):
            for e in minibatch:
                add(sums, self.backbone.learn(len(e.rows), partial(self._learn_value, e, tokens)))
        return {name: value / tokens for name, value in sums.items()}

    def _learn_policy(self, e: ValuedExperience, kl_coef: float, tokens: int) -> Metrics:
        sums: defaultdict[str, float] = defaultdict(float)
        logps, entropy, *values = self.loss.current_logps(e, "policy" if self.shares_trunk else None)
        loss = self.loss(e, logps, entropy, kl_coef, sums).sum()
        if values:
            loss = loss + self.recipe.value_model.coef * self.value_loss(e, values[0], sums)
        (loss / tokens).backward()
        return sums

    def _learn_value(self, e: ValuedExperience, tokens: int) -> Metrics:
        sums: defaultdict[str, float] = defaultdict(float)
        batch = e.batch
        values = self.backbone.values("value", batch.input_ids, batch.attention_mask, batch.completion_mask)
        (self.value_loss(e, align(values, batch.completion_mask), sums) / tokens).backward()
        return sums

    def value_loss(self, e: ValuedExperience, values: Tensor, sums: defaultdict[str, float]) -> Tensor:
        """The clipped value loss, summed over completion tokens."""
        loss, clipped = ppo_value_loss(values, e.values, e.returns, clip_range=self.recipe.ppo.value_clip_range)
        sums["loss/value_avg"] += masked_sum(loss, e.mask)
        sums["val/clipfrac_avg"] += masked_sum(clipped, e.mask)
        return torch.where(e.mask, loss, 0.0).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps.state_dict(), "mix": self.mix.state_dict() if self.mix else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])
        if self.mix:
            self.mix.load_state_dict(state["mix"])
