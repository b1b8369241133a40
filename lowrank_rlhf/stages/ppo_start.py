"""What PPO begins with: a recipe that makes sense, the policy, its reference and the value role."""

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.stages.policy_start import POLICY, REFERENCE, choose_reference, refuse_dropout, start_policy


def refuse_contradictions(recipe: PPORecipe) -> None:
    """
    Raises:
        UserError: two keys of the recipe cannot both be meant.
    """
    train, ppo = recipe.train, recipe.ppo
    micro_batches = train.batch_size // train.micro_batch_size
    if train.batch_size % train.micro_batch_size or micro_batches % ppo.minibatches:
        raise UserError(
            f"train.batch_size: {train.batch_size} prompts must be ppo.minibatches ({ppo.minibatches}) times a "
            f"multiple of train.micro_batch_size ({train.micro_batch_size})"
        )
    longest = recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
    if train.micro_batch_tokens is not None and train.micro_batch_tokens < longest:
        raise UserError(
            f"train.micro_batch_tokens: {train.micro_batch_tokens} do not hold one row of data.max_prompt_tokens + "
            f"data.max_completion_tokens = {longest} tokens"
        )
    if recipe.kl.refresh_steps and recipe.reference == "base":
        raise UserError("kl.refresh_steps: moves the reference, which reference: base forbids; use auto or start")
    if not recipe.kl.in_reward and recipe.kl.estimator == "k1":
        raise UserError("kl.estimator: k1 teaches nothing as a loss (its expected gradient is 0); use k2 or k3")
    if recipe.value_model.trunk == "policy" and recipe.value_model.init == "reward":
        raise UserError("value_model.init: reward is another trunk than value_model.trunk: policy; use auto or zero")
    if recipe.kl.target is not None and recipe.kl.coef == 0:
        raise UserError("kl.target: a coefficient of 0 cannot be steered, it stays 0; set kl.coef above 0")
    refuse_dropout(recipe.lora)


def start_roles(recipe: PPORecipe, backbone: Backbone) -> None:
    """Add `policy` and resolve the reference, which is an adapter of its own where it is to move."""
    start_policy(backbone, recipe.lora, recipe.policy_from)
    if recipe.kl.refresh_steps and REFERENCE not in backbone.roles:
        backbone.copy_role(POLICY, REFERENCE)
    choose_reference(backbone, recipe.reference, "ppo")


def start_value(recipe: PPORecipe, backbone: Backbone) -> None:
    """Add `value` as `value_model.init` says; a copy of a reward brings its head, else the head starts at zero."""
    if recipe.value_model.trunk == "policy":
        backbone.add_head("policy")
        return
    init = recipe.value_model.init
    if init == "auto":
        init = "reward" if "reward" in backbone.roles else "zero"
    if init == "zero":
        backbone.add_role("value", recipe.lora, head=True)
        return
    if init not in backbone.roles:
        raise UserError("value_model.init: reward needs a reward run in reward_from; use zero or policy")
    backbone.copy_role(init, "value")
    if "value" not in backbone.heads:
        backbone.add_head("value")
