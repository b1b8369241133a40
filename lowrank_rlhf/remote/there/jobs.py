"""Jobs: one detached process each, whose folder says all there is to know about it.

A lock on jobs/NAME/lock is held by the job's runner and its training for as long as either lives, whatever becomes of
process numbers, and one on jobs/NAME/runner by the runner alone; `exit` appears, by rename, when the training has
ended.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from lowrank_rlhf.remote.there.folders import Folders, Refused, read_json, write_json, write_text
from lowrank_rlhf.remote.there.runner import detach

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Job:
    """A job's folder.

    Raises:
        Refused: there is no such job.
    """

    def __init__(self, folders: Folders, name: str):
        self.folders, self.name = folders, name
        self.dir = folders.jobs / name
        if not NAME.fullmatch(name) or not self.dir.is_dir():
            known = ", ".join(names(folders)) or "none"
            raise Refused(f"there is no job {name!r} there; jobs: {known}")

    @property
    def about(self) -> dict[str, Any]:
        return dict(read_json(self.dir / "job.json") or {})

    @property
    def run_dir(self) -> Path:
        return self.folders.work / str(self.about["run_dir"])

    @property
    def metrics(self) -> Path | None:
        """The run's metrics.jsonl, of a pipeline that of the stage that wrote last."""
        found = [*self.run_dir.glob("metrics.jsonl"), *self.run_dir.glob("*/metrics.jsonl")]
        return max(found, key=lambda path: path.stat().st_mtime) if found else None

    @property
    def exit(self) -> int | None:
        """Status of the training that ended last, negative the signal that killed it; None where none has ended."""
        try:
            return int((self.dir / "exit").read_text())
        except (FileNotFoundError, ValueError):
            return None

    @property
    def locked(self) -> bool:
        return is_locked(self.dir / "lock")

    @property
    def state(self) -> str:
        """reserved, running, stopping, finished, stopped, failed or lost."""
        code, stop = self.exit, (self.dir / "stop").exists()
        if code is None:
            if self.locked:
                return "stopping" if stop else "running"
            return "lost" if (self.dir / "log").exists() else "reserved"
        if code == 0:
            return "stopped" if stop and not self.finished else "finished"
        return "stopped" if stop else "failed"

    @property
    def finished(self) -> bool:
        """Whether the run says that nothing is left to do; of a pipeline, whether its report is there."""
        info = read_json(self.run_dir / "run.json") or {}
        return "final" in info or (self.run_dir / "report.md").exists()

    def describe(self) -> dict[str, Any]:
        """What `ps` shows."""
        about, log = self.about, self.dir / "log"
        ended = (self.dir / "exit").stat().st_mtime if self.exit is not None else None
        return {
            "job": self.name,
            "state": self.state,
            "exit": self.exit,
            "stage": about.get("stage"),
            "run_dir": about.get("run_dir"),
            "started": about.get("started"),
            "ended": ended,
            "now": time.time(),
            "step": _last_step(self.metrics) if about and self.metrics else None,
            "log_bytes": log.stat().st_size if log.exists() else 0,
        }


def names(folders: Folders) -> list[str]:
    """All jobs, the one that was reserved last at the end."""
    found = [path for path in folders.jobs.glob("*") if path.is_dir() and NAME.fullmatch(path.name)]
    return [path.name for path in sorted(found, key=lambda path: (path / "made").stat().st_mtime_ns)]


def find(folders: Folders, name: str | None) -> Job:
    """The job of that name, else the newest one that was started.

    Raises:
        Refused: there is none.
    """
    if name is not None:
        return Job(folders, name)
    started = [job for job in names(folders) if (folders.jobs / job / "job.json").exists()]
    if not started:
        raise Refused("there is no job there yet; start one with: lowrank-rlhf remote run HOST RECIPE")
    return Job(folders, started[-1])


def reserve(folders: Folders, stage: str, run_dir: str | None) -> dict[str, Any]:
    """The first free name STAGE-N, taken from now on; free is what names neither a job nor a run."""
    folders.make()
    for number in range(1, 1_000_000):
        name = f"{stage}-{number}"
        if run_dir is None and (folders.work / "runs" / name).exists():
            continue
        try:
            (folders.jobs / name).mkdir()
        except FileExistsError:
            continue
        write_text(folders.jobs / name / "made", "")
        return {"job": name, "dir": str(folders.jobs / name), "run_dir": run_dir or f"runs/{name}"}
    raise Refused("a million jobs are there; remove some")


