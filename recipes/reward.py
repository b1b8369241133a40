"""python recipes/reward.py [--config FILE] [key.sub=value …]: the reward stage, by default on the embedded model."""

import sys

from lowrank_rlhf.cli import recipe_main
from lowrank_rlhf.config import RewardRecipe
from lowrank_rlhf.stages.reward import train

if __name__ == "__main__":
    sys.exit(recipe_main(RewardRecipe, "recipes/reward.yaml", train))
