"""Jobs from here: started, followed through lost connections, listed, stopped and resumed."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from secrets import token_hex
from typing import Any

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.panel import panel
from lowrank_rlhf.progress import clock
from lowrank_rlhf.remote.failures import Lost
from lowrank_rlhf.remote.machine import check_ready, push_code
from lowrank_rlhf.remote.shipment import INPUTS, PIPELINE, Shipment
from lowrank_rlhf.remote.ssh import WAITS, Host, waited

SECRETS = ("HF_TOKEN", "WANDB_API_KEY")  # sent where they are set
LONGEST_WAIT = 30
SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY)S?(_|$)", re.IGNORECASE)  # not TOKENIZERS_…
ON_POLICY = ("ppo", "grpo")


@dataclass(frozen=True)
class Start:
    """How a job is started, besides its recipe.

    Attributes:
        env: NAME=VALUE for its environment, written down with the job.
        secrets: names of variables here that go into its environment and are written nowhere.
        gpus: processes, each on a card of its own.
        overwrite: replace an earlier run in its run_dir.
    """

    env: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    gpus: int = 1
    overwrite: bool = False


def push(host: Host, shipment: Shipment | None) -> int:
    """Send the code and what a recipe names, only what has changed.

    Raises:
        UserError: it cannot be sent.
    """
    host.ask("look")  # makes the folders
    send(host, shipment)
    print(f"{host.name}: up to date")
    return 0


def send(host: Host, shipment: Shipment | None) -> None:
    push_code(host)
    if shipment is not None:
        send_inputs(host, shipment)


def send_inputs(host: Host, shipment: Shipment) -> None:
    """Each file to its place."""
    elsewhere = {file for file, place in shipment.files.items() if place == f"{INPUTS}{file}"}
    below = [place for file, place in shipment.files.items() if file not in elsewhere]
    if below:
        host.copy_to(f"{os.getcwd()}/", "work/", "--copy-links", names=below)
    if elsewhere:
        host.copy_to("/", f"work/{INPUTS}/", "--copy-links", names=[file[1:] for file in sorted(elsewhere)])


def start(host: Host, shipment: Shipment, how: Start) -> str:
    """Send a recipe with all it needs and start it; returns the job's name.

    Raises:
        UserError: the machine is not ready, or refuses the job.
    """
    secrets, env = gather(how.secrets), assignments(how.env)
    if how.gpus < 1 or (how.gpus > 1 and shipment.stage in (PIPELINE, *ON_POLICY)):
        raise UserError(f"--gpus: {how.gpus} is not for {shipment.stage}, which runs on one card; leave it out")
    check_ready(host)
    send(host, shipment)
    place = host.ask("reserve", stage=shipment.stage, run_dir=shipment.run_dir)
    folder, run_dir = place["dir"], place["run_dir"]
    about = {
        "stage": shipment.stage,
        "run_dir": run_dir,
        "needs": shipment.needs,
        "env": env,
        "overwrite": how.overwrite or shipment.stage == PIPELINE,  # which keeps what is unchanged
        "launcher": ["--processes", str(how.gpus)] if how.gpus > 1 else [],
        **shipment.commands(folder, run_dir, how.overwrite),
    }
    files = shipment.recipes(folder, run_dir)
    host.ask("start", name=place["job"], about=about, files=files, secrets=secrets)
    sent = f"{len(shipment.files)} input file{'s' * (len(shipment.files) != 1)}"
    with_secrets = f", secrets: {', '.join(secrets)}" if secrets else ""
    print(f"{place['job']} runs on {host.name}, into {run_dir} ({sent}{with_secrets})", flush=True)
    return str(place["job"])


def gather(names: Sequence[str]) -> dict[str, str]:
    """The values of secrets: those asked for, and the usual ones that are set here.

    Raises:
        UserError: one that was asked for is not set.
    """
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(f"--secret: {missing[0]} is not set here; export it first")
    return {name: os.environ[name] for name in dict.fromkeys((*SECRETS, *names)) if name in os.environ}


def assignments(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a dictionary.

    Raises:
        UserError: one is none, or its name is that of a secret.
    """
    env: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--env: {word!r} is to be NAME=VALUE")
        if SECRET.search(name):
            raise UserError(f"--env: {name} looks like a secret and would be written down: give --secret {name}")
        env[name] = value
    return env


