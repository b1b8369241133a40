"""The folder of an export: it appears whole, by one rename, after every byte is on disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_rlhf.checkpoints import fsync
from lowrank_rlhf.errors import UserError

REPORT = "export.json"


def check_free(target: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: something stands there, and `overwrite` is off or it is not an export.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"--to: {target} is not empty; choose another, or pass --overwrite")
    if not (target / REPORT).is_file():
        raise UserError(f"--to: {target} has no {REPORT}, so it is not an export and is not deleted; choose another")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A scratch folder to fill beside `target`, whose place it takes when the block ends without an error."""
    scratch, old = (target.absolute().with_name(f".{target.name}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            fsync(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        scratch.rename(target)
        fsync(scratch.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
