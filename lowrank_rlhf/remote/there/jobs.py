"""Jobs: one detached process each, whose folder says all there is to know about it.

A lock on jobs/NAME/lock is held by the job's runner and its training for as long as either lives, whatever becomes of
process numbers, and one on jobs/NAME/runner by the runner alone; `exit` appears, by rename, when the training has
ended.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from lowrank_rlhf.remote.there.folders import Folders, Refused, is_locked, read_json, take, write_json, write_text
from lowrank_rlhf.remote.there.runner import detach, end_orphan

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Job:
    """A job's folder."""

    def __init__(self, folders: Folders, name: str):
        self.folders, self.name = folders, name
        self.dir = folders.jobs / name

    @property
    def about(self) -> dict[str, Any]:
        return dict(read_json(self.dir / "job.json") or {})

    @property
    def begun_at(self) -> float | None:
        """When the training was started last; None where it has not been."""
        return self.about.get("started") if (self.dir / "log").exists() else None

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
        """reserved, running, stopping, finished, stopped, killed (by a stop), failed or lost."""
        locked = self.locked  # before `exit`, which is written while it is locked
        code, stop = self.exit, (self.dir / "stop").exists()
        if code is None:
            if locked:
                return "stopping" if stop else "running"
            if stop:
                return "stopped"
            return "lost" if (self.dir / "log").exists() else "reserved"
        if code == 0:
            return "stopped" if stop and not self.finished else "finished"
        if stop and code == -signal.SIGKILL:
            return "killed"
        return "stopped" if stop or code == 128 + signal.SIGTERM else "failed"

    @property
    def finished(self) -> bool:
        """Whether the run says that nothing is left to do; of a pipeline, whether it has made its report."""
        return self.has_made("report.md") or (self.begun and "final" in read_json(self.run_dir / "run.json"))

    @property
    def begun(self) -> bool:
        """Whether the run there is this job's, and no earlier one's that it was to overwrite."""
        return self.has_made("recipe.yaml") and (self.run_dir / "run.json").exists()

    def has_made(self, file: str) -> bool:
        """Whether a file of its run directory is younger than the job."""
        try:
            return (self.run_dir / file).stat().st_mtime_ns >= (self.dir / "made").stat().st_mtime_ns
        except FileNotFoundError:
            return False

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
            "log_from": about.get("log_from", 0),  # where the last resume began
        }


def names(folders: Folders) -> list[str]:
    """All jobs, the one that was reserved last at the end."""
    found = [path for path in folders.jobs.glob("*") if (path / "made").is_file() and NAME.fullmatch(path.name)]
    return [path.name for path in sorted(found, key=lambda path: (path / "made").stat().st_mtime_ns)]


def find(folders: Folders, name: str | None) -> Job:
    """The job of that name, else the newest one that was started.

    Raises:
        Refused: there is none.
    """
    started = [job for job in names(folders) if (folders.jobs / job / "job.json").exists()]
    if name is not None and name not in started:
        raise Refused(f"there is no job {name!r} there; jobs: {', '.join(started) or 'none'}")
    if not started:
        raise Refused("there is no job there yet; start one with: lowrank-rlhf remote run HOST RECIPE")
    return Job(folders, name or started[-1])


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
    lock = take(job.dir / "lock")
    if lock is None or job.begun_at is not None:
        return _started(job)
    for key, path in about["needs"]:
        if not (folders.work / path).exists():
            raise Refused(f"{key}: {path} is neither here nor there")
    _check_free(folders, job, about["run_dir"])
    run_dir = folders.work / about["run_dir"]
    if run_dir.exists() and any(run_dir.iterdir()) and not about["overwrite"]:
        raise Refused(f"run_dir: {about['run_dir']} is not empty there; choose another, resume its job, or --overwrite")
    for file, text in files.items():
        write_text(job.dir / file, text)
    link_tree(folders.code, job.dir / "code")
    write_json(job.dir / "job.json", {**about, "started": time.time(), "attempts": 1})
    try:
        detach(folders, job.dir, secrets, lock)
    except BaseException:
        (job.dir / "job.json").unlink()
        raise
    return job.describe()


def _started(job: Job) -> Any:
    """A job that was started by a request whose answer did not arrive; that request may still be at it."""
    deadline = time.monotonic() + 30
    while job.begun_at is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if job.begun_at is None:
        raise Refused(f"{job.name} has not begun; ask again")
    return job.describe()


def _check_free(folders: Folders, job: Job, run_dir: str) -> None:
    """
    Raises:
        Refused: another job is writing into the same run directory.
    """
    for other in [Job(folders, taken) for taken in names(folders) if taken != job.name]:
        if other.about.get("run_dir") == run_dir and other.state in ("running", "stopping"):
            raise Refused(f"run_dir: {other.name} is writing into {run_dir} there; stop it, or choose another")


def resume(folders: Folders, name: str | None, secrets: dict[str, str], token: str) -> Any:
    """Go on with a job that ended early, from its run's newest checkpoint.

    Args:
        token: of this request; asked again with the same one, tell of the job that goes on.

    Raises:
        Refused: it is running, nothing is left to do, or its run directory is another job's by now.
    """
    job = find(folders, name)
    about, state = job.about, job.state
    if about.get("token") == token:
        return job.describe()
    if state in ("running", "stopping", "finished"):
        raise Refused(f"{job.name} is {state}; there is nothing to resume")
    _check_free(folders, job, about["run_dir"])
    later = names(folders)[names(folders).index(job.name) + 1 :]
    taken = [other for other in later if Job(folders, other).about.get("run_dir") == about["run_dir"]]
    if taken:
        raise Refused(f"{job.name}: {about['run_dir']} is that of {taken[-1]} by now")
    lock = take(job.dir / "lock")
    if lock is None:
        raise Refused(f"{job.name} is running; there is nothing to resume")
    about.update(attempts=about["attempts"] + 1, resumes=job.begun, started=time.time(), token=token)
    about["log_from"] = job.describe()["log_bytes"]
    write_json(job.dir / "job.json", about)
    for left in ("stop", "exit"):
        if (job.dir / left).exists():
            (job.dir / left).unlink()
    detach(folders, job.dir, secrets, lock)
    return job.describe()


def stop(folders: Folders, name: str | None, grace: float) -> Any:
    """Ask a job's runner to stop it: SIGTERM, and SIGKILL after `grace` seconds. It does so whoever is connected.

    Asked again, the seconds begin anew.
    """
    job = find(folders, name)
    if job.state in ("running", "stopping"):
        write_text(job.dir / "stop", str(time.time() + grace))
        if not is_locked(job.dir / "runner"):  # it was killed, and its training lives on
            end_orphan(job.dir)
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
    shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns(".*"))  # rsync's half files


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
