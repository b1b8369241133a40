"""GRPO on one base: several answers to each prompt, each judged against the others; no value model.

One iteration (Shao et al. 2024, arXiv:2402.03300; with `advantage: rloo` Ahmadian et al. 2024, arXiv:2402.14740):

    G completions ~ π of each prompt;  advantage = (score − mean of the group) / its standard deviation, or
    score − mean of the others, the same for every token of a completion;
    then inner_epochs × minibatches steps of the clipped policy loss plus kl_coef · KL.

What it shares with PPO is in on_policy.py, the loop in iterations.py; docs/grpo.md says more.
"""

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lowrank_rlhf.advantages import all_equal, group_advantages, leave_one_out_baseline
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config_grpo import GRPO as Settings
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.losses import aggregate_loss
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.experience import Experience, Metrics, Rollouts, add
from lowrank_rlhf.stages.iterations import run_iterations
from lowrank_rlhf.stages.on_policy import OnPolicy
from lowrank_rlhf.stages.on_policy_start import refuse_contradictions
from lowrank_rlhf.stages.policy_loss import PolicyLoss
from lowrank_rlhf.stages.steps import Steps


def train(recipe: GRPORecipe, run: Run, callbacks: SequenceOf[TrainerCallback] = ()) -> None:
    """Train the `policy` role and save it; metrics row k is the rollout that update k learned from.

    Args:
        callbacks: transformers' `TrainerCallback`s, which hear of every iteration as a step.
    """
    run_iterations(GRPO(recipe), run, callbacks)


class GRPO:
    """The policy on its base, the prompts, the rewards and the optimizer of a GRPO run."""

    def __init__(self, recipe: GRPORecipe):
        settings = recipe.grpo
        refuse_contradictions(recipe, minibatches=settings.minibatches, group_size=settings.group_size)
        self.recipe, self.roles = recipe, ["policy"]
        self.on_policy = OnPolicy(recipe, minibatches=settings.minibatches, group_size=settings.group_size)
        self.backbone = backbone = self.on_policy.backbone
        backbone.train_only("policy")
        backbone.without_dropout("policy")
        if recipe.train.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        self.updater = Updater(recipe, backbone)

    def collect(self) -> tuple[list[Experience], Metrics]:
        """Roll out one batch and compute everything about it that needs no gradient."""
        rollouts, metrics = self.on_policy.collect()
        experiences, equal = with_group_advantages(rollouts, self.recipe.grpo)
        return experiences, metrics | {"frac_reward_zero_std": equal}

    def update(self, experiences: list[Experience]) -> Metrics:
        """inner_epochs passes over the batch in minibatches."""
        return self.updater(experiences, self.on_policy.kl.coef, self.on_policy.shuffle)


def with_group_advantages(rollouts: SequenceOf[Rollouts], settings: Settings) -> tuple[list[Experience], float]:
    """The advantage of each completion, at each of its tokens; and the share of groups whose rewards are all equal.

    A completion's reward is the sum of its tokens': the score, less the KL where that is in the reward.
    """
    places = torch.tensor([i for part in rollouts for i in part.rows])
    found = torch.cat([part.rewards.sum(dim=1) for part in rollouts])
    rewards = torch.empty_like(found)
    rewards[places] = found
    groups = rewards.view(-1, settings.group_size)
    if settings.advantage == "grpo":
        advantages = group_advantages(groups, scale_by_std=settings.scale_by_std)
    else:
        advantages = groups - leave_one_out_baseline(groups)
    flat = advantages.flatten()
    experiences = [
        Experience(**vars(part), advantages=torch.where(part.mask, flat[part.rows].unsqueeze(1), 0.0))
        for part in rollouts
    ]
    return experiences, float(all_equal(groups).float().mean())


class Updater:
    """The policy's loss and the steps on it."""

    def __init__(self, recipe: GRPORecipe, backbone: Backbone):
        self.settings, self.backbone = recipe.grpo, backbone
        self.loss = PolicyLoss(recipe, recipe.grpo, backbone)
        self.steps = Steps(
            recipe.stage,
            recipe.train,
            {"policy": backbone.parameters("policy")},
            target_kl_stop=recipe.grpo.target_kl_stop,
        )

    def __call__(self, experiences: list[Experience], kl_coef: float, order: torch.Generator) -> Metrics:
        epochs = self.settings.inner_epochs
        return self.steps.passes(experiences, epochs, order, lambda minibatch: self.minibatch(minibatch, kl_coef))

    def minibatch(self, minibatch: list[Experience], kl_coef: float) -> Metrics:
        """One step, unless the policy is too far from the one that sampled."""
        row = self.policy_gradients(minibatch, kl_coef)
        if not self.steps.stops(row):
            row["policy/grad_norm"] = self.steps.step("policy")
            self.steps.count_skipped(row)
        return row

    def policy_gradients(self, minibatch: list[Experience], kl_coef: float) -> Metrics:
        """Accumulate the gradient of the loss; metrics are means over the minibatch's completion tokens."""
        tokens, sequences = sum(int(e.mask.sum()) for e in minibatch), sum(len(e.mask) for e in minibatch)
        sums: Metrics = {}
        with self.backbone.use("policy", train=True):
            for e in minibatch:

                def learn(e: Experience = e) -> Metrics:
                    part: defaultdict[str, float] = defaultdict(float)
                    logps, entropy = self.loss.current_logps(e)
                    losses: Tensor = self.loss(e, logps, entropy, kl_coef, part)
                    how = self.settings.loss_aggregation
                    aggregate_loss(losses, e.mask, how, tokens=tokens, sequences=sequences).backward()
                    return part

                add(sums, self.backbone.learn(len(e.rows), learn))
        return {name: value / tokens for name, value in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])
