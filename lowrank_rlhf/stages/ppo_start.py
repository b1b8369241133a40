"""What PPO begins with beside what it shares with GRPO: a recipe that makes sense, and the value role."""

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.stages import on_policy_start


def refuse_contradictions(recipe: PPORecipe) -> None:
    """
    Raises:
        UserError: two keys of the recipe cannot both be meant.
    """
    on_policy_start.refuse_contradictions(recipe, minibatches=recipe.ppo.minibatches)
    if recipe.value_model.trunk == "policy" and recipe.value_model.init == "reward":
        raise UserError("value_model.init: reward is another trunk than value_model.trunk: policy; use auto or zero")


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
