"""What is fetched of a run: names, sizes and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Any

from lowrank_rlhf.remote.there.folders import Folders, Refused
from lowrank_rlhf.remote.there.jobs import find

GROWING = ".jsonl"  # appended to while the run goes on: fetched up to the size that was told
VOTES = "votes.db"


def manifest(folders: Folders, name: str | None, checkpoints: bool) -> Any:
    """The files of a job's run: {"files": [[path, bytes, SHA-256], …], "from": folder, "job"}; never a base model.

    Raises:
        Refused: the run has written nothing yet.
    """
    job = find(folders, name)
    root = job.run_dir
    files = []
    for folder, below, here in os.walk(str(root)):
        left_out = () if checkpoints else ("checkpoints",)
        below[:] = sorted(entry for entry in below if not entry.startswith(".") and entry not in left_out)
        for entry in sorted(here):
            path = Path(folder, entry)
            if not entry.startswith(".") and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # it was there a moment ago
                    files.append([str(path.relative_to(root)), *_hashed(path)])
    if not files:
        raise Refused(f"{job.name} has written nothing yet; see its log")
    link = job.dir / "run"
    if not link.is_symlink():
        link.symlink_to(root)
    place = f"jobs/{job.name}/run"  # a name that any shell leaves alone, whatever the run directory's is
    return {"files": files, "from": place, "run_dir": job.about["run_dir"], "job": job.describe()}


def votes(folders: Folders) -> Any:
    """A copy of the app's votes, whole whatever is being written: its file, bytes and SHA-256.

    Raises:
        Refused: there are none.
    """
    store = folders.work / VOTES
    if not store.exists():
        raise Refused(f"there are no votes there ({store}); they begin with: lowrank-rlhf remote ui HOST")
    folder = folders.work / ".votes"
    folder.mkdir(exist_ok=True)
    copy = folder / VOTES
    if copy.exists():
        copy.unlink()
    source, target = sqlite3.connect(str(store)), sqlite3.connect(str(copy))
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()
    return {"files": [[VOTES, *_hashed(copy)]], "from": "work/.votes"}


def _hashed(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; of one that grows, of its whole lines by now."""
    data = hashlib.sha256()
    size = path.stat().st_size
    if path.suffix == GROWING:
        text = path.read_bytes()[:size]
        whole = text[: text.rfind(b"\n") + 1]
        return len(whole), hashlib.sha256(whole).hexdigest()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            data.update(chunk)
    return size, data.hexdigest()
