"""`python -m lowrank_rlhf.launch [--processes N] STAGE …`: the command line, with secrets from standard input.

They come as one line of JSON and go into the environment after the process has started, so that no list of processes
and no file ever holds them.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run `lowrank-rlhf` with these words, on N processes where `--processes N` comes first."""
    os.environ.update(json.loads(sys.stdin.readline() or "{}"))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if argv[0] == "--processes":
        return _launch(argv[1], argv[2:])
    from lowrank_rlhf import cli

    return cli.main(argv)


def _launch(processes: str, argv: Sequence[str]) -> int:
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException

    # It kills the processes where they take longer to stop; how long they may is the runner's to say
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "86400")
    config = str(Path(__file__).parent / "remote" / "ddp.yaml")
    sys.argv = ["accelerate", "--config_file", config, "--num_processes", processes, "-m", "lowrank_rlhf.cli", *argv]
    try:
        launch()
    except SignalException as stop:  # passed on to the processes, which have stopped by now
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
