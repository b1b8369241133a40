"""python recipes/orpo.py [--config FILE] [key.sub=value …]: the orpo stage, by default on the embedded model."""

import sys

from lowrank_rlhf.cli import recipe_main
from lowrank_rlhf.config_preference import ORPORecipe
from lowrank_rlhf.stages.orpo import train

if __name__ == "__main__":
    sys.exit(recipe_main(ORPORecipe, "recipes/orpo.yaml", train))
