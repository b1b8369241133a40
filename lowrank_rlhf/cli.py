"""`lowrank-rlhf VERB …`. Nothing heavy is imported until a verb runs, so that --help answers at once."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lowrank_rlhf import __version__
from lowrank_rlhf.arena.options import add_app_arguments, options
from lowrank_rlhf.arena.votes.verb import add_votes_arguments, votes
from lowrank_rlhf.bench.verb import add_bench_arguments, bench
from lowrank_rlhf.config_pipeline import RECIPES
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.evaluation.arguments import add_combine_arguments, add_evaluate_arguments
from lowrank_rlhf.loader import as_yaml, load_recipe
from lowrank_rlhf.plan.verb import ABOUT, add_plan_arguments, plan
from lowrank_rlhf.quiet import quiet
from lowrank_rlhf.remote.verb import add_remote_arguments, remote

T = TypeVar("T")

SUMMARIES = {
    "sft": "supervised fine-tuning of the sft role",
    "reward": "train a reward model on preference pairs",
    "ppo": "optimise the policy against a reward",
    "grpo": "the same without values: answers to one prompt are judged by each other",
    "dpo": "train the policy on preference pairs, close to a reference",
    "orpo": "train the policy on preference pairs without a reference",
    "kto": "train the policy on thumbs up and down, close to a reference",
}
STAGES = {name: (summary, RECIPES[name]) for name, summary in SUMMARIES.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lowrank-rlhf", description="RLHF on one GPU: one 4-bit base model, one LoRA adapter per role."
    )
    parser.add_argument("--version", action="version", version=f"lowrank-rlhf {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (summary, _) in STAGES.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        add_recipe_arguments(verb, default=None)
    summary = "every stage from data to aligned policies side by side; keeps what is unchanged"
    add_pipeline_arguments(verbs.add_parser("pipeline", help=summary, description=summary))
    summary = "what this machine can do, and the fix where training would be wrong"
    verbs.add_parser("doctor", help=summary, description=summary)
    summary = "sample k answers to every prompt of a file, for labelling; goes on after an interruption"
    add_sample_arguments(verbs.add_parser("sample", help=summary, description=summary))
    summary = "judge a reward model, or compare policies"
    add_evaluate_arguments(verbs.add_parser("evaluate", help=summary, description=summary))
    summary = "reward scores for every row of a data file; goes on after an interruption"
    add_score_arguments(verbs.add_parser("score", help=summary, description=summary))
    summary = "a run's role for plain transformers and PEFT: an adapter, or a merged 16-bit model"
    add_export_arguments(verbs.add_parser("export", help=summary, description=summary))
    summary = "the app: chat with checkpoints side by side, vote blind, see runs; on this machine only by default"
    add_app_arguments(verbs.add_parser("compare", help=summary, description=summary))
    summary = "votes out as training data, in from other files, and what they say: a leaderboard with intervals"
    add_votes_arguments(verbs.add_parser("votes", help=summary, description=summary))
    summary = "the same on another machine over ssh: install, run, follow, fetch, and the app"
    add_remote_arguments(verbs.add_parser("remote", help=summary, description=summary))
    summary = "seconds, memory and tokens per second of every stage here, beside PPO with four separate models"
    add_bench_arguments(verbs.add_parser("bench", help=summary, description=summary))
    summary = "does it fit? the peak of memory of a recipe by phase and component, and what would make it fit"
    add_plan_arguments(verbs.add_parser("plan", help=summary, description=ABOUT))
    args = parse(parser, argv)
    actions = {
        "pipeline": lambda: _pipeline(args),
        "doctor": _doctor,
        "sample": lambda: _sample(args),
        "evaluate": lambda: _evaluate(args),
        "score": lambda: _score(args),
        "export": lambda: _export(args),
        "votes": lambda: votes(args),
        "compare": lambda: _compare(args),
        "remote": lambda: remote(args),
        "bench": lambda: bench(args),
        "plan": lambda: plan(args),
    }
    return run_safely(actions.get(args.verb, lambda: _stage(args)))


def recipe_main(cls: type[T], default: str, train: Callable[..., None], argv: Sequence[str] | None = None) -> int:
    """What `python recipes/STAGE.py` does: read the recipe, open the run, train."""
    parser = argparse.ArgumentParser(description=f"Without arguments: the recipe {default} on the embedded model.")
    add_recipe_arguments(parser, default=default)
    args = parse(parser, argv)
    return run_safely(lambda: _train(cls, args, train))


def add_recipe_arguments(parser: argparse.ArgumentParser, default: str | None) -> None:
    """The flags every stage has."""
    parser.add_argument("--config", metavar="FILE", default=default, required=default is None, help="recipe (YAML)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--tiny", action="store_true", help="smoke test: random 2-layer model, two steps")
    parser.add_argument("--resume", action="store_true", help="go on with the run in run_dir where it stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in run_dir")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", default="recipes/pipeline.yaml", help="stages and their recipes (%(default)s)"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the stages' runs (default: the recipe's run_dir)")
    parser.add_argument("--all", action="store_true", help="also the recipe's `more` stages")
    parser.add_argument("--tiny", action="store_true", help="smoke test: random 2-layer model, two steps a stage")
    parser.add_argument(
        "overrides", nargs="*", metavar="stage.key=value", help="a key of a stage's recipe, or of `comparison`"
    )


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    def numbers(text: str) -> tuple[float, ...]:
        return tuple(float(part) for part in text.split(","))

    parser.add_argument("source", metavar="RUN|BASE", help="a run directory (its policy, else sft adapter) or a model")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="prompts, in any data format")
    parser.add_argument("--k", type=int, default=4, help="answers to each prompt, 2 to 9 (default: %(default)s)")
    parser.add_argument(
        "--temperatures",
        metavar="T[,T…]",
        type=numbers,
        default=(1.0,),
        help="cycled over the k answers (default: 1.0)",
    )
    parser.add_argument("--out", metavar="FILE", help="default: PROMPTS.samples.jsonl in the working directory")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="answers at a time (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="(default: %(default)s)")


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run directory of a reward model")
    parser.add_argument(
        "--in", dest="source", metavar="FILE", required=True, help="prompts with answers, in any data format"
    )
    parser.add_argument("--out", metavar="FILE", help="default: FILE.scores.jsonl in the working directory")
    add_combine_arguments(parser)
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="texts at a time (default: 16)")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--to", metavar="DIR", required=True, help="the folder to make")
    parser.add_argument("--role", choices=("reward", "policy", "sft"), help="default: the first of these it has")
    # Not `--merge [WHAT]`, which would take a RUN that follows it
    parser.add_argument("--merge", action="store_true", help="a whole model in bf16 instead of the adapter")
    parser.add_argument(
        "--merge-into",
        choices=("trained", "original"),
        help="with --merge: the weights that the role was trained on (default), or the base's own",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, overrides and a JOB in any order; argparse alone takes none behind a flag that follows another word."""
    args, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-") and getattr(args, "job", "") is None:
        args.job, *rest = rest
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def run_safely(action: Callable[[], int]) -> int:
    """Run a verb; bad input or a full disk becomes its message on stderr and status 2, Ctrl-C is status 130."""
    try:
        return action()
    except KeyboardInterrupt:
        print("interrupted; nothing that was saved is lost", file=sys.stderr)
        return 130
    except UserError as error:
        process = os.environ.get("RANK", "0")  # of several, started by accelerate launch
        print(f"error{'' if process == '0' else f' in process {process}'}: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("error: the disk is full; what was saved is intact, make room and go on with --resume", file=sys.stderr)
    return 2


def _stage(args: argparse.Namespace) -> int:
    def train(recipe: Any, run: Any) -> None:
        importlib.import_module(f"lowrank_rlhf.stages.{args.verb}").train(recipe, run)

    return _train(STAGES[args.verb][1], args, train)


def _pipeline(args: argparse.Namespace) -> int:
    quiet()
    from lowrank_rlhf.pipeline import run_pipeline
    from lowrank_rlhf.pipeline_recipes import load_pipeline
    from lowrank_rlhf.runs import Interrupted

    pipeline = load_pipeline(args.config, args.overrides, run_dir=args.run_dir, everything=args.all, tiny=args.tiny)
    try:
        run_pipeline(pipeline)
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there")
        return stop.status
    return 0


def _doctor() -> int:
    from lowrank_rlhf import doctor

    return doctor.main()


def _sample(args: argparse.Namespace) -> int:
    quiet()
    from lowrank_rlhf.sampling import Sampling, sample

    values = {key: value for key, value in vars(args).items() if key != "verb"}
    values["out"] = args.out or f"{Path(args.prompts).name.partition('.')[0]}.samples.jsonl"
    sample(Sampling(**values))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    quiet()
    from lowrank_rlhf.evaluation.arguments import evaluate

    return evaluate(args)


def _score(args: argparse.Namespace) -> int:
    quiet()
    from lowrank_rlhf.score_file import ScoreFile, score_file

    out = args.out or f"{Path(args.source).name.partition('.')[0]}.scores.jsonl"
    score_file(ScoreFile(args.run, args.source, out, args.combine, args.batch_size, args.std_coef))
    return 0


def _export(args: argparse.Namespace) -> int:
    if args.merge_into and not args.merge:
        raise UserError("--merge-into: says what --merge merges into; give --merge too, or neither for the adapter")
    quiet()
    from lowrank_rlhf.export import Export, export

    into: Any = args.merge_into or "trained"
    export(Export(args.run, args.to, args.role, into if args.merge else None, args.overwrite))
    return 0


def _compare(args: argparse.Namespace) -> int:
    chosen = options(args)  # before seconds of imports
    quiet()
    from lowrank_rlhf.arena.server import serve

    return serve(chosen)


def _train(cls: type[Any], args: argparse.Namespace, train: Callable[..., None]) -> int:
    recipe = load_recipe(cls, args.config, args.overrides, tiny=args.tiny)
    if args.dry_run:
        print(as_yaml(recipe), end="")
        return 0
    quiet()
    from lowrank_rlhf import processes
    from lowrank_rlhf.plan.beside import compare_memory
    from lowrank_rlhf.runs import RECIPE, Interrupted, Run

    run = Run(recipe, overwrite=args.overwrite, resume=args.resume)
    with processes.only_main_prints():
        if run.finished:
            print(f"{run.dir} is finished; nothing to resume")
            return 0
        try:
            with run.stop_on_signal():
                train(recipe, run)
            compare_memory(recipe, run)
        except Interrupted as stop:
            again = f"{processes.command()} {recipe.stage} --config {run.dir / RECIPE} --resume"
            print(f"{stop}; go on with:\n  {again}")
            return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
