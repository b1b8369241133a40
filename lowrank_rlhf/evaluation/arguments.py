"""The flags of `lowrank-rlhf evaluate`; nothing heavy is imported before they are read."""

import argparse

from lowrank_rlhf.errors import UserError


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    summary = "accuracy, calibration and length bias of a reward run on preference pairs, as a report"
    add_reward_arguments(kinds.add_parser("reward", help=summary, description=summary))
    summary = "the base and runs on the same prompts: reward, gold, KL, win rates, diversity, as a report"
    add_policy_arguments(kinds.add_parser("policy", help=summary, description=summary))


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `PolicyEvaluation` as flags."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory; its policy, else sft adapter answers")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="prompts, in any data format")
    add_file_arguments(parser)
    parser.add_argument("--reward-from", metavar="RUN", help="score with this reward run")
    parser.add_argument("--reward", metavar="NAME", help="score with a module:function, verifier or reward server")
    parser.add_argument("--gold", metavar="NAME", help="a score apart from the reward that trained, named likewise")
    parser.add_argument(
        "--judge",
        metavar="reward|MODULE:FUNCTION|VERIFIER|URL",
        help="who decides which answer wins: the reward (default, where there is one); a verifier; a function of "
        "(prompts, completions) that scores or of (prompts, first, second) that prefers; or an OpenAI-compatible "
        "server, http://HOST/v1, with the key in $OPENAI_API_KEY",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="of the server's models (default: the first)")
    parser.add_argument(
        "--against", metavar="base|start|RUN", default="base", help="whom to win against (default: %(default)s)"
    )
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="answers per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="(default: what the runs were trained with)")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="answers sampled together (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the report (default: an unused runs/evaluation-N)")


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a reward run's directory")
    parser.add_argument("--data", metavar="F", required=True, help="preferences, in any data format")
    add_file_arguments(parser)
    parser.add_argument(
        "--by", metavar="COLUMN", nargs="+", action="extend", default=[], help="columns to report accuracy by"
    )
    add_combine_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: RUN)")


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """How rows are read, as in a recipe's data group."""
    parser.add_argument("--format", metavar="NAME", help="of the file, where its columns do not tell")
    parser.add_argument(
        "--columns",
        metavar="OURS=THEIRS",
        nargs="+",
        action="extend",
        default=[],
        help="columns that have another name, as prompt=text",
    )
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="(default: %(default)s)")


def add_combine_arguments(parser: argparse.ArgumentParser) -> None:
    """How the scores of an ensemble's members become one."""
    parser.add_argument(
        "--combine",
        choices=("mean", "min", "mean_minus_std"),
        default="mean",
        help="how an ensemble's scores become one (default: %(default)s)",
    )
    parser.add_argument(
        "--std-coef",
        metavar="C",
        type=float,
        default=1.0,
        help="deviations that mean_minus_std takes off (default: %(default)s)",
    )


def evaluate(args: argparse.Namespace) -> int:
    values = {key: value for key, value in vars(args).items() if key not in ("verb", "kind")}
    values["columns"] = column_map(args.columns)
    if args.kind == "policy":
        from lowrank_rlhf.evaluation.policy import PolicyEvaluation, evaluate_policies

        evaluate_policies(PolicyEvaluation(**values | {"runs": tuple(args.runs)}))
        return 0
    from lowrank_rlhf.evaluation.reward import RewardEvaluation, evaluate_reward

    evaluate_reward(RewardEvaluation(**values | {"by": tuple(args.by)}))
    return 0


def column_map(pairs: list[str]) -> dict[str, str]:
    """
    Raises:
        UserError: a pair is not OURS=THEIRS.

    >>> column_map(["prompt=question", "chosen=a=b"])
    {'prompt': 'question', 'chosen': 'a=b'}
    """
    parts = [pair.partition("=") for pair in pairs]
    for pair, (ours, _, theirs) in zip(pairs, parts, strict=True):
        if not ours or not theirs:
            raise UserError(f"--columns: {pair!r}: write it OURS=THEIRS, as prompt=question")
    return {ours: theirs for ours, _, theirs in parts}