def start(folders: Folders, name: str, about: dict[str, Any], files: dict[str, str], secrets: dict[str, str]) -> Any:
    """Start a reserved job; asked again, tell of the one that was started.

    Args:
        about: command (words after the environment's python), run_dir, needs (run directories that are to be there),
            env and stage.
        files: name → text of what is put into the job's folder.
        secrets: variables of the training's environment that are written nowhere.

    Raises:
        Refused: its inputs are not there, or its run directory is taken.
    """
    job = Job(folders, name)
    if (job.dir / "job.json").exists():
        return job.describe()
    for key, path in about["needs"]:
        if not (folders.work / path).exists():
            raise Refused(f"{key}: {path} is neither here nor there")
    for other in [Job(folders, taken) for taken in names(folders)]:
        if other.about.get("run_dir") == about["run_dir"] and other.state in ("running", "stopping"):
            raise Refused(f"run_dir: {other.name} is writing into {about['run_dir']} there; stop it, or choose another")
    run_dir = folders.work / about["run_dir"]
    if run_dir.exists() and any(run_dir.iterdir()) and not about["overwrite"]:
        raise Refused(f"run_dir: {about['run_dir']} is not empty there; choose another, resume its job, or --overwrite")
    for file, text in files.items():
        write_text(job.dir / file, text)
    link_tree(folders.code, job.dir / "code")
    write_json(job.dir / "job.json", {**about, "started": time.time(), "attempts": 1})
    try:
        detach(folders, job.dir, secrets)
    except BaseException:
        (job.dir / "job.json").unlink()
        raise
    return job.describe()


def resume(folders: Folders, name: str | None, secrets: dict[str, str]) -> Any:
    """Go on with a job that ended early, from its run's newest checkpoint.

    Raises:
        Refused: it is running, or nothing is left to do.
    """
    job = find(folders, name)
    state = job.state
    if state in ("running", "stopping", "finished"):
        raise Refused(f"{job.name} is {state}; there is nothing to resume")
    about = job.about
    for left in ("stop", "exit"):
        if (job.dir / left).exists():
            (job.dir / left).unlink()
    goes_on = (job.run_dir / "run.json").exists()
    about.update(attempts=about["attempts"] + 1, resumes=goes_on, started=time.time())
    write_json(job.dir / "job.json", about)
    detach(folders, job.dir, secrets)
    return job.describe()


def stop(folders: Folders, name: str | None, grace: float) -> Any:
    """Ask a job's runner to stop it: SIGTERM, and SIGKILL after `grace` seconds. It does so whoever is connected."""
    job = find(folders, name)
    if job.state == "running":
        write_text(job.dir / "stop", str(time.time() + grace))
        if not is_locked(job.dir / "runner"):  # it was killed, and its training lives on
            os.kill(int((job.dir / "pid").read_text()), signal.SIGTERM)
    return job.describe()


def ps(folders: Folders) -> Any:
    """All jobs that were started, and the watch."""
    jobs = [Job(folders, name) for name in names(folders)]
    watch = folders.root / "watch"
    watching = read_json(watch / "watch.json") if is_locked(watch / "lock") else None
    return {"jobs": [job.describe() for job in jobs if job.about], "watching": watching}


def link_tree(source: Path, target: Path) -> None:
    """The same files under another name: what is pushed later replaces files, so these stay as they are."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=os.link)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def spoken(command: list[str]) -> str:
    """A command as it would be typed."""
    return " ".join(shlex.quote(word) for word in command)


def _last_step(metrics: Path) -> float | None:
    """Of the last whole line of metrics.jsonl."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65536))
            lines = [line for line in file.read().split(b"\n")[:-1] if b'"step"' in line]
    except OSError:
        return None
    found = re.search(rb'"step": ?([0-9.]+)', lines[-1]) if lines else None
    return float(found.group(1)) if found else None
