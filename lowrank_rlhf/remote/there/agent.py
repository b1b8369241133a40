"""Answers one request: which, of whom, with what, comes as one line; what is said back follows a mark."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

from lowrank_rlhf.remote.there import files, follow, jobs, machine, serving
from lowrank_rlhf.remote.there.folders import Folders, Refused, tell

MARK = "\0lowrank-rlhf\n"  # a shell's own greeting may come before it

# Each answers with what it returns, or has told it line by line and returns nothing
REQUESTS: dict[str, Callable[..., Any]] = {
    "look": machine.look,
    "install": machine.install,
    "doctor": machine.doctor,
    "reserve": jobs.reserve,
    "start": jobs.start,
    "resume": jobs.resume,
    "stop": jobs.stop,
    "ps": jobs.ps,
    "log": follow.log,
    "metrics": follow.metrics,
    "manifest": files.manifest,
    "votes": files.votes,
    "free_port": serving.free_port,
    "app": serving.app,
    "watch": serving.watch,
    "unwatch": serving.unwatch,
}


def answer(request: dict[str, Any]) -> None:
    """Do what is asked; a refusal and a full disk are told in words."""
    sys.stdout.write(MARK)
    sys.stdout.flush()
    try:
        said = REQUESTS[request["do"]](Folders(request["dir"]), **request["with"])
        if said is not None:
            tell(**said)
    except Refused as error:
        tell(refused=str(error))
    except OSError as error:
        if error.errno == errno.EPIPE:
            return  # nobody listens any more
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        tell(refused="its disk is full; make room there, then ask again" if full else f"{error}")
