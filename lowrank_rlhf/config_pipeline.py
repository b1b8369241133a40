"""A pipeline's recipe: which stages, by which recipes, and how it ends."""

from dataclasses import dataclass, field
from typing import Literal

from lowrank_rlhf.config import PPORecipe, RewardRecipe, Run, SFTRecipe, ranged
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.config_preference import DPORecipe, KTORecipe, ORPORecipe


@dataclass(frozen=True)
class Comparison:
    """How a pipeline ends: the base and every policy answer `samples` times to each of the `prompts`.

    `format`, `columns` and `on_bad_row`: of the prompts, as in a recipe's data group. `gold`: a score apart from the
    reward that trained. `max_prompts`: only the first so many. `batch_size`: answers sampled together.
    """

    prompts: str
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: Literal["error", "skip"] = "error"
    gold: str | None = None
    samples: int = ranged(1, 1)
    max_prompts: int | None = ranged(None, 1)
    batch_size: int = ranged(32, 1)


@dataclass(frozen=True, kw_only=True)
class PipelineRecipe:
    """Stages by name, in order, and their recipes. Each starts from `sft` and is scored by `reward`, where those are.

    `more`: the stages that `--all` adds.
    """

    run_dir: str = "runs/pipeline"
    stages: dict[str, str]
    more: dict[str, str] = field(default_factory=dict)
    comparison: Comparison


CLASSES = (SFTRecipe, RewardRecipe, PPORecipe, GRPORecipe, DPORecipe, ORPORecipe, KTORecipe)
RECIPES: dict[str, type[Run]] = {cls.stage: cls for cls in CLASSES}
