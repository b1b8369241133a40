"""Compare checkpoints, vote blind, and train on the votes: `python app.py --runs runs/` (or `lowrank-rlhf compare`)."""

import sys

from lowrank_rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
