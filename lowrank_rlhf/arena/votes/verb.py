"""`lowrank-rlhf votes export|import|stats|add-annotator`: what is done with votes outside the app."""

import argparse
import sys

from lowrank_rlhf.arena.votes.counting import counted, told
from lowrank_rlhf.errors import UserError

STORE = "votes.db"


def add_votes_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summary = "training data for every stage and for TRL: a folder of JSONL files, split by prompt, with a data card"
    _add_export_arguments(actions.add_parser("export", help=summary, description=summary))
    summary = "votes of another store, or preferences, rankings and thumbs of a data file; again is nothing"
    verb = actions.add_parser("import", help=summary, description=summary)
    verb.add_argument("file", metavar="FILE", help="a store (.db) or a data file in any format")
    _add_store(verb)
    verb.add_argument("--annotator", metavar="NAME", default="imported", help="whose votes a data file's rows become")
    summary = "leaderboard, agreement between annotators, biases, and whether the reward model agrees with people"
    verb = actions.add_parser("stats", help=summary, description=summary)
    _add_store(verb)
    verb.add_argument("--json", action="store_true", help="as JSON")
    summary = "add somebody to a file of logins, or give a new password; asks for it"
    verb = actions.add_parser("add-annotator", help=summary, description=summary)
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("--logins", metavar="FILE", required=True, help="made where there is none")
    verb.add_argument("--owner", action="store_true", help="may see everything, not only the voting page")
    verb.add_argument("--password-stdin", action="store_true", help="read the password from standard input")


def _add_export_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--to", metavar="DIR", required=True, help="the folder to make")
    _add_store(verb)
    verb.add_argument(
        "--eval-fraction", metavar="SHARE", type=float, default=0.1, help="of prompts on the test side (%(default)s)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    verb.add_argument("--blind-only", action="store_true", help="only votes given before the names were shown")
    verb.add_argument("--names", action="store_true", help="annotators under their names, not a1, a2 …")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")


def _add_store(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--store", metavar="FILE", default=STORE, help="the app's file of votes (%(default)s)")


def votes(args: argparse.Namespace) -> int:
    """Run the action that was asked for.

    Raises:
        UserError: says what is wrong with which flag or file.
    """
    actions = {"export": _export, "import": _import, "stats": _stats, "add-annotator": _add_annotator}
    actions[args.action](args)
    return 0


def _export(args: argparse.Namespace) -> None:
    from lowrank_rlhf.arena.votes.database import Store
    from lowrank_rlhf.arena.votes.exports import CARD, export

    report = export(
        Store(args.store, create=False),
        args.to,
        eval_fraction=args.eval_fraction,
        seed=args.seed,
        blind_only=args.blind_only,
        names=args.names,
        overwrite=args.overwrite,
    )
    for name, rows in report.files.items():
        print(f"{rows:7d} rows  {args.to}/{name}")
    for why, count in report.left_out.items():
        print(f"{count:7d} votes left out: {why}")
    prompts = counted(sum(report.prompts.values()), "prompt")
    print(f"{counted(report.votes, 'vote')} on {prompts}; data card: {args.to}/{CARD}")


def _import(args: argparse.Namespace) -> None:
    from lowrank_rlhf.arena.votes.database import Store
    from lowrank_rlhf.arena.votes.imports import import_votes

    left_out: list[str] = []
    added = import_votes(Store(args.store), args.file, args.annotator, left_out=left_out)
    print(f"{counted(added, 'new vote')} in {args.store}")
    if left_out:
        print(f"{counted(len(left_out), 'row')} left out, the first: {left_out[0]}")


def _stats(args: argparse.Namespace) -> None:
    import json

    from lowrank_rlhf.arena.statistics import report
    from lowrank_rlhf.arena.votes.database import Store

    store = Store(args.store, create=False)
    counts = store.counts()
    if args.json:
        board = report.as_json(report.leaderboard(store))
        print(json.dumps({"store": counts, **board}, indent=2, ensure_ascii=False, allow_nan=False))
        return
    print(f"{args.store}: {told(counts)}\n")
    print(report.text_report(store))


def _add_annotator(args: argparse.Namespace) -> None:
    import getpass

    from lowrank_rlhf.arena import logins

    if args.password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = getpass.getpass(f"password for {args.name}: ")
        if getpass.getpass("again: ") != password:
            raise UserError("the two passwords differ; nothing was changed")
    logins.add(args.logins, args.name, password, owner=args.owner)
    print(f"{args.name} may log in ({'owner' if args.owner else 'annotator'}), by {args.logins}")
