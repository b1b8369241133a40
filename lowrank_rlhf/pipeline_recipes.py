"""A pipeline's recipe and those of its stages, read and joined; nothing heavy is imported."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_rlhf.config_pipeline import RECIPES, PipelineRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe

SFT, REWARD, COMPARISON = "sft", "reward", "comparison"
TINY_PROMPTS = 6


@dataclass(frozen=True)
class Pipeline:
    """The checked recipes of all stages, in order, and the comparison."""

    folder: Path
    recipes: dict[str, Any]
    settings: PipelineRecipe

    @property
    def policies(self) -> list[str]:
        """The stages whose policies are compared: all but the reward model."""
        return [name for name in self.recipes if name != REWARD]


def load_pipeline(
    config: str, overrides: Sequence[str], *, run_dir: str | None, everything: bool, tiny: bool
) -> Pipeline:
    """Read the pipeline's recipe and those of its stages; `stage.key=value` changes one of theirs.

    Raises:
        UserError: a recipe does not fit, or a stage or an override is not known.
    """
    own = [word for word in overrides if word.partition("=")[0].partition(".")[0] in ("run_dir", COMPARISON)]
    smaller = [f"comparison.max_prompts={TINY_PROMPTS}"] if tiny else []
    settings = load_recipe(PipelineRecipe, config, [*smaller, *own])
    files = settings.stages | (settings.more if everything else {})
    if unknown := [name for name in files if name not in RECIPES]:
        raise UserError(f"{config}: stages.{unknown[0]}: no such stage; there are {', '.join(RECIPES)}")
    changes: dict[str, list[str]] = {name: [] for name in files}
    for word in overrides:
        stage, dot, rest = word.partition(".")
        if word in own:
            continue
        if not dot or stage not in changes:
            raise UserError(f"{word!r}: begin with a stage of the pipeline ({', '.join(changes)}) or comparison")
        changes[stage].append(rest)
    folder = Path(run_dir or settings.run_dir)
    recipes: dict[str, Any] = {}
    for name, file in files.items():
        recipes[name] = load_recipe(RECIPES[name], file, [*links(name, files, folder), *changes[name]], tiny=tiny)
    return Pipeline(folder, recipes, settings)


def links(name: str, stages: dict[str, str], folder: Path) -> list[str]:
    """What joins a stage to those before it: where it starts and what scores it."""
    keys = {field.name for field in dataclasses.fields(RECIPES[name])}
    words = [f"run_dir={json.dumps(str(folder / name))}"]
    if "policy_from" in keys and SFT in stages:
        words.append(f"policy_from={json.dumps(str(folder / SFT))}")
    if "reward_from" in keys and REWARD in stages:
        words.append(f"reward_from=[{{run: {json.dumps(str(folder / REWARD))}}}]")
    return words
