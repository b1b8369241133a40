"""python recipes/sft.py [--config FILE] [key.sub=value …]: the sft stage, by default on the embedded model."""

import sys

from lowrank_rlhf.cli import recipe_main
from lowrank_rlhf.config import SFTRecipe
from lowrank_rlhf.stages.sft import train

if __name__ == "__main__":
    sys.exit(recipe_main(SFTRecipe, "recipes/sft.yaml", train))
