"""Trainings in one of several processes, one after the other: `accelerate launch … -m tests.ddp FOLDER`.

FOLDER/commands.json names them; of each the process leaves its status, what it printed and the gradient of each step.
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch

from lowrank_rlhf import cli, processes, runs


@contextlib.contextmanager
def recorded(gradients):
    """Every step's gradient, as it is before clipping."""
    add = processes.add_gradients

    def add_and_keep(parameters):
        add(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]).clone())

    processes.add_gradients = add_and_keep
    try:
        yield
    finally:
        processes.add_gradients = add


@contextlib.contextmanager
def terminated(step):
    """SIGTERM for this process after a step; None never."""
    log = runs.Run.log

    def log_and_stop(self, logged, metrics):
        log(self, logged, metrics)
        if logged == step and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    runs.Run.log = log_and_stop
    try:
        yield
    finally:
        runs.Run.log = log


def train(folder, name, arguments, *, stop=None):
    """Run a command line of the package here; what comes of it is also in a file."""
    rank, gradients, out, err = int(os.environ.get("RANK", "0")), [], io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with recorded(gradients), terminated(stop if rank == 1 else None), streams[0], streams[1]:
        status = cli.main(arguments)
    found = {"status": status, "gradients": gradients, "out": out.getvalue(), "err": err.getvalue()}
    torch.save(found, Path(folder, f"{name}-{rank}.pt"))
    return found


def main(folder):
    for command in json.loads(Path(folder, "commands.json").read_text()):
        train(folder, **command)


if __name__ == "__main__":
    main(*sys.argv[1:])
