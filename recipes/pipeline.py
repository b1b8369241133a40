"""python recipes/pipeline.py [stage.key=value …]: from data to aligned policies side by side, in one command.

SFT and a reward model on one base, then every method that recipes/pipeline.yaml names, each from the same SFT adapter,
then all of them and the bare base on held-out prompts. Each stage is a run of its own in the pipeline's folder. The
same command goes on after an interruption; stages whose data, recipe and starting adapters are the same are kept.
"""

import sys

from lowrank_rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", "--config", "recipes/pipeline.yaml", *sys.argv[1:]]))
