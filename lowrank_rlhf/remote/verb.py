"""`lowrank-rlhf remote …`: the words of the command line."""

import argparse
from collections.abc import Callable
from typing import Any

from lowrank_rlhf.remote import FOLDER


def add_remote_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="remote_verb", metavar="VERB", required=True)

    def verb(name: str, summary: str, job: bool = False) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary, description=summary)
        made.add_argument("host", metavar="HOST", help="user@address, or a Host of ~/.ssh/config")
        if job:
            made.add_argument("job", metavar="JOB", nargs="?", help="default: the newest")
        made.add_argument(
            "--dir",
            metavar="DIR",
            default=FOLDER,
            help="folder of everything there (%(default)s, in the home directory)",
        )
        return made

    up = verb("up", "install this package there and check the machine; again at any time")
    up.add_argument("--venv", metavar="DIR", help="use an environment that is there instead of making one")
    _add_env(up, "for all that runs there, as HF_HOME=/workspace/hf; repeatable")
    _add_recipe(verb("push", "send the code, and what a recipe names; only what has changed"), optional=True)
    _add_jobs(verb)
    _add_pull(verb("pull", "fetch a job's adapters, metrics and plots, never the base", job=True))
    ui = verb("ui", "the app there, in a browser here, until Ctrl-C")
    ui.add_argument("--port", metavar="N", type=int, default=7860, help="here (%(default)s)")
    ui.add_argument("--prompts", metavar="FILE", help="a file here whose prompts are voted on")
    ui.add_argument("--reward", metavar="RUN", help="a reward run there whose scores are shown after the vote")
    watch = verb("watch", "run a command there once no job has run for a while, as to switch the machine off")
    watch.add_argument("--idle-stop", metavar="MIN", type=float, help="minutes without a job")
    watch.add_argument("--command", metavar="CMD", help="for the shell there, as 'sudo poweroff'")
    watch.add_argument("--off", action="store_true", help="end the watch instead")
    _add_export(verbs)


def _add_jobs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    run = verb("run", "start a recipe there; it goes on without this machine")
    _add_recipe(run)
    run.add_argument("--follow", "-f", action="store_true", help="show its log until it ends")
    run.add_argument("--overwrite", action="store_true", help="replace an earlier run in its run_dir there")
    run.add_argument("--gpus", metavar="N", type=int, default=1, help="processes, each on its own card (1)")
    _add_env(run, "for its environment; repeatable")
    _add_secret(run)
    verb("ps", "all jobs there")
    logs = verb("logs", "a job's log", job=True)
    logs.add_argument("-f", "--follow", action="store_true", help="until the job ends, through lost connections")
    verb("metrics", "a job's figures as they come: the live panel of PPO and GRPO, a line a step of others", job=True)
    stop = verb("stop", "save a checkpoint and stop a job", job=True)
    stop.add_argument("--grace", metavar="S", type=float, default=300, help="seconds until it is killed (%(default)s)")
    resume = verb("resume", "go on with a job from its checkpoint", job=True)
    resume.add_argument("--follow", "-f", action="store_true", help="show its log until it ends")
    _add_secret(resume)


def _add_pull(pull: argparse.ArgumentParser) -> None:
    pull.add_argument("--to", metavar="DIR", help="default: the run's own name here")
    pull.add_argument("--checkpoints", action="store_true", help="fetch these too")
    pull.add_argument("--votes", action="store_true", help="fetch the votes given in the app there instead")


def _add_export(verbs: Any) -> None:
    summary = "a recipe as a task of SkyPilot, which rents the machine"
    export = verbs.add_parser("export", help=summary, description=summary)
    export.add_argument("--to", choices=("skypilot",), required=True)
    export.add_argument("--out", metavar="FILE", help="default: the terminal")
    export.add_argument(
        "--gpu", metavar="NAME[:N]", default="L4:1", help="as SkyPilot names it; a process on each of N (%(default)s)"
    )
    _add_recipe(export)
    _add_secret(export)


def _add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?" if optional else None, help="a YAML file, or a pipeline's"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")
    parser.add_argument("--tiny", action="store_true", help="smoke test: random 2-layer model, two steps")
    parser.add_argument("--all", action="store_true", help="of a pipeline, also its `more` stages")


def _add_env(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], help=summary)


def _add_secret(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--secret",
        metavar="NAME",
        action="append",
        default=[],
        help="a variable set here for its environment, written nowhere; HF_TOKEN and WANDB_API_KEY always are",
    )


def remote(args: argparse.Namespace) -> int:
    """Do what the words say; returns the exit status.

    Raises:
        UserError: something is wrong, here, there or in between.
    """
    if getattr(args, "recipe", "") is None and args.overrides:  # behind a flag
        args.recipe, *args.overrides = args.overrides
    from lowrank_rlhf.remote import machine, running, serving
    from lowrank_rlhf.remote.ssh import Host

    if args.remote_verb == "export":
        from lowrank_rlhf.remote.skypilot import export

        return export(_shipment(args), args)
    host = Host(args.host, args.dir)
    actions: dict[str, Callable[[], int]] = {
        "up": lambda: machine.up(host, args.venv, running.assignments(args.env)),
        "push": lambda: running.push(host, _shipment(args) if args.recipe else None),
        "run": lambda: _run(args, host),
        "ps": lambda: running.ps(host),
        "logs": lambda: running.logs(host, args.job, args.follow),
        "metrics": lambda: running.metrics(host, args.job),
        "stop": lambda: running.stop(host, args.job, args.grace),
        "resume": lambda: _follow(args, host, *running.resume(host, args.job, args.secret)),
        "pull": lambda: _pull(args, host),
        "ui": lambda: serving.ui(host, args.port, args.prompts, args.reward),
        "watch": lambda: serving.watch(host, args.idle_stop, args.command, args.off),
    }
    return actions[args.remote_verb]()


def _shipment(args: argparse.Namespace) -> Any:
    from lowrank_rlhf.remote.shipment import read_shipment

    return read_shipment(args.recipe, args.overrides, tiny=args.tiny, everything=args.all)


def _run(args: argparse.Namespace, host: Any) -> int:
    from lowrank_rlhf.remote.running import Start, start

    how = Start(tuple(args.env), tuple(args.secret), args.gpus, args.overwrite)
    return _follow(args, host, start(host, _shipment(args), how))


def _follow(args: argparse.Namespace, host: Any, job: str, offset: int = 0) -> int:
    from lowrank_rlhf.remote.running import logs

    if args.follow:
        return logs(host, job, follow=True, offset=offset)
    print(f"this machine may be switched off; see its log with: {host.command('logs', job, '-f')}")
    return 0


def _pull(args: argparse.Namespace, host: Any) -> int:
    from lowrank_rlhf.remote.pulling import pull, pull_votes

    return pull_votes(host, args.to) if args.votes else pull(host, args.job, args.to, args.checkpoints)
