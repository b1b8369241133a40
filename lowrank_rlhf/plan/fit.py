"""What makes a recipe fit: the cheapest changes, as few of them and as small as will do."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.config_preference import DPORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.plan.predict import Plan
from lowrank_rlhf.stages.dpo import COUPLED
from lowrank_rlhf.stages.dpo import refuse_contradictions as check_dpo
from lowrank_rlhf.stages.on_policy_start import refuse_contradictions as check_on_policy
from lowrank_rlhf.stages.ppo_start import refuse_contradictions as check_ppo
from lowrank_rlhf.stages.run_trainer import refuse_uneven

BUSY = 1024  # tokens of a forward: with fewer, a smaller micro-batch counts as dearer than checkpointing
SHORTEST = 32  # tokens; no text is made shorter than this
GIVE_UP = 60  # plans

Changes = dict[str, Any]  # dotted key → value


class Lever(NamedTuple):
    """A key that takes less memory the further its value goes.

    Attributes:
        price: what a change costs.
        floor: tokens of a forward, below which it is not to go.
    """

    key: str
    price: str
    floor: int = 0


ROLLOUT = Lever("rollout.batch_size", "slower rollouts, other draws")
MICRO = Lever("train.micro_batch_size", "the same gradients, slower")
LEVERS = (  # from the cheapest to the dearest
    ROLLOUT,
    MICRO._replace(floor=BUSY),
    Lever("train.gradient_checkpointing", "the same gradients, slower: a forward more in each update"),
    MICRO,
    Lever("value_model.trunk", "values from the policy's adapter: another PPO"),
    Lever("data.max_completion_tokens", "cuts longer answers: another training"),
    Lever("data.max_prompt_tokens", "cuts longer prompts at the front: another training"),
)
PRICES = {lever.key: lever.price for lever in LEVERS}


def check(recipe: Any) -> None:
    """
    Raises:
        UserError: the recipe contradicts itself, as its stage would say.
    """
    if recipe.stage == "ppo":
        check_ppo(recipe)
    elif recipe.stage == "grpo":
        check_on_policy(recipe, minibatches=recipe.grpo.minibatches, group_size=recipe.grpo.group_size)
    elif recipe.stage == "dpo":
        check_dpo(recipe)
    elif recipe.stage in ("sft", "kto"):
        refuse_uneven(recipe.train)


def make_fit(recipe: Any, plan: Callable[[Any], Plan], room: int) -> Changes | None:
    """The changes after which no phase takes more than `room`; None where nothing here makes it fit.

    Args:
        plan: of a recipe.
        room: bytes.
    """
    changes: Changes = {}
    over = _over(plan(recipe), room)
    for _ in range(GIVE_UP):
        if not over:
            return _least(recipe, changes, plan, room)
        for lever in LEVERS:
            tried = changes | _step(lever, changed(recipe, changes))
            if tried != changes and (less := _over(plan(changed(recipe, tried)), room)) < over:
                changes, over = tried, less
                break
        else:
            return None
    return None


def changed(recipe: Any, changes: Mapping[str, Any]) -> Any:
    """The recipe with other values.

    >>> from lowrank_rlhf.config import Data, SFTRecipe
    >>> changed(SFTRecipe(data=Data("d.jsonl")), {"train.micro_batch_size": 2}).train.micro_batch_size
    2
    """
    for key, value in changes.items():
        group, _, name = key.partition(".")
        recipe = dataclasses.replace(recipe, **{group: dataclasses.replace(getattr(recipe, group), **{name: value})})
    return recipe


def value_of(recipe: Any, key: str) -> Any:
    group, _, name = key.partition(".")
    return getattr(getattr(recipe, group), name)


def _over(plan: Plan, room: int) -> int:
    """By how many bytes the phases are over, together: the sum, so that one of two counts."""
    return sum(max(0, plan.of(phase) - room) for phase in plan.phases)


def _step(lever: Lever, recipe: Any) -> Changes:
    """The next smaller value, or nothing where there is none."""
    group, _, name = lever.key.partition(".")
    if not hasattr(recipe, group) or (lever.key == MICRO.key and _couples_rows(recipe)):
        return {}
    value = value_of(recipe, lever.key)
    if name == "gradient_checkpointing":
        return {} if value else {lever.key: True}
    if name == "trunk":
        assert isinstance(recipe, PPORecipe)
        possible = value == "own" and recipe.value_model.init in ("auto", "zero", "policy")
        return {lever.key: "policy"} if possible else {}
    lowest = SHORTEST if group == "data" else 1
    longest = recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
    while value // 2 >= lowest:
        value //= 2
        if lever.floor and value * longest < lever.floor:
            return {}
        if _is_consistent(changed(recipe, {lever.key: value})):
            return {lever.key: value}
    return {}


def _couples_rows(recipe: Any) -> bool:
    """Whether a smaller micro-batch would be another loss."""
    return recipe.stage == "kto" or (isinstance(recipe, DPORecipe) and bool(COUPLED & set(recipe.dpo.losses)))


def _is_consistent(recipe: Any) -> bool:
    try:
        check(recipe)
    except UserError:
        return False
    return True


def _least(recipe: Any, changes: Changes, plan: Callable[[Any], Plan], room: int) -> Changes:
    """Each change taken back as far as it fits without: what a cheap one gave a dear one may have made needless."""
    order = [lever.key for lever in LEVERS]
    for key in sorted(changes, key=order.index, reverse=True):
        without = {name: value for name, value in changes.items() if name != key}
        lever, tried = next(each for each in reversed(LEVERS) if each.key == key), without
        while tried.get(key) != changes[key]:
            if not _over(plan(changed(recipe, tried)), room):
                changes = tried
                break
            tried = without | _step(lever, changed(recipe, tried))
    return changes
