"""The flags of `evaluate`. Nothing heavy is imported here, so that --help answers at once."""

import argparse


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
