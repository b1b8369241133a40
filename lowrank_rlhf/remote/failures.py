"""What went wrong between two machines, in words that say what to do."""

import re

from lowrank_rlhf.errors import UserError


class Lost(Exception):
    """The connection could not be made or broke off; another try may succeed."""


# What ssh and rsync say → what it means; the first that fits
WRONG = (
    (r"Could not resolve hostname", "no such host: is the name right, and in ~/.ssh/config?"),
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "its key is not the one that is known: if the machine was made anew, "
     "forget the old key with: ssh-keygen -R {address}"),
    (r"Host key verification failed", "its key is not known yet: connect once with `ssh {host}` and confirm it"),
    (r"Permission denied \(|Too many authentication failures|no mutual signature",
     "it refused the key: does `ssh {host}` work? Give the key with IdentityFile in ~/.ssh/config, or ssh-add it"),
    (r"No space left on device|Disk quota exceeded", "its disk is full; make room there, then ask again"),
    (r"python3 is too old: (\S+)", "its python3 is {0}, too old; install Python 3.11 or newer there"),
    (r"python3: (command )?not found|python3: No such file|Unknown command:? '?python3",
     "it has no python3: install Python 3.11 or newer there"),
    (r"rsync: (command )?not found|rsync: No such file|Unknown command:? '?rsync",
     "it has no rsync: install it there (sudo apt install rsync)"),
    (r"is your shell clean\?|protocol version mismatch", "its shell says something by itself: move that out of "
     "~/.bashrc there, or below its test for an interactive shell"),
    (r"remote port forwarding failed|cannot listen to port|Address already in use", "the port is taken here: choose "
     "another with --port"),
    (r"Bad configuration option|terminating, \d+ bad configuration", "~/.ssh/config has an error: {line}"),
)  # fmt: skip
LOST = (
    r"Connection (refused|reset|closed|timed out)|Operation timed out|No route to host|Network is (unreachable|down)|"
    r"Broken pipe|closed by remote host|kex_exchange_identification|not responding|"
    r"connection unexpectedly closed|lost connection|mux_client|Host is down"
)
LOST_STATUS = (255, 12, 10, 30, 35, -13)  # of ssh; of rsync: the stream, a socket, a time limit; SIGPIPE


def explain(host: str, status: int, said: str, reached: bool = False) -> Lost | UserError:
    """What to raise for a failed ssh or rsync.

    Args:
        status: its exit status.
        said: its standard error.
        reached: the machine has answered before, so that a name that is not found now is a network that is down.

    >>> explain("gpu", 255, "ssh: Could not resolve hostname gpu: Name or service not known")
    UserError('gpu: no such host: is the name right, and in ~/.ssh/config?')
    >>> explain("gpu", 255, "ssh: connect to host gpu port 22: Connection refused")
    Lost('gpu: ssh: connect to host gpu port 22: Connection refused')
    """
    line = next((text.strip() for text in said.splitlines() if text.strip()), f"ended with status {status}")
    if "Could not resolve hostname" in said and (reached or "Temporary failure in name resolution" in said):
        return Lost(f"{host}: its name is not found, so the network here may be down")
    for pattern, words in WRONG:
        if found := re.search(pattern, said):
            address = host.rpartition("@")[2]
            return UserError(f"{host}: {words.format(*found.groups(), host=host, address=address, line=line)}")
    if found := re.search(rf".*({LOST}).*", said):
        return Lost(f"{host}: {found.group().strip()}")
    if status in LOST_STATUS:
        return Lost(f"{host}: {line}")
    return UserError(f"{host}: {' '.join(said.split()[-60:]) or line}")
