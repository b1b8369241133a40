"""What PPO begins with: a recipe that makes sense, the policy, its reference and the value role."""

from lowrank_rlhf.adapters import answering_role
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import load_run_role
from lowrank_rlhf.stages.experience import Metrics

REFERENCE = "start"  # the frozen adapter of the reference, where it is not the base


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
    if recipe.lora.dropout:
        raise UserError("lora.dropout: PPO compares log-probs of the same tokens and needs 0; drop the key")


def start_policy(recipe: PPORecipe, backbone: Backbone) -> None:
    """Add `policy`, a copy of the run in `policy_from` or zero, and resolve the reference."""
    if recipe.policy_from is None:
        backbone.add_role("policy", recipe.lora)
        if recipe.kl.refresh_steps:
            backbone.copy_role("policy", REFERENCE)
            backbone.reference_role = REFERENCE
        elif recipe.reference == "start":
            print("ppo: reference: start is the base itself here, the policy starts at zero", flush=True)
        return
    load_run_role(
        backbone, recipe.policy_from, answering_role(recipe.policy_from) or "sft", REFERENCE, key="policy_from"
    )
    backbone.drop_head(REFERENCE)  # of a policy that shared its trunk with its value
    backbone.copy_role(REFERENCE, "policy")
    backbone.reference_role = None if recipe.reference == "base" else REFERENCE


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


def check_start(recipe: PPORecipe, metrics: Metrics) -> None:
    """KL to the reference is 0 before any update, unless the recipe asked for another start.

    Raises:
        RuntimeError: it is not, so the reference is not what the policy started from.
    """
    literal_base = recipe.reference == "base" and recipe.policy_from is not None
    if literal_base:
        print(f"ppo: reference: base after SFT, so KL starts at {metrics['objective/kl']:.2f} nats, not 0")
    elif abs(metrics["objective/kl"]) > 1e-3:
        raise RuntimeError(f"KL to the reference is {metrics['objective/kl']} nats before any update, expected 0")
