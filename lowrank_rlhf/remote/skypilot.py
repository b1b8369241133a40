"""A recipe as a task of SkyPilot, which rents the machine and calls the same command line there."""

import argparse
import os
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.remote.machine import project
from lowrank_rlhf.remote.running import ON_POLICY, SECRETS
from lowrank_rlhf.remote.shipment import PIPELINE, Shipment

GPU = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)(?::([1-9]\d*))?")
THERE = "lowrank-rlhf-sky"  # in the home directory there: venv/, inputs/ that are sent, work/ with the runs
IDLE_MINUTES = 30
UNSAFE = re.compile(r"['\\$]")  # SkyPilot quotes a path as Python's repr does, for a shell, and fills in its $NAMEs
# SkyPilot brings uv; a machine's own Python is often older than 3.11
SETUP = f"""\
set -e
export PATH="$HOME/.local/bin:$PATH"
venv="$HOME/{THERE}/venv"
[ -x "$venv/bin/python" ] || uv venv --seed --python 3.11 "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
"$venv/bin/lowrank-rlhf" doctor
"""


def export(shipment: Shipment, args: argparse.Namespace) -> int:
    """Print the task, or write it to `args.out`.

    Raises:
        UserError: no such graphics card can be meant, a secret is no name, or a path cannot go through SkyPilot.
    """
    text = task(shipment, Path(args.recipe), args.gpu, _names(args.secret), args.out or "task.yaml")
    if args.out is None:
        print(text, end="")
        return 0
    out = Path(args.out)
    scratch = out.with_name(f".{out.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(out)
    print(f"{out}: its first lines say how to launch it, and how to fetch the run")
    return 0


def task(shipment: Shipment, recipe: Path, gpu: str, secrets: Sequence[str], file: str) -> str:
    """The task as YAML, below comments with the commands to launch it and to fetch the run.

    Args:
        gpu: NAME or NAME:COUNT, a process on each.
        secrets: names of variables that `sky launch --secret NAME` takes from where it runs; no value is written.
        file: what the YAML will be called.

    Raises:
        UserError: as of `export`.
    """
    found = GPU.fullmatch(gpu)
    if not found:
        raise UserError(f"--gpu: {gpu} is to be NAME or NAME:COUNT as SkyPilot lists them, as in A100:2")
    count = int(found[2] or 1)
    if count > 1 and shipment.stage in (PIPELINE, *ON_POLICY):
        raise UserError(f"--gpu: {gpu}: {shipment.stage} runs on one card: give {found[1]}:1")
    # A letter first, as clusters are named; ppo_from_sft.yaml → ppo-from-sft
    name = "-".join(re.findall(r"[a-z0-9]+", recipe.stem.lower()))
    name = name if name[:1].isalpha() else f"{shipment.stage}-{name}".rstrip("-")
    run_dir = shipment.run_dir or f"runs/{name}"
    mounts = _mounts(shipment, name)
    content: dict[str, Any] = {
        "name": name,
        "resources": {"accelerators": f"{found[1]}:{count}"},
        "workdir": _checked(str(project())),
        "file_mounts": {mount: source for mount, source, _ in mounts},
        "secrets": dict.fromkeys(secrets),
        "setup": SETUP,
        "run": _run(shipment, name, run_dir, count, [(mount, place) for mount, _, place in mounts]),
    }
    content = {key: value for key, value in content.items() if value != {}}
    head = "".join(c if c.isprintable() or c == "\n" else "?" for c in _head(shipment, name, run_dir, secrets, file))
    head = textwrap.indent(head, "# ", lambda line: True)
    return head + str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def _names(secrets: Sequence[str]) -> list[str]:
    """Secrets to ask for: the usual ones that are set here, and those that were named. SkyPilot refuses a launch that
    lacks one of them."""
    for name in secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError("--secret: give the name of a variable alone; its value would be written down")
    return list(dict.fromkeys([*(name for name in SECRETS if name in os.environ), *secrets]))


def _mounts(shipment: Shipment, name: str) -> list[tuple[str, str, str]]:
    """(path there, file here, place below the working directory there) of each input file."""
    mounts = []
    for number, (file, place) in enumerate(shipment.files.items()):
        plain = re.sub(r"[^A-Za-z0-9.]+", "_", Path(file).name)
        # A link would be sent as a link
        mounts.append((f"~/{THERE}/inputs/{name}/{number}-{plain}", _checked(os.path.realpath(file)), place))
    return mounts


def _checked(path: str) -> str:
    """
    Raises:
        UserError: SkyPilot would not find that path, or its shell would read it.
    """
    if UNSAFE.search(path) or not path.isprintable():
        raise UserError(f"{path!r}: SkyPilot hands paths to a shell, which would read this one otherwise; rename it")
    return path


def _run(shipment: Shipment, name: str, run_dir: str, count: int, links: Sequence[tuple[str, str]]) -> str:
    """The shell's words that put inputs and recipes to their places and start the training."""
    folder = f"tasks/{name}"
    made = sorted({os.path.dirname(place) for _, place in links} - {""})
    lines = ["set -e", f'export PATH="$HOME/{THERE}/venv/bin:$PATH" PYTHONPATH="$HOME/{THERE}/work"']
    lines += [f"mkdir -p ~/{THERE}/work", f"cd ~/{THERE}/work", f"mkdir -p -- {shlex.join([folder, *made])}"]
    lines += [f"ln -sfn {mount} {shlex.quote(f'./{place}')}" for mount, place in links]
    for file, text in shipment.recipes(folder, run_dir).items():
        end = "RECIPE"
        while end in text.splitlines():
            end += "_"
        lines.append(f"cat > {shlex.quote(f'{folder}/{file}')} <<'{end}'\n{text}{end}")
    command = shlex.join(shipment.commands(folder, run_dir, overwrite=False)["command"])
    if shipment.stage != PIPELINE:  # which keeps what is there anyway
        info = shlex.quote(f"./{run_dir}/run.json")
        lines += ["set --", f"[ ! -f {info} ] || set -- --resume  # launched again, as after a preemption"]
        command += ' "$@"'
    launcher = f"python -m lowrank_rlhf.launch --processes {count}"
    lines.append(f"lowrank-rlhf {command}" if count == 1 else f"{launcher} {command} < /dev/null")
    return "\n".join(lines) + "\n"


def _head(shipment: Shipment, name: str, run_dir: str, secrets: Sequence[str], file: str) -> str:
    launch = ["sky", "launch", "-c", name, "-i", str(IDLE_MINUTES)]
    for secret in secrets:
        launch += ["--secret", secret]
    there = f"{name}:{THERE}/work/{run_dir}"
    fetch = ["rsync", "-Pavz", "--exclude", "checkpoints", there, f"{os.path.dirname(run_dir) or '.'}/"]
    lines = [
        "Made by `lowrank-rlhf remote export --to skypilot`.",
        f"Launch it; {IDLE_MINUTES} minutes after its end the machine stops:",
        f"  {shlex.join([*launch, file])}",
        "Fetch the run, then give the machine back:",
        f"  {shlex.join(fetch)}",
        f"  sky down {name}",
    ]
    if secrets:
        lines.insert(3, "A --secret takes its value from where sky runs; none is in this file.")
    lines += [
        f"{key}: {path} is not here; an earlier task on that cluster is to make it" for key, path in shipment.needs
    ]
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Text of several lines as it is, below a bar."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    as_it_is = text.replace("\n", "").isprintable()  # a bar would make a newline of what Unicode also calls one
    style = None if "\n" not in text else "|" if as_it_is else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
