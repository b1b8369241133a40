"""What PPO and GRPO begin with: a recipe that makes sense, the policy and its reference."""

from lowrank_rlhf.adapters import answering_role
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import OnPolicyRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import load_run_role
from lowrank_rlhf.stages.experience import Metrics

REFERENCE = "start"  # the frozen adapter of the reference, where it is not the base


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
    if recipe.lora.dropout:
        raise UserError(
            f"lora.dropout: {recipe.stage.upper()} compares log-probs of the same tokens and needs 0; drop the key"
        )


def start_policy(recipe: OnPolicyRecipe, backbone: Backbone) -> None:
    """Add `policy`, a copy of the run in `policy_from` or zero, and resolve the reference."""
    if recipe.policy_from is None:
        backbone.add_role("policy", recipe.lora)
        if recipe.kl.refresh_steps:
            backbone.copy_role("policy", REFERENCE)
            backbone.reference_role = REFERENCE
        elif recipe.reference == "start":
            print(f"{recipe.stage}: reference: start is the base itself here, the policy starts at zero", flush=True)
        return
    load_run_role(
        backbone, recipe.policy_from, answering_role(recipe.policy_from) or "sft", REFERENCE, key="policy_from"
    )
    backbone.drop_head(REFERENCE)  # of a policy that shared its trunk with its value
    backbone.copy_role(REFERENCE, "policy")
    backbone.reference_role = None if recipe.reference == "base" else REFERENCE


def check_start(recipe: OnPolicyRecipe, metrics: Metrics) -> None:
    """KL to the reference is 0 before any update, unless the recipe asked for another start.

    Raises:
        RuntimeError: it is not, so the reference is not what the policy started from.
    """
    literal_base = recipe.reference == "base" and recipe.policy_from is not None
    if literal_base:
        print(f"{recipe.stage}: reference: base after SFT, so KL starts at {metrics['objective/kl']:.2f} nats, not 0")
    elif abs(metrics["objective/kl"]) > 1e-3:
        raise RuntimeError(f"KL to the reference is {metrics['objective/kl']} nats before any update, expected 0")
