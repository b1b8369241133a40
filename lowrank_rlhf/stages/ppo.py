"""PPO on one base: roll out with `policy`, score with `reward`, compare with the reference, update policy and value.

One iteration (Ouyang et al. 2022, arXiv:2203.02155; Schulman et al. 2017, arXiv:1707.06347):

    completions ~ π;  rewards_t = −kl_coef · KL_t, plus the score at the last token;  GAE with V;
    then inner_epochs × minibatches steps of the clipped policy loss and, separately, the clipped value loss.

What it shares with GRPO is in on_policy.py, the loop in iterations.py; docs/ppo.md lists every detail.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor
from transformers import TrainerCallback

from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.experience import Metrics, Unjudged, align
from lowrank_rlhf.stages.iterations import run_iterations
from lowrank_rlhf.stages.on_policy import OnPolicy
from lowrank_rlhf.stages.ppo_start import refuse_contradictions, start_value
from lowrank_rlhf.stages.ppo_update import Updater
from lowrank_rlhf.stages.ptx import SFTMix
from lowrank_rlhf.stages.returns import ValuedExperience, explained_variance, with_advantages


def train(recipe: PPORecipe, run: Run, callbacks: SequenceOf[TrainerCallback] = ()) -> None:
    """Train the `policy` and `value` roles and save them; metrics row k is the rollout that update k learned from.

    Args:
        callbacks: transformers' `TrainerCallback`s, which hear of every iteration as a step.
    """
    run_iterations(PPO(recipe), run, callbacks, recipe.ptx.data)


class PPO:
    """The roles on one base, the prompts, the rewards and the optimizers of a PPO run."""

    def __init__(self, recipe: PPORecipe):
        refuse_contradictions(recipe)
        self.recipe = recipe
        self.on_policy = OnPolicy(recipe, minibatches=recipe.ppo.minibatches)
        self.backbone = backbone = self.on_policy.backbone
        start_value(recipe, backbone)
        self.value_role = "value" if recipe.value_model.trunk == "own" else "policy"
        self.roles = list(dict.fromkeys(("policy", self.value_role)))
        backbone.train_only(*self.roles)
        backbone.without_dropout(*self.roles)
        if recipe.train.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        rows = recipe.train.batch_size // recipe.ppo.minibatches
        mix = SFTMix(recipe, backbone, self.on_policy.renderer, rows) if recipe.ptx.data else None
        self.updater = Updater(recipe, backbone, mix)

    def collect(self) -> tuple[list[ValuedExperience], Metrics]:
        """Roll out one batch and compute everything about it that needs no gradient."""
        values: list[Tensor] = []
        rollouts, metrics = self.on_policy.collect(lambda part: values.append(self.values(part)))
        experiences = with_advantages(rollouts, values, self.recipe.ppo, whiten_rewards=self.recipe.shaping.whiten)
        return experiences, metrics | explained_variance(experiences)

    @torch.no_grad()
    def values(self, rollouts: Unjudged) -> Tensor:
        """Shape (b, C)."""
        batch = rollouts.batch
        with self.backbone.use(self.value_role):
            values = self.backbone.values(self.value_role, batch.input_ids, batch.attention_mask, batch.completion_mask)
        return align(values, batch.completion_mask)

    def update(self, experiences: list[ValuedExperience]) -> Metrics:
        """inner_epochs passes over the batch in minibatches; policy and value step separately."""
        return self.updater(experiences, self.on_policy.kl.coef, self.on_policy.shuffle)
