"""Another machine made ready: this package there, an environment for it, and the check whether it is fit."""

import hashlib
import json
import tomllib
from pathlib import Path

import lowrank_rlhf
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.remote.failures import Lost
from lowrank_rlhf.remote.ssh import Host

SENT = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "app.py", "lowrank_rlhf/***", "recipes/***")
MIN_FREE_GIB = 15.0  # torch with its CUDA libraries takes most of it


def up(host: Host, venv: str | None, env: dict[str, str]) -> int:
    """Send the package, install it, and run `doctor`; again at any time, as only what is missing is done.

    Args:
        venv: an environment that is there, to be used instead of a new one.
        env: variables for all that will run there.

    Returns:
        The exit status of `doctor` there.

    Raises:
        UserError: the machine cannot be reached or made ready.
    """
    there = host.ask("look")
    cards = ", ".join(there["gpus"]) or "no NVIDIA card"
    print(f"{host.name}: {cards}, {there['free_gib']:g} GiB free in {there['root']}", flush=True)
    if not there["rsync"]:
        raise UserError(f"{host.name}: it has no rsync: install it there (sudo apt install rsync)")
    if there["setup"] is None and venv is None and there["free_gib"] < MIN_FREE_GIB:
        print(f"warning: an environment for a GPU takes about {MIN_FREE_GIB:g} GiB", flush=True)
    push_code(host)
    print("installing …", flush=True)
    try:
        for event in host.listen("install", fingerprint=fingerprint(), venv=venv, env=env):
            if _is_news(event.get("text", "")):
                print(f"  {event['text'].rstrip()}", flush=True)
        status = 0
        for event in host.listen("doctor"):
            print(event.get("text", ""), end="", flush=True)
            status = event.get("end", status)
    except Lost as error:
        raise UserError(f"{error}; the same command goes on") from error
    if not there["gpus"]:
        print(f"warning: {host.name} has no CUDA card: what is started there trains on its processor", flush=True)
    return status


def push_code(host: Host) -> None:
    """Send this package and its recipes; jobs that run keep the code they were started with."""
    chosen = ["--include", "/lowrank_rlhf/", "--include", "/recipes/"]
    for name in SENT:
        chosen += ["--include", f"/{name}"]
    host.copy_to(f"{project()}/", "code/", "--delete", "--exclude", "__pycache__", *chosen, "--exclude", "*")


def check_ready(host: Host) -> None:
    """
    Raises:
        UserError: `up` has not been run for this version.
    """
    setup = host.ask("look")["setup"]
    if setup is None:
        raise UserError(f"{host.name}: nothing is installed there yet; run: {host.command('up')}")
    if setup["fingerprint"] != fingerprint():
        raise UserError(
            f"{host.name}: it was set up for other versions of the packages than constraints.txt has here; "
            f"run again: {host.command('up')}"
        )


def fingerprint() -> str:
    """What an environment is made of: the packages this one depends on, and their pinned versions."""
    needs = tomllib.loads((project() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    made_of = [needs["requires-python"], needs["dependencies"], (project() / "constraints.txt").read_text()]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def project() -> Path:
    """The folder of this package's source.

    Raises:
        UserError: it was installed without it.
    """
    root = Path(lowrank_rlhf.__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / "constraints.txt").is_file():
        raise UserError(
            f"{root}: remote sends the source, and there is none here; install from a clone (pip install -e .)"
        )
    return root


def _is_news(text: str) -> bool:
    """Whether a line of pip's is worth showing."""
    return text.startswith(("making", "Collecting", "Downloading", "Installing", "Successfully", "ERROR", "WARNING"))
