"""python recipes/grpo.py [--config FILE] [key.sub=value …]: the grpo stage, by default on the embedded model."""

import sys

from lowrank_rlhf.cli import recipe_main
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.stages.grpo import train

if __name__ == "__main__":
    sys.exit(recipe_main(GRPORecipe, "recipes/grpo.yaml", train))
