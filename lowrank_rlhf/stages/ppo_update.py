"""The update of PPO: clipped policy and value losses, and what is done when a step is not to be taken.

The value role has its own trunk, optimizer and backward, so the two losses never compete and one set of activations is
alive at a time; with `value_model.trunk: policy` both are one forward and one backward of the policy's adapter.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.kl import kl_per_token
from lowrank_rlhf.losses import ppo_policy_loss, ppo_value_loss
from lowrank_rlhf.stages.experience import Experience, Metrics, align
from lowrank_rlhf.stages.optim import optimizer_and_schedule
from lowrank_rlhf.stages.ptx import SFTMix

MAX_NONFINITE = 3  # steps in a row: one is bad luck of a batch, three are a run that has diverged


class Updater:
    """Both optimizers and the steps they take.

    Args:
        mix: demonstrations to learn from beside, or None.
    """

    def __init__(self, recipe: PPORecipe, backbone: Backbone, mix: SFTMix | None):
        self.recipe, self.backbone, self.mix = recipe, backbone, mix
        self.shares_trunk = recipe.value_model.trunk == "policy"
        policy = backbone.parameters("policy")
        if self.shares_trunk:
            policy, value = policy[:-1], policy[-1:]  # the head stands last
        else:
            value = backbone.parameters("value")
        steps, rate = recipe.train.max_steps, recipe.value_model.learning_rate
        self.optimizers = {
            "policy": optimizer_and_schedule(policy, recipe.train, steps),
            "value": optimizer_and_schedule(value, recipe.train, steps, rate),
        }
        self.nonfinite = 0  # steps in a row

    def __call__(self, minibatches: list[list[Experience]], kl_coef: float, order: torch.Generator) -> Metrics:
        """`inner_epochs` passes over the minibatches, each in a new order; means of what the steps report.

        Raises:
            UserError: three steps in a row had no finite gradient.
        """
        rows: list[Metrics] = []
        for _ in range(self.recipe.ppo.inner_epochs):
            for i in torch.randperm(len(minibatches), generator=order).tolist():
                row = self.minibatch(minibatches[i], kl_coef)
                rows.append(row)
                if row["policy/stopped"]:
                    break
            if rows[-1]["policy/stopped"]:
                break
        for _, schedule in self.optimizers.values():
            schedule.step()
        taken = {
            "policy/minibatches": float(len(rows) - rows[-1]["policy/stopped"]),  # the last was not learned from
            "policy/stopped": rows[-1]["policy/stopped"],
            "policy/skipped": sum(row.pop("policy/skipped") for row in rows),
        }
        return finite_means(rows) | taken | {"lr": float(self.optimizers["policy"][1].get_last_lr()[0])}

    def minibatch(self, minibatch: list[Experience], kl_coef: float) -> Metrics:
        """One step of the policy and one of the value, unless the policy is too far from the one that sampled."""
        row = self.policy_gradients(minibatch, kl_coef)
        limit = self.recipe.ppo.target_kl_stop
        stopped = limit is not None and row["policy/approxkl_avg"] > limit
        row |= {"policy/stopped": float(stopped), "policy/skipped": 0.0}
        if stopped:
            for optimizer, _ in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            return row
        if self.mix is not None:
            with self.backbone.use("policy", train=True):
                row["loss/ptx_avg"] = self.mix.backward()
        row["policy/grad_norm"] = self.step("policy")
        if not self.shares_trunk:
            row |= self.value_gradients(minibatch)
        row["value/grad_norm"] = self.step("value")
        row["policy/skipped"] = float(not all(math.isfinite(row[f"{role}/grad_norm"]) for role in self.optimizers))
        self.count_nonfinite(bool(row["policy/skipped"]))
        return row

    def policy_gradients(self, minibatch: list[Experience], kl_coef: float) -> Metrics:
        """Accumulate the gradient of the policy loss, the mean over the minibatch's completion tokens."""
        tokens = sum(int(e.mask.sum()) for e in minibatch)
        sums: dict[str, float] = defaultdict(float)
        with self.backbone.use("policy", train=True):
            for e in minibatch:
                hidden = self.backbone.hidden(e.batch.input_ids, e.batch.attention_mask)
                logps, entropy = self.current_logps(e, hidden)
                loss = self.policy_loss(e, logps, entropy, kl_coef, sums)
                if self.shares_trunk:
                    loss = loss + self.recipe.value_model.coef * self.value_loss(
                        e, self.values("policy", e, hidden), sums
                    )
                (loss / tokens).backward()
        return {name: value / tokens for name, value in sums.items()}

    def value_gradients(self, minibatch: list[Experience]) -> Metrics:
        """Accumulate the gradient of the value loss, the mean over the minibatch's completion tokens."""
        tokens = sum(int(e.mask.sum()) for e in minibatch)
        sums: dict[str, float] = defaultdict(float)
        with self.backbone.use("value", train=True):
            for e in minibatch:
                hidden = self.backbone.hidden(e.batch.input_ids, e.batch.attention_mask)
                (self.value_loss(e, self.values("value", e, hidden), sums) / tokens).backward()
        return {name: value / tokens for name, value in sums.items()}

    def policy_loss(
        self, e: Experience, logps: Tensor, entropy: Tensor, kl_coef: float, sums: dict[str, float]
    ) -> Tensor:
        """Summed over completion tokens: the clipped surrogate, the entropy bonus and, outside the reward, the KL."""
        settings = self.recipe.ppo
        surrogate, clipped = ppo_policy_loss(logps, e.token_logps, e.advantages, clip_range=settings.clip_range)
        loss = surrogate - settings.entropy_coef * entropy
        if not self.recipe.kl.in_reward:
            loss = loss + kl_coef * kl_per_token(logps, e.reference_token_logps, self.recipe.kl.estimator)
        log_ratio = (logps.detach() - e.token_logps)[e.mask]
        sums["loss/policy_avg"] += masked_sum(surrogate, e.mask)
        sums["policy/approxkl_avg"] += float((0.5 * log_ratio**2).sum())
        sums["policy/clipfrac_avg"] += masked_sum(clipped, e.mask)
        sums["policy/entropy_avg"] += masked_sum(entropy, e.mask)
        sums["val/ratio"] += float(log_ratio.exp().sum())
        return torch.where(e.mask, loss, 0.0).sum()

    def value_loss(self, e: Experience, values: Tensor, sums: dict[str, float]) -> Tensor:
        """The clipped value loss, summed over completion tokens."""
        loss, clipped = ppo_value_loss(values, e.values, e.returns, clip_range=self.recipe.ppo.value_clip_range)
        sums["loss/value_avg"] += masked_sum(loss, e.mask)
        sums["val/clipfrac_avg"] += masked_sum(clipped, e.mask)
        return torch.where(e.mask, loss, 0.0).sum()

    def current_logps(self, e: Experience, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (b, C) of the role that is on, with gradient where it learns."""
        mask = e.batch.completion_mask
        temperature = self.recipe.rollout.temperature
        logps, entropy, _ = self.backbone.completion_logps(hidden, e.batch.input_ids, mask, temperature=temperature)
        empty = logps.new_zeros(e.mask.shape)
        return empty.masked_scatter(e.mask, logps), empty.masked_scatter(e.mask, entropy)

    def values(self, role: str, e: Experience, hidden: Tensor) -> Tensor:
        """Values (b, C) of the role that is on."""
        return align(self.backbone.values_of(role, hidden, e.batch.completion_mask), e.batch.completion_mask)

    def step(self, role: str) -> float:
        """Clip and step, or leave the weights as they are where the gradient is not finite; returns its norm."""
        optimizer, _ = self.optimizers[role]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.max_grad_norm))
        if math.isfinite(norm):
            optimizer.step()
        else:
            print(f"ppo: the gradient of {role} is not finite, this step is left out", flush=True)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def count_nonfinite(self, skipped: bool) -> None:
        self.nonfinite = self.nonfinite + 1 if skipped else 0
        if self.nonfinite == MAX_NONFINITE:
            raise UserError(
                f"train.learning_rate: {MAX_NONFINITE} steps in a row had no finite gradient, the run has diverged; "
                "its last checkpoint is intact: lower train.learning_rate or value_model.learning_rate, start again"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"nonfinite": self.nonfinite, "mix": self.mix.state_dict() if self.mix else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nonfinite = state["nonfinite"]
        if self.mix:
            self.mix.load_state_dict(state["mix"])


def masked_sum(values: Tensor, mask: Tensor) -> float:
    return float(values.detach()[mask].sum())


def finite_means(rows: list[Metrics]) -> Metrics:
    """The mean of each metric over the rows where it is there and finite; left out where it never is.

    >>> finite_means([{"a": 1.0, "b": math.nan}, {"a": 3.0}])
    {'a': 2.0}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row and math.isfinite(row[name])] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}
