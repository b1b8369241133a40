"""python recipes/ppo.py [--config FILE] [key.sub=value …]: the ppo stage, by default on the embedded model."""

import sys

from lowrank_rlhf.cli import recipe_main
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.stages.ppo import train

if __name__ == "__main__":
    sys.exit(recipe_main(PPORecipe, "recipes/ppo.yaml", train))
