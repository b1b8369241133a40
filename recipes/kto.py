"""python recipes/kto.py [--config FILE] [key.sub=value …]: the kto stage, by default on the embedded model."""

import sys

from lowrank_rlhf.cli import recipe_main
from lowrank_rlhf.config_preference import KTORecipe
from lowrank_rlhf.stages.kto import train

if __name__ == "__main__":
    sys.exit(recipe_main(KTORecipe, "recipes/kto.yaml", train))
