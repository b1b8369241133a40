"""python recipes/pipeline.py [stage.key=value …]: SFT, reward model and PPO on one base, then a table of all three.

Each stage is its own run in the pipeline's folder; the values are in recipes/sft.yaml, recipes/reward.yaml and
recipes/ppo.yaml, and `sft.train.max_steps=10` changes one.
"""

import argparse
import sys
import time
from pathlib import Path

from lowrank_rlhf.cli import parse, quiet, run_safely
from lowrank_rlhf.config import PPORecipe, RewardRecipe, SFTRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run-dir", metavar="DIR", help="folder of the stage runs (default: an unused runs/pipeline-N)"
    )
    parser.add_argument("--tiny", action="store_true", help="smoke test: random 2-layer model, two steps a stage")
    parser.add_argument("overrides", nargs="*", metavar="stage.key=value", help="stage is sft, reward or ppo")
    args = parse(parser)
    return run_safely(lambda: pipeline(args))


def pipeline(args: argparse.Namespace) -> int:
    quiet()
    from lowrank_rlhf.runs import Run, unused_run_dir
    from lowrank_rlhf.stages import ppo as ppo_stage
    from lowrank_rlhf.stages import reward as reward_stage
    from lowrank_rlhf.stages import sft as sft_stage

    folder = Path(args.run_dir) if args.run_dir else unused_run_dir("pipeline")
    changes = split_overrides(args.overrides)
    sft = load_recipe(SFTRecipe, "recipes/sft.yaml", [f"run_dir={folder}/sft", *changes["sft"]], tiny=args.tiny)
    reward = load_recipe(
        RewardRecipe, "recipes/reward.yaml", [f"run_dir={folder}/reward", *changes["reward"]], tiny=args.tiny
    )
    links = [
        f"run_dir={folder}/ppo",
        f"policy_from={folder}/sft",
        f"reward_from=[{{run: {folder}/reward}}]",
        "reward=null",
    ]
    ppo = load_recipe(PPORecipe, "recipes/ppo.yaml", links + changes["ppo"], tiny=args.tiny)

    started = time.perf_counter()
    sft_stage.train(sft, Run(sft))
    reward_stage.train(reward, Run(reward))
    ppo_stage.train(ppo, Run(ppo))
    compare(ppo)
    print(f"\npipeline: {(time.perf_counter() - started) / 60:.1f} minutes, runs in {folder}")
    return 0


def compare(recipe: PPORecipe, samples: int = 2) -> None:
    """Base, SFT and PPO policy on the held-out prompts, one base in memory; a table and three answers of each."""
    from rich.console import Console
    from rich.table import Table

    from lowrank_rlhf.backbone import Backbone
    from lowrank_rlhf.data import Renderer, load_prompts
    from lowrank_rlhf.evaluation.policy import evaluate_policy
    from lowrank_rlhf.rewards import load_rewards
    from lowrank_rlhf.runs import load_run_role

    assert recipe.policy_from is not None
    assert recipe.run_dir is not None
    _, prompts = load_prompts(recipe.data)
    backbone = Backbone(recipe.base)
    renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
    reward = load_rewards(recipe, backbone, renderer)
    load_run_role(backbone, recipe.policy_from, "sft", "sft", key="policy_from")
    load_run_role(backbone, recipe.run_dir, "policy", "policy", key="run_dir")
    reports = [
        evaluate_policy(
            name, role, backbone, renderer, prompts, reward, samples=samples, seed=recipe.seed, micro_batch_size=8
        )
        for name, role in (("base", None), ("sft", "sft"), ("ppo", "policy"))
    ]
    table = Table(title=f"{len(prompts)} held-out prompts × {samples} samples at temperature 1")
    for column in ("policy", "reward", "95 % interval", "KL to base, nats", "tokens", "ended"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for r in reports:
        interval = f"[{r.score_low:+.2f}, {r.score_high:+.2f}]"
        table.add_row(
            r.name,
            f"{r.score:+.3f}",
            interval.replace("[", r"\["),
            f"{r.kl_to_base:.1f}",
            f"{r.length:.0f}",
            f"{r.ended:.0%}",
        )
    console = Console(width=110)
    console.print(table)
    for i in range(min(3, len(prompts))):
        console.print(f"\n[bold]{prompts[i].prompt[-1]['content']}[/bold]", markup=True, highlight=False)
        for r in reports:
            console.print(f"  {r.name:>4}  {r.scores[i * samples]:+.2f}  {r.answers[i * samples]!r}", markup=False)


def split_overrides(overrides: list[str]) -> dict[str, list[str]]:
    changes: dict[str, list[str]] = {"sft": [], "reward": [], "ppo": []}
    for override in overrides:
        stage, dot, rest = override.partition(".")
        if not dot or stage not in changes:
            raise UserError(f"{override!r}: begin with the stage, for example sft.train.max_steps=10")
        changes[stage].append(rest)
    return changes


if __name__ == "__main__":
    sys.exit(main())