def listen_on(host: Host, do: str, job: str | None, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of `log` or `metrics` until the job has ended, through any number of lost connections."""
    failures, heard = 0, False
    while True:
        try:
            for event in host.listen(do, name=job, offset=offset, until_end=True):
                failures, heard, job, offset = 0, True, event.get("job", job), event.get("offset", offset)
                yield event
                if "end" in event:
                    return
            raise Lost(f"{host.name}: the answer broke off")
        except Lost as error:
            if not heard and failures == len(WAITS):
                raise UserError(f"{error}; what runs there goes on") from error
            waited(Lost(f"{error}; {job or 'the job'} goes on"), min(2**failures, LONGEST_WAIT))
            failures += 1


def logs(host: Host, job: str | None, follow: bool, offset: int = 0) -> int:
    """Print a job's log; following, until it has ended.

    Returns:
        1 where it has failed, else 0.
    """
    events = listen_on(host, "log", job, offset) if follow else _once(host, "log", job)
    try:
        for event in events:
            if "job" in event:
                job = event["job"]
            print(event.get("text", ""), end="", flush=True)
            if "end" in event:
                return _ended(host, event["end"], quiet=not follow)
    except KeyboardInterrupt:
        print(f"\nno longer following; {job or 'the job'} goes on on {host.name}", file=sys.stderr)
    return 0


def _once(host: Host, do: str, job: str | None) -> Iterator[dict[str, Any]]:
    try:
        yield from host.listen(do, name=job, offset=0, until_end=False)
    except Lost as error:
        raise UserError(f"{error}; try again") from error


def _ended(host: Host, job: dict[str, Any], quiet: bool = False) -> int:
    """Say how a job stands, and what to do next; 1 where it has failed."""
    again = host.command("resume", job["job"])
    hints = {
        "finished": f"fetch it with: {host.command('pull', job['job'])}",
        "stopped": f"go on with: {again}",
        "killed": f"it did not stop in time, and goes on from an earlier checkpoint, or its start, with: {again}",
        "failed": f"exit status {job['exit']}; after mending, go on with: {again}",
        "lost": f"the machine was restarted, or its memory ran out; go on with: {again}",
    }
    if not quiet and job["state"] in hints:
        print(f"{job['job']} {job['state']}; {hints[job['state']]}", flush=True)
    return int(job["state"] in ("failed", "lost"))


def metrics(host: Host, job: str | None) -> int:
    """The live panel of a PPO or GRPO job, or a line for each step of another, from the metrics there.

    Returns:
        1 where the job has failed, else 0.
    """
    events = listen_on(host, "metrics", job)
    first = next(events)
    stage, recipe = first["run"]["stage"], first["run"]["recipe"]
    try:
        if stage in ON_POLICY:
            with panel(stage, recipe["train"]["max_steps"]) as line:
                for row, end in _rows(events):
                    if end is None and row.get("step", 0) > 0:
                        line.step(int(row["step"]), round(row["tokens_per_second"] * row["seconds"]), row)
        else:
            for row, end in _rows(events):
                if end is None and {"loss", "eval_loss"} & row.keys():
                    figures = "".join(f"  {name} {row[name]:.3f}" for name in ("loss", "eval_loss") if name in row)
                    print(f"{stage} step {row['step']:g}{figures}", flush=True)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on on {host.name}", file=sys.stderr)
        return 0
    return _ended(host, end) if end else 0


def _rows(events: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """(a row, None) of the metrics as they come, at last (nothing, how the job stands)."""
    for event in events:
        for row in event.get("rows", ()):
            yield row, None
        if "end" in event:
            yield {}, event["end"]


def ps(host: Host) -> int:
    """Print a line for each job."""
    said = host.ask("ps")
    if not said["jobs"]:
        print(f"no job on {host.name} yet; start one with: {host.command('run', 'RECIPE')}")
    else:
        print(f"{'job':<14}{'state':<11}{'step':>7}  {'started':<14}{'took':>9}  run_dir")
    for job in said["jobs"]:
        took = clock((job["ended"] or job["now"]) - job["started"]) if job["state"] != "lost" else ""
        began = datetime.fromtimestamp(job["started"]).strftime("%b %d %H:%M")
        step = "" if job["step"] is None else f"{job['step']:g}"
        state = f"failed {job['exit']}" if job["state"] == "failed" else job["state"]
        print(f"{job['job']:<14}{state:<11}{step:>7}  {began:<14}{took:>9}  {job['run_dir']}")
    if watch := said["watching"]:
        print(f"watch: after {watch['minutes']:g} idle minutes: {watch['command']}")
    return 0


def stop(host: Host, job: str | None, grace: float) -> int:
    """Stop a job and wait: its training saves a checkpoint after the step it is at."""
    said = host.ask("stop", name=job, grace=grace)
    if said["state"] == "stopping":
        print(f"stopping {said['job']} …", flush=True)
        return logs(host, said["job"], follow=True, offset=said["log_bytes"])
    print(f"{said['job']} is {said['state']}")
    return 0


def resume(host: Host, job: str | None, secrets: Sequence[str]) -> tuple[str, int]:
    """Go on with a job from its newest checkpoint; returns its name, and from which byte on its log is new.

    Raises:
        UserError: it is running, or finished.
    """
    said = host.ask("resume", name=job, secrets=gather(secrets), token=token_hex(8))
    print(f"{said['job']} goes on on {host.name}", flush=True)
    return str(said["job"]), int(said["log_from"])
