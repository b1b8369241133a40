"""python recipes/reasoning_gym_task.py TASK --out FILE [key=value …]: questions of a reasoning-gym task, with answers.

    python recipes/reasoning_gym_task.py chain_sum --out chain_sum.jsonl --rows 1000 min_terms=2 max_terms=2
    python recipes/grpo.py data.train=chain_sum.jsonl data.eval=null reward=reasoning_gym

key=value are the task's own settings. The package reasoning-gym makes the questions on this machine.
"""

import argparse
import json
import sys
from pathlib import Path

from lowrank_rlhf.cli import parse, run_safely
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import parse_yaml
from lowrank_rlhf.rewards.optional import task_rows
from lowrank_rlhf.runs import write_atomic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", metavar="TASK", help="as reasoning-gym names it: chain_sum, simple_equations, …")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSONL to write")
    parser.add_argument("--rows", metavar="N", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--ask", metavar="TEXT", default="", help="stands behind every question, to ask for a form")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the task")
    args = parse(parser)
    return run_safely(lambda: write(args))


def write(args: argparse.Namespace) -> int:
    if args.rows < 1:
        raise UserError(f"--rows: must be at least 1, got {args.rows}")
    settings = {}
    for override in args.overrides:
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise UserError(f"{override!r}: a setting is written key=value, for example min_terms=2")
        settings[key] = parse_yaml(value, override)
    lines = []
    for row in task_rows(args.task, args.rows, args.seed, settings):
        row["prompt"] += f" {args.ask}" if args.ask else ""
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(Path(args.out), "".join(lines))
    print(f"{len(lines)} questions of {args.task} in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
