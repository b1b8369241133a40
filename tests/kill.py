"""A training in a process of its own that is killed at a chosen moment: `python tests/kill.py MOMENT N ARGUMENTS…`."""

import errno
import os
import signal
import sys
import threading

from lowrank_rlhf import checkpoints, cli, runs


def at(count, action):
    """A function that does `action` when it is called for the `count`-th time."""
    calls = 0

    def tick():
        nonlocal calls
        calls += 1
        if calls == count:
            action()

    return tick


def before(module, name, tick):
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        tick()
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_later(milliseconds):
    """Wherever the training then is."""
    threading.Timer(milliseconds / 1000, kill).start()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(moment, count, *arguments):
    where = {
        "log": (runs.Run, "log", kill),  # between two steps
        "write": (checkpoints, "fsync", kill),  # a checkpoint is half on the disk
        "rename": (checkpoints.Path, "rename", kill),  # a checkpoint is complete, under its temporary name
        "sigterm": (runs.Run, "log", terminate),
        "disk": (checkpoints, "fsync", fill_the_disk),
        "never": (runs.Run, "log", lambda: None),
    }
    if moment == "start":
        kill_later(int(count))
    elif moment == "clock":
        before(runs.Run, "log", at(1, lambda: kill_later(int(count))))
    else:
        module, name, action = where[moment]
        before(module, name, at(int(count), action))
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
