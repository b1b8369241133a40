"""python recipes/dpo.py [--config FILE] [key.sub=value …]: the dpo stage, by default on the embedded model."""

import sys

from lowrank_rlhf.cli import recipe_main
from lowrank_rlhf.config_preference import DPORecipe
from lowrank_rlhf.stages.dpo import train

if __name__ == "__main__":
    sys.exit(recipe_main(DPORecipe, "recipes/dpo.yaml", train))
