"""The app of another machine in a browser here, and the watch that switches an idle machine off."""

import contextlib
import os
import socket
from pathlib import Path

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.remote.failures import Lost
from lowrank_rlhf.remote.machine import check_ready, push_code
from lowrank_rlhf.remote.shipment import INPUTS
from lowrank_rlhf.remote.ssh import Host


def ui(host: Host, port: int, prompts: str | None, reward: str | None) -> int:
    """Serve the app there and forward a port of this machine to it; loopback on both ends, until Ctrl-C.

    Args:
        prompts: a file here.
        reward: a run there.

    Raises:
        UserError: the port is taken, or the app does not start.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port: {port} is taken here ({error.strerror}); choose another") from error
        port = probe.getsockname()[1]
    check_ready(host)
    push_code(host)
    options = ["--reward", reward] if reward else []
    if prompts is not None:
        if not Path(prompts).is_file():
            raise UserError(f"--prompts: there is no file {prompts} here")
        name = os.path.basename(prompts)
        host.copy_to(f"{os.path.dirname(os.path.abspath(prompts))}/", f"work/{INPUTS}/", names=[name])
        options += ["--prompts", f"{INPUTS}/{name}"]
    theirs = host.ask("free_port")["port"]
    forward = ("-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:127.0.0.1:{theirs}")
    with contextlib.suppress(KeyboardInterrupt):
        try:
            for event in host.listen("app", ssh=forward, port=theirs, options=options):
                # What it says of its own addresses holds for this end too, but for the port
                print(event.get("text", "").replace(f":{theirs}/", f":{port}/"), end="", flush=True)
                if event.get("end"):
                    return 1
        except Lost as error:
            raise UserError(f"{error}; ask again, every vote is in the store there") from error
    print(f"\nthe app on {host.name} is stopped; fetch its votes with: {host.command('pull', '--votes')}")
    return 0


def watch(host: Host, minutes: float | None, command: str | None, off: bool) -> int:
    """Have a command run there after so many minutes without a job, or none any more.

    Raises:
        UserError: the minutes are no time, or nothing is said.
    """
    if off:
        host.ask("unwatch")
        print(f"{host.name}: nothing is watched")
        return 0
    if minutes is None or not command:
        raise UserError("watch: give --idle-stop MIN and --command CMD, or --off")
    if not 0 < minutes < 100_000:
        raise UserError(f"--idle-stop: {minutes:g} is to be a number of minutes above 0")
    host.ask("watch", minutes=minutes, command=command)
    print(f"{host.name}: after {minutes:g} minutes without a job: {command}")
    print(f"end the watch with: {host.command('watch', '--off')}")
    return 0
