"""The flags of `lowrank-rlhf evaluate`; nothing heavy is imported before they are read."""

import argparse


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    summary = "the base and runs on the same prompts: reward, gold, KL, win rates, diversity, as a report"
    add_policy_arguments(kinds.add_parser("policy", help=summary, description=summary))


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `PolicyEvaluation` as flags."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory; its policy, else sft adapter answers")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="prompts, in any data format")
    parser.add_argument("--reward-from", metavar="RUN", help="score with this reward run")
    parser.add_argument("--reward", metavar="MODULE:FUNCTION", help="score with a Python function")
    parser.add_argument("--gold", metavar="MODULE:FUNCTION", help="a score apart from the reward that trained")
    parser.add_argument(
        "--judge",
        metavar="reward|MODULE:FUNCTION|URL",
        help="who decides which answer wins: the reward (default, where there is one); a function of (prompts, "
        "completions) that scores or of (prompts, first, second) that prefers; or an OpenAI-compatible server, "
        "http://HOST/v1, with the key in $OPENAI_API_KEY",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="of the server's models (default: the first)")
    parser.add_argument(
        "--against", metavar="base|start|RUN", default="base", help="whom to win against (default: %(default)s)"
    )
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="answers per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="(default: what the runs were trained with)")
    parser.add_argument("--out", metavar="DIR", help="folder of the report (default: an unused runs/evaluation-N)")


def evaluate(args: argparse.Namespace) -> int:
    from lowrank_rlhf.evaluation.policy import PolicyEvaluation, evaluate_policies

    values = {key: value for key, value in vars(args).items() if key not in ("verb", "kind")}
    evaluate_policies(PolicyEvaluation(**values | {"runs": tuple(args.runs)}))
    return 0
