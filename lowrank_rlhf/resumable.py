"""A file of rows that a kill leaves whole: what its rows are made with stands beside it, and whole batches stay.

OUT            one JSON object a line, in the order of its source, appended batch by batch
OUT.meta.json  what the rows are made with; going on with anything else is refused
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import write_atomic

T = TypeVar("T")


def meta_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.meta.json")


def record_meta(out: Path, meta: dict[str, Any]) -> None:
    """Say beside `out` what its rows are made with, before there is a row."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(meta_path(out), json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def refuse_other(out: Path, meta: dict[str, Any], *, rows: str) -> None:
    """Nothing is added to a file whose rows another model or other values gave.

    Args:
        rows: what the file holds, for the message: `samples`, `scores`.

    Raises:
        UserError: `out` exists and was made with something else, or does not say with what.
    """
    if not out.exists():
        return
    try:
        recorded = dict(json.loads(meta_path(out).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        message = f"{out}: exists, with no readable {meta_path(out).name} beside it; choose another --out"
        raise UserError(message) from error
    for key, value in meta.items():
        if recorded.get(key) != value:
            was = f"{key} was {recorded.get(key)!r} and is now {value!r}"
            raise UserError(f"{out}: holds other {rows} ({was}); give the same as then, or another --out")


def keep_whole_batches(
    out: Path, source: Iterable[T], total: int, batch_rows: int, is_row_of: Callable[[bytes, T], bool]
) -> int:
    """How many rows of `out` stay. The rows of a half-written batch are cut off; made again, they are the same.

    Args:
        source: what the rows are made from, in order; read only as far as `out` goes.
        total: how many there are.
        batch_rows: rows of a batch; the last batch may have fewer.
        is_row_of: whether a line was made from an item of the source.

    Raises:
        UserError: a row is not the one that was written.
    """
    if not out.exists():
        return 0
    items = iter(source)
    done = kept_bytes = seen_bytes = 0
    with out.open("rb+") as file:
        for row, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            if row > total or not is_row_of(line, next(items)):
                raise UserError(f"{out}, row {row}: was changed since it was written; choose another --out")
            seen_bytes += len(line)
            if row == total or row % batch_rows == 0:
                done, kept_bytes = row, seen_bytes
        file.truncate(kept_bytes)
    return done


def append_batch(file: BinaryIO, lines: Iterable[bytes]) -> None:
    """Write a batch so that it outlives whatever happens next."""
    file.write(b"".join(lines))
    file.flush()
    os.fsync(file.fileno())
