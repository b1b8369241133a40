"""What a recipe asks of memory: the roles on its base, and the passes that its stage makes of full-length rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.rewards import member_names, saved_members
from lowrank_rlhf.stages.policy_start import POLICY, REFERENCE

Reads = Literal["logps", "values", "both", "score"]
SFT_SAMPLES = 5  # rows that are answered at the end of SFT


@dataclass(frozen=True)
class Pass:
    """Rows through the base.

    Attributes:
        phase: as users know it.
        kind: with gradient; without; or token by token.
        role: whose adapter is on; None is the bare base.
        reads: of the states: log-probs of the completions, a head's values before their tokens, both, or a score.
        prompt, new: tokens of each row.
        adds: there are gradients of an earlier micro-batch already.
        entropy: the loss reads that of the log-probs too.
        unpacked: the 4-bit weights are in memory in 16 bit too, where that fits.
    """

    phase: str
    kind: Literal["learn", "read", "generate"]
    role: str | None
    rows: int
    prompt: int
    new: int
    reads: Reads = "logps"
    adds: bool = False
    entropy: bool = False
    unpacked: bool = False
    packed: bool = False


@dataclass
class Demand:
    """
    Attributes:
        roles: name → whether it has a head.
        learning: the roles that have an optimizer.
    """

    learning: list[str]
    roles: dict[str, bool] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)


def demand(recipe: Any, *, on_cpu: bool) -> Demand:
    """
    Args:
        on_cpu: there the weights of PPO and GRPO stay unpacked.
    """
    if isinstance(recipe, PPORecipe | GRPORecipe):
        return _on_policy(recipe, on_cpu)
    makers: dict[str, Callable[[Any], Demand]] = {"sft": _sft, "reward": _reward}
    return makers.get(recipe.stage, _preferences)(recipe)


def _tokens(recipe: Any) -> dict[str, Any]:
    return {"prompt": recipe.data.max_prompt_tokens, "new": recipe.data.max_completion_tokens}


def _sft(recipe: Any) -> Demand:
    train, tokens = recipe.train, _tokens(recipe)
    adds = train.batch_size > train.micro_batch_size
    learn = Pass("update", "learn", "sft", train.micro_batch_size, **tokens, adds=adds, packed=recipe.train.packing)
    samples = Pass("samples", "generate", "sft", SFT_SAMPLES, **tokens, unpacked=True)
    return Demand(["sft"], {"sft": False}, [learn, samples])


def _reward(recipe: Any) -> Demand:
    train, roles = recipe.train, member_names("reward", recipe.reward_model.members)
    adds = train.batch_size > train.micro_batch_size
    learn = Pass("update", "learn", roles[0], 2 * train.micro_batch_size, **_tokens(recipe), reads="score", adds=adds)
    return Demand(roles[:1], dict.fromkeys(roles, True), [learn])


def _preferences(recipe: Any) -> Demand:
    """DPO, ORPO and KTO."""
    train, tokens, found = recipe.train, _tokens(recipe), Demand([POLICY], {POLICY: False})
    rows = train.micro_batch_size * (1 if recipe.stage == "kto" else 2)
    adds = train.batch_size > train.micro_batch_size
    if recipe.stage != "orpo":
        found.passes.append(Pass("score", "read", _reference(found, recipe), rows, **tokens))
    found.passes.append(Pass("update", "learn", POLICY, rows, **tokens, adds=adds))
    return found


def _on_policy(recipe: Any, on_cpu: bool) -> Demand:
    train, tokens, found = recipe.train, _tokens(recipe), Demand([POLICY], {POLICY: False})
    is_ppo = isinstance(recipe, PPORecipe)
    settings = recipe.ppo if is_ppo else recipe.grpo
    completions = train.batch_size * (1 if is_ppo else settings.group_size)
    _reference(found, recipe)
    rewards = _rewards(recipe)
    found.roles |= dict.fromkeys(rewards, True)
    rows = min(train.micro_batch_size, completions)
    if train.micro_batch_tokens:
        rows = max(1, min(rows, train.micro_batch_tokens // sum(tokens.values())))
    most = min(recipe.rollout.batch_size, completions)
    found.passes.append(Pass("generate", "generate", POLICY, most, **tokens, unpacked=True))
    if rewards:  # which read whole micro-batches, whatever `micro_batch_tokens` says
        scored = min(train.micro_batch_size, completions)
        found.passes.append(Pass("reward", "read", rewards[0], scored, **tokens, reads="score", unpacked=on_cpu))
    # Nor do the reference's log-probs and the values take more than the policy's log-probs, nor the value's update more
    # than the policy's: the same trunk, and a head in the place of lm_head
    found.passes.append(Pass("score", "read", POLICY, rows, **tokens, unpacked=on_cpu))
    adds = completions // settings.minibatches > rows or bool(is_ppo and recipe.ptx.data)
    shared = is_ppo and recipe.value_model.trunk == "policy"
    reads: Reads = "both" if shared else "logps"
    learns = {"reads": reads, "adds": adds, "entropy": settings.entropy_coef > 0, "unpacked": on_cpu}
    found.passes.append(Pass("update", "learn", POLICY, rows, **tokens, **learns))
    if is_ppo:
        found.roles[POLICY if shared else "value"] = True
        found.learning += [] if shared else ["value"]
    return found


def _reference(found: Demand, recipe: Any) -> str | None:
    """The role of the reference, which is added where it is an adapter; the start is kept whether it is used or not."""
    moves = getattr(recipe, "kl", None) is not None and recipe.kl.refresh_steps
    if recipe.policy_from is None and not moves:
        return None
    found.roles[REFERENCE] = False
    return None if recipe.reference == "base" else REFERENCE


def _rewards(recipe: Any) -> list[str]:
    """Names of the reward adapters; of a run that is not there yet, one."""
    counts = [len(saved_members(source.run)) if Path(source.run).is_dir() else 1 for source in recipe.reward_from]
    roles = ["reward" if i == 0 else f"reward-{i + 1}" for i in range(len(counts))]
    return [name for role, count in zip(roles, counts, strict=True) for name in member_names(role, count)]
