"""A job's log or metrics as they grow, from where the one who asks has read already."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Callable
from pathlib import Path

from lowrank_rlhf.remote.there.folders import SILENCE, Folders, Refused, tell
from lowrank_rlhf.remote.there.jobs import Job, find

SECONDS = 0.3  # between two looks
CHUNK = 256 * 1024


def log(folders: Folders, name: str | None, offset: int, until_end: bool) -> None:
    """{"job": its name}, {"text", "offset"} of the log from byte `offset` on, and at the end {"end": the job}."""
    job, decoder = find(folders, name), codecs.getincrementaldecoder("utf-8")("replace")
    tell(job=job.name)

    def text(data: bytes, at: int) -> None:
        said = decoder.decode(data)
        half, _ = decoder.getstate()  # of a character whose rest is still to come
        tell(text=said, offset=at - len(half))

    _follow(job, job.dir / "log", offset, until_end, text)


def metrics(folders: Folders, name: str | None, offset: int, until_end: bool) -> None:
    """First {"job", "run"}, what run.json holds, then {"rows", "offset"} of metrics.jsonl, at last {"end": the job}.

    A run that is resumed cuts its metrics back to its checkpoint: {"offset": 0, "rows": []} says to begin anew.
    """
    job = find(folders, name)
    while until_end and job.metrics is None and job.state in ("running", "stopping"):
        time.sleep(SECONDS)
        tell()
    path = job.metrics
    if path is None:
        raise Refused(f"{job.name} has no metrics yet; see its log")
    tell(job=job.name, run=json.loads(path.with_name("run.json").read_text(encoding="utf-8")))
    rest = b""

    def rows(data: bytes, at: int) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        tell(rows=[json.loads(line) for line in lines if line], offset=at - len(rest))

    _follow(job, path, offset, until_end, rows)


def _follow(job: Job, path: Path, offset: int, until_end: bool, send: Callable[[bytes, int], None]) -> None:
    heard = time.monotonic()
    while True:
        state = job.state  # before reading: what was written until the end is read after it is seen
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            offset = 0
            send(b"", 0)
        if size > offset:
            with path.open("rb") as source:
                source.seek(offset)
                data = source.read(CHUNK)
            offset += len(data)
            send(data, offset)
            heard = time.monotonic()
            continue
        if not until_end or state not in ("running", "stopping"):
            tell(end=job.describe())
            return
        if time.monotonic() - heard > SILENCE:
            heard = time.monotonic()
            tell()
        time.sleep(SECONDS)
