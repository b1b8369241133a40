"""Reward sources. Each takes finished completions and gives one score per completion."""

import importlib
import math
import sys
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, Protocol

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import load_run_role
from lowrank_rlhf.scoring import score_sequences


class Reward(Protocol):
    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> list[float]: ...


class AdapterReward:
    """A frozen reward role of the shared base."""

    def __init__(self, backbone: Backbone, role: str, micro_batch_size: int):
        self.backbone, self.role, self.micro_batch_size = backbone, role, micro_batch_size

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> list[float]:
        return score_sequences(self.backbone, self.role, sequences, self.micro_batch_size)


class FunctionReward:
    """`fn(prompts, completions, **columns) -> list[float]`: plain texts, and the data set's other columns.

    Args:
        name: `module:function`, importable from the working directory or the installed packages.

    Raises:
        UserError: it cannot be imported, or returns anything but one finite number per completion.
        Exception: whatever the function itself raises, with a note that names it.
    """

    def __init__(self, name: str, renderer: Renderer):
        self.name, self.renderer = name, renderer
        self.function = _import(name)

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> list[float]:
        prompts = [e.prompt[-1]["content"] for e in examples]
        completions = [self.renderer.decode(s.completion_ids) for s in sequences]
        names = dict.fromkeys(name for e in examples for name in e.columns)
        columns = {name: [e.columns.get(name) for e in examples] for name in names}
        try:
            scores = self.function(prompts, completions, **columns)
        except Exception as error:
            error.add_note(f"raised in the reward function {self.name}")
            raise
        if not isinstance(scores, list) or len(scores) != len(completions):
            raise UserError(f"reward: {self.name} must return a list of {len(completions)} numbers, got {scores!r:.80}")
        for i, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise UserError(f"reward: {self.name} returned {score!r} for completion {i + 1}: not a finite number")
        return [float(score) for score in scores]


class WeightedSum:
    """Several sources, each times its weight."""

    def __init__(self, parts: SequenceOf[tuple[Reward, float]]):
        self.parts = parts

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> list[float]:
        columns = [[weight * score for score in source(examples, sequences)] for source, weight in self.parts]
        return [sum(scores) for scores in zip(*columns, strict=True)]


def load_rewards(recipe: PPORecipe, backbone: Backbone, renderer: Renderer) -> Reward:
    """The recipe's rewards; the adapters of `reward_from` become the roles `reward`, `reward-2`, …

    Raises:
        UserError: there is none, or one cannot be used.
    """
    parts: list[tuple[Reward, float]] = []
    for i, source in enumerate(recipe.reward_from, start=1):
        role = "reward" if i == 1 else f"reward-{i}"
        load_run_role(backbone, source.run, "reward", role, key=f"reward_from[{i - 1}].run")
        if role not in backbone.heads:
            raise UserError(f"reward_from[{i - 1}].run: {source.run} has no head.safetensors; is it a reward run?")
        parts.append((AdapterReward(backbone, role, recipe.train.micro_batch_size), source.weight))
    if recipe.reward:
        parts.append((FunctionReward(recipe.reward, renderer), 1.0))
    if not parts:
        raise UserError("reward_from or reward: PPO needs a reward run or a module:function; the recipe has neither")
    return WeightedSum(parts)


def _import(name: str) -> Callable[..., Any]:
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name or not module_name or module_name.startswith("."):
        raise UserError(f"reward: {name!r}: write it module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise UserError(f"reward: {name!r} is not a function")
    return function
