"""The app's settings and their flags; nothing heavy is imported before they are read."""

import argparse
import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_rlhf.errors import UserError

MIN_SAMPLES, MAX_SAMPLES = 2, 9


@dataclass(frozen=True)
class Options:
    """What the app is started with; see the flags for defaults.

    Attributes:
        runs: folder of run directories.
        store: the SQLite file of votes.
        prompts: data file whose prompts are voted on, None for only free prompts.
        adapters: name → PEFT folder of imported adapters.
        reward: run directory of a reward model whose scores are shown, None for none.
        base: model of the one base, None for that of the runs.
        logins: file of annotators and password hashes; None is a name field, for this machine only.
        host, port: where it listens; any host but this machine's own demands `logins`.
        models: names of the speakers in blind votes, () for all that are finished.
        samples: answers to a prompt in a ranking, 2 to 9; 2 is a pair.
        repeats: share of comparisons shown again with swapped sides.
        guidelines: a Markdown file shown instead of ours.
        max_adapters: in memory at once.
    """

    runs: Path = Path("runs")
    store: Path = Path("votes.db")
    prompts: str | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    reward: str | None = None
    base: str | None = None
    logins: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    models: tuple[str, ...] = ()
    samples: int = MIN_SAMPLES
    repeats: float = 0.05
    guidelines: Path | None = None
    max_adapters: int = 6
    seed: int = 0

    @property
    def local(self) -> bool:
        """Whether only programs on this machine can connect."""
        return is_local(self.host)

    def check(self) -> None:
        """Return where the app can be started with these.

        Raises:
            UserError: names the first flag that is wrong, and the fix.
        """
        if not self.local and self.logins is None:
            raise UserError(
                f"--host: {self.host} can be reached from other machines, so it demands --logins FILE "
                "(make one with: lowrank-rlhf votes add-annotator NAME --logins FILE --owner)"
            )
        if self.runs.exists() and not self.runs.is_dir():
            raise UserError(f"--runs: {self.runs} is not a folder")
        files = {"--prompts": self.prompts, "--logins": self.logins, "--guidelines": self.guidelines}
        for flag, path in files.items():
            if path is not None and not Path(path).is_file():
                raise UserError(f"{flag}: there is no file {path}")
        for name, folder in self.adapters.items():
            if not (folder / "adapter_config.json").is_file():
                raise UserError(f"--adapter {name}={folder}: no PEFT folder (it has no adapter_config.json)")
        if self.store.is_dir() or not self.store.absolute().parent.is_dir():
            raise UserError(f"--store: {self.store} is to be a file in a folder that exists")
        self._check_numbers()

    def _check_numbers(self) -> None:
        within = {
            "--samples": (MIN_SAMPLES, self.samples, MAX_SAMPLES),
            "--repeats": (0, self.repeats, 1),
            "--port": (0, self.port, 65535),
            "--max-adapters": (1, self.max_adapters, 1000),
        }
        for flag, (low, value, high) in within.items():
            if not low <= value <= high:
                raise UserError(f"{flag}: {value} is not within {low} and {high}")


def is_local(host: str) -> bool:
    """Whether an address to listen on, or that of a client, is this machine's own.

    >>> is_local("127.0.0.1"), is_local("localhost"), is_local("::1"), is_local("0.0.0.0"), is_local("10.0.0.5")
    (True, True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def add_app_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `Options` as flags."""
    default = Options()
    parser.add_argument("--runs", metavar="DIR", default=str(default.runs), help="run directories (%(default)s)")
    parser.add_argument(
        "--store", metavar="FILE", default=str(default.store), help="SQLite file of the votes (%(default)s)"
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts to vote on, in any data format (default: free ones)")
    parser.add_argument(
        "--adapter", metavar="NAME=DIR", action="append", default=[], help="a PEFT folder from elsewhere; repeatable"
    )
    parser.add_argument("--reward", metavar="RUN", help="a reward run whose scores are shown after the vote")
    parser.add_argument("--base", metavar="MODEL", help="the one base (default: that of the runs)")
    parser.add_argument(
        "--logins", metavar="FILE", help="annotators and hashed passwords; made by `votes add-annotator`"
    )
    parser.add_argument("--host", default=default.host, help="%(default)s; any but this machine's demands --logins")
    parser.add_argument("--port", metavar="N", type=int, default=default.port, help="%(default)s; 0 is any free one")
    parser.add_argument(
        "--models", metavar="NAME", nargs="+", action="extend", default=[], help="who is voted on (default: all runs)"
    )
    parser.add_argument(
        "--samples", metavar="K", type=int, default=default.samples, help="answers to rank, 2 to 9 (%(default)s: pairs)"
    )
    parser.add_argument(
        "--repeats",
        metavar="SHARE",
        type=float,
        default=default.repeats,
        help="of comparisons shown again with swapped sides (%(default)s)",
    )
    parser.add_argument("--guidelines", metavar="FILE", help="Markdown shown to annotators instead of ours")
    parser.add_argument(
        "--max-adapters", metavar="N", type=int, default=default.max_adapters, help="in memory at once (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the order of prompts (%(default)s)")


def options(args: argparse.Namespace) -> Options:
    """The checked options of parsed flags.

    Raises:
        UserError: a flag is wrong; names it and the fix.
    """
    adapters: dict[str, Path] = {}
    for text in args.adapter:
        name, equals, folder = text.partition("=")
        if not (equals and folder and re.fullmatch(r"[\w.-]+", name)) or name in adapters:
            raise UserError(f"--adapter: {text!r} is to be NAME=DIR, each NAME once and of letters, digits, . _ -")
        adapters[name] = Path(folder)
    chosen = Options(
        runs=Path(args.runs),
        store=Path(args.store),
        prompts=args.prompts,
        adapters=adapters,
        reward=args.reward,
        base=args.base,
        logins=Path(args.logins) if args.logins else None,
        host=args.host,
        port=args.port,
        models=tuple(args.models),
        samples=args.samples,
        repeats=args.repeats,
        guidelines=Path(args.guidelines) if args.guidelines else None,
        max_adapters=args.max_adapters,
        seed=args.seed,
    )
    chosen.check()
    return chosen
