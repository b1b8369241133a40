"""What PPO and GRPO begin with: a recipe that makes sense, the policy and its reference."""

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import OnPolicyRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.stages.policy_start import POLICY, REFERENCE, choose_reference, refuse_dropout, start_policy


def refuse_contradictions(recipe: OnPolicyRecipe, *, minibatches: int, group_size: int | None = None) -> None:
    """
    Args:
        group_size: completions of each prompt, where the stage has such a key.

    Raises:
        UserError: two keys of the recipe cannot both be meant.
    """
    train = recipe.train
    completions, grouped = train.batch_size * (group_size or 1), f" × {recipe.stage}.group_size ({group_size})"
    micro_batches = completions // train.micro_batch_size
    if completions % train.micro_batch_size or micro_batches % minibatches:
        raise UserError(
            f"train.batch_size: {train.batch_size} prompts{grouped if group_size else ''} must be {recipe.stage}."
            f"minibatches ({minibatches}) times a multiple of train.micro_batch_size ({train.micro_batch_size})"
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
    if not recipe.kl.in_reward and recipe.kl.clip is not None:
        raise UserError("kl.clip: bounds the KL in the reward, where kl.in_reward: false puts none; drop one of them")
    if recipe.kl.target is not None and recipe.kl.coef == 0:
        raise UserError("kl.target: a coefficient of 0 cannot be steered, it stays 0; set kl.coef above 0")
    refuse_dropout(recipe.lora)


def start_roles(recipe: OnPolicyRecipe, backbone: Backbone) -> None:
    """Add `policy` and resolve the reference, which is an adapter of its own where it is to move."""
    start_policy(backbone, recipe.lora, recipe.policy_from)
    if recipe.kl.refresh_steps and REFERENCE not in backbone.roles:
        backbone.copy_role(POLICY, REFERENCE)
    choose_reference(backbone, recipe.reference, recipe.stage)
