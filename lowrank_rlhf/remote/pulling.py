"""What a job left there comes here: every file whole and with the hash it has there, or not at all."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.remote.ssh import Host

MARK = ".remote.json"  # in a run that was pulled: whose it is
TRIES = 3


def pull(host: Host, job: str | None, to: str | None, checkpoints: bool) -> int:
    """Fetch a job's run: adapters, metrics, samples, plots and reports, and no base.

    Args:
        to: folder to fetch into, the run's own name by default.
        checkpoints: these too, to go on with the training here.

    Raises:
        UserError: the folder is somebody else's, or a file does not arrive as it is there.
    """
    for _ in range(TRIES):
        there = host.ask("manifest", name=job, checkpoints=checkpoints)
        job = str(there["job"]["job"])
        target = Path(to or there["run_dir"])
        whose = {"host": host.name, "dir": host.folder, "job": job}
        _check_target(target, whose)
        staging = target.with_name(f".{target.name}.pull")
        changed = fetch(host, there, staging, target)
        if changed is None:
            _settle(staging, target, there["files"], whose)
            size = sum(entry[1] for entry in there["files"])
            print(f"{target}: {len(there['files'])} files, {_spoken(size)}, every hash as on {host.name}", flush=True)
            state = there["job"]["state"]
            if state != "finished":
                print(f"{job} is {state}: pull again for what comes later", flush=True)
            return 0
    raise UserError(f"{host.name}: {changed} changed each time while it was copied; try again when the job is calm")


def pull_votes(host: Host, to: str | None) -> int:
    """Fetch a copy of the votes that were given in the app there, to merge with `votes import`."""
    there = host.ask("votes")
    target = Path(to or f"{host.name.rpartition('@')[2]}.votes.db")
    staging = target.with_name(f".{target.name}.pull")
    if changed := fetch(host, there, staging, target):
        raise UserError(f"{host.name}: {changed} did not arrive whole; try again")
    (staging / there["files"][0][0]).replace(target)
    shutil.rmtree(staging)
    print(f"{target}: add them to your own with: lowrank-rlhf votes import --store votes.db {target}")
    return 0


def fetch(host: Host, there: dict[str, Any], staging: Path, target: Path) -> str | None:
    """Copy the files of a manifest into a folder beside their place; what an earlier try has brought is not sent again.

    Args:
        target: their place, where an earlier pull may stand.

    Returns:
        None, or the file whose hash is another by now.
    """
    staging.mkdir(parents=True, exist_ok=True)
    for name, _, _ in there["files"]:
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{host.name}: names a file outside of the run: {name!r}")
    names = [name for name, _, _ in there["files"]]
    for leftover in [path for path in staging.rglob("*") if not path.is_dir()]:
        if str(leftover.relative_to(staging)) not in names:  # half of a file, from a try that was killed
            leftover.unlink()
    # By content, as a file may change within one tick of the clock; what an earlier pull has brought is not sent again
    options = ["--checksum", *([f"--copy-dest={os.path.abspath(target)}"] if target.is_dir() else [])]
    # A relative path with a colon would be a host to rsync
    host.copy_from(there["from"], f"{os.path.abspath(staging)}/", *options, names=names)
    for name, size, digest in there["files"]:
        file = staging / name
        if not file.is_file():
            return str(name)  # it is there no more
        if name.endswith(".jsonl") and file.stat().st_size > size:
            os.truncate(file, size)  # it has grown since
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                return str(name)
    return None


def _check_target(target: Path, whose: dict[str, str]) -> None:
    if not target.exists():
        return
    mark = target / MARK
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != whose:
        raise UserError(f"{target} is here already and is not {whose['job']} of {whose['host']}; choose --to DIR")


def _settle(staging: Path, target: Path, files: list[Any], whose: dict[str, str]) -> None:
    """The whole folder at once, or into an earlier pull file by file, run.json last."""
    (staging / MARK).write_text(json.dumps(whose, indent=2) + "\n", encoding="utf-8")
    if not target.exists():
        staging.rename(target)
        return
    for name in sorted((entry[0] for entry in files), key=lambda name: (name == "run.json", name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(target / name)
    shutil.rmtree(staging)


def _spoken(size: float) -> str:
    """
    >>> _spoken(950), _spoken(12_345_678)
    ('950 bytes', '12.3 MB')
    """
    return f"{size} bytes" if size < 1000 else f"{size / 1e6:.1f} MB"
