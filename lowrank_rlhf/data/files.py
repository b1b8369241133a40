"""A source into rows: JSON, JSONL, CSV (each also .gz), Parquet, or a hub dataset. One row in memory at a time.

Only `.json` is read whole, because a list has to be closed to be valid; use `.jsonl` for large files.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank_rlhf.data.fields import Row
from lowrank_rlhf.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>\w+(\[[\w:%]*\])?))?")


def read_rows(source: str) -> Iterator[tuple[str, Row | UserError]]:
    """(`FILE, row N`, row) from 1 on; a row that is broken by itself comes as the error, so that it can be skipped.

    Args:
        source: a file with one of `SUFFIXES`, or a hub dataset `owner/name`, `owner/name/config`, `owner/name/folder`,
            each also with `:split` (`openai/gsm8k/main:test[:100]`).

    Raises:
        UserError: the source as a whole cannot be read.
    """
    name = source.lower()
    readers = {".jsonl": _jsonl, ".csv": _csv, ".json": _json, ".parquet": _parquet}
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in readers and name.endswith(SUFFIXES):
        with _readable(source):
            yield from readers[suffix](Path(source))
    elif HUB_ID.fullmatch(source) and not Path(source).exists():
        yield from _numbered(source, iter(load_hub(source)))
    else:
        raise UserError(
            f"{source}: expected a file ending in {', '.join(SUFFIXES)}, or a hub dataset owner/name[/config][:split]"
        )


def source_hash(source: str) -> str:
    """SHA-256 of a file's bytes, or of a hub dataset's rows."""
    if Path(source).is_file():
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for row in load_hub(source):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Whatever goes wrong with the file itself, as one message that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _numbered(source: str | Path, rows: Iterator[Any]) -> Iterator[tuple[str, Row | UserError]]:
    return ((where, _mapping(row, where)) for i, row in enumerate(rows, start=1) for where in (f"{source}, row {i}",))


def _mapping(row: Any, where: str) -> Row | UserError:
    if isinstance(row, dict):
        return row
    return UserError(f"{where}: expected an object with named columns, got {type(row).__name__}")


def _jsonl(path: Path) -> Iterator[tuple[str, Row | UserError]]:
    """Bytes are split before they are decoded, so that one bad line is one bad row."""
    with _open(path) as file:
        for i, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {i}"
            try:
                yield where, _mapping(json.loads(line.decode("utf-8-sig" if i == 1 else "utf-8")), where)
            except json.JSONDecodeError as error:
                yield where, UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
            except UnicodeDecodeError as error:
                yield (
                    where,
                    UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8"),
                )
            except (ValueError, RecursionError) as error:  # an integer of 5000 digits, or [[[[…
                yield where, UserError(f"{where}: not usable JSON: {str(error)[:80]}")


def _json(path: Path) -> Iterator[tuple[str, Row | UserError]]:
    with _open(path) as file:
        content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; one row a line is .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}{hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start + 1}, in line "
            f"{content.count(10, 0, error.start) + 1}); save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not usable JSON: {str(error)[:80]}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold a list of rows; one row a line is .jsonl")
    del content
    yield from _numbered(path, iter(rows))


def _csv(path: Path) -> Iterator[tuple[str, Row | UserError]]:
    """Rows are numbered from 1 below the header; a quoted text may go over several lines."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KiB a cell
    # surrogateescape: a byte that is not UTF-8 becomes a character that check_text refuses with row and column
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = _csv_header(path, reader)
        for i in itertools.count(1):
            where = f"{path}, row {i}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{where}: not valid CSV near line {reader.line_num}: {error}") from error
            if cells is None:
                return
            if cells and len(cells) != len(header):
                yield where, UserError(f"{where}: expected {len(header)} cells as in the header, got {len(cells)}")
            elif cells:
                yield where, dict(zip(header, cells, strict=True))


def _csv_header(path: Path, reader: Any) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise UserError(f"{path}, line 1: not valid CSV: {error}") from error
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path}, line 1: the header has the column {name!r:.40} twice; rename one")
    return header


def _parquet(path: Path) -> Iterator[tuple[str, Row | UserError]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from _numbered(path, batches)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0][:200]}") from error


def load_hub(source: str) -> Any:
    """A hub dataset, downloaded once and memory-mapped; without a split, `train`.

    Raises:
        UserError: there is no such dataset, configuration, folder or split, or the hub cannot be reached.
    """
    import datasets
    import huggingface_hub.errors

    match = HUB_ID.fullmatch(source)
    if match is None:
        raise UserError(f"{source}: no such file")
    errors = (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        huggingface_hub.errors.HfHubHTTPError,
    )
    name, part, split = match["name"], match["config"], match["split"] or "train"
    try:
        return datasets.load_dataset(name, part, split=split)
    except errors as error:
        problem = error
    if part is not None and isinstance(problem, ValueError):
        # Some repositories keep their parts in folders that are no configurations, as HH-RLHF its helpful-base
        try:
            return datasets.load_dataset(name, data_dir=part, split=split)
        except ValueError as error:  # the folder is there, the split is not
            problem = error
        except errors:
            pass
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]
    raise UserError(
        f"{source}: there is no such file, and no hub dataset of that name could be loaded: {reason}"
    ) from problem
