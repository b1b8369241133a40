"""Which format a row has, by its columns, and a source's rows as examples, bad rows told or skipped."""

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank_rlhf.config import Data
from lowrank_rlhf.data import demonstrations as d
from lowrank_rlhf.data import preferences as p
from lowrank_rlhf.data.examples import Example, Reading
from lowrank_rlhf.data.fields import Row, short
from lowrank_rlhf.data.files import read_rows
from lowrank_rlhf.errors import UserError

KEPT_REASONS = 5


@dataclass(frozen=True)
class Format:
    """How a format is recognised and read.

    Attributes:
        columns: what a row must have to be detected as this format.
        parse: a row as one example: its best answer, where it has several.
        optional: further columns that `parse` reads.
        pairs: a row as comparisons, where that is not `parse` itself.
    """

    columns: tuple[str, ...]
    parse: Callable[[Row, str], Example]
    optional: tuple[str, ...] = ()
    pairs: Callable[[Row, str], list[Example]] | None = None


# The first whose columns a row has is its format, so the ones that need most stand first.
FORMATS: dict[str, Format] = {
    "sharegpt_preference": Format(
        ("conversations", "chosen", "rejected"), p.from_sharegpt_preference, ("system", "margin")
    ),
    "preference": Format(("prompt", "chosen", "rejected"), p.from_preference, ("margin",)),
    "winner_loser": Format(("prompt", "winner", "loser"), p.from_winner_loser, ("margin",)),
    "labelled_pair": Format(
        ("prompt", "response_a", "response_b", "preferred_response"), p.from_labelled_pair, ("margin",)
    ),
    "ranking": Format(("prompt", "responses", "ranking"), p.best_of_ranked, pairs=p.ranked_pairs),
    "hh": Format(("chosen", "rejected"), p.from_hh, ("margin",)),
    "oasst": Format(("prompt",), d.from_oasst, pairs=p.oasst_pairs),
    "messages": Format(("messages",), d.from_messages),
    "sharegpt": Format(("conversations",), d.from_sharegpt, ("system",)),
    "flan": Format(("inputs", "targets"), d.from_flan),
    "alpaca": Format(("instruction", "output"), d.from_alpaca, ("input", "context")),
    "instruction": Format(("instruction", "response"), d.from_instruction, ("input", "context")),
    "unpaired": Format(("prompt", "completion", "label"), p.from_unpaired),
    "completion": Format(("prompt", "completion"), d.from_completion),
    "prompt": Format(("prompt",), d.from_prompt),
}
KNOWN_COLUMNS = sorted({c for f in FORMATS.values() for c in (*f.columns, *f.optional)} | {"answer"})


def detect_format(row: Row, where: str) -> str:
    """The format of a row by its columns.

    Raises:
        UserError: there is none.

    >>> detect_format({"instruction": "Say hi.", "input": "", "output": "Hi."}, "demo")
    'alpaca'
    """
    for name, format in FORMATS.items():
        # Only an OASST row's prompt is a tree
        if set(format.columns) <= set(row) and (name != "oasst" or isinstance(row["prompt"], dict)):
            return name
    known = "; ".join(f"{name}: {'/'.join(format.columns)}" for name, format in FORMATS.items())
    raise UserError(
        f"{where}: columns {short(sorted(map(str, row)))} fit no known format ({known}); name them with data.columns"
    )


def read_examples(path: str | Path, format: str | None = None, max_rows: int | None = None) -> list[Example]:
    """Every row of a source, parsed; a ranked row is its best answer.

    Raises:
        UserError: the source, or the first row that does not fit, with what was expected.
    """
    data = Data(train=str(path), format=format, max_rows=max_rows)
    return list(stream_examples(data, Reading(data.train)))


def stream_examples(
    data: Data,
    reading: Reading,
    *,
    pairs: bool = False,
    check: Callable[[Example], None] = lambda example: None,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = lambda rows: rows,
) -> Iterator[Example]:
    """Examples of the source `reading` names, one row in memory at a time; counts into `reading`.

    Args:
        data: the recipe's data group; its train and eval keys are not looked at.
        reading: what was read so far, kept up to date.
        pairs: comparisons rather than the best answer of each row.
        check: raises UserError for an example the stage cannot use.
        watch: wraps the rows, for a progress bar.

    Raises:
        UserError: a row that does not fit, unless `data.on_bad_row` is skip; or none fits; or the source is bad.
    """
    check_settings(data)
    for where, row in watch(itertools.islice(read_rows(reading.source), data.max_rows)):
        reading.rows += 1
        try:
            if isinstance(row, UserError):
                raise row
            examples = _examples(data, reading, row, where, pairs)
            for example in examples:
                check(example)
        except UserError as error:
            if data.on_bad_row == "error":
                raise
            reading.skipped += 1
            if len(reading.reasons) < KEPT_REASONS:
                reading.reasons.append(str(error).removeprefix(f"{reading.source}, "))
            continue
        yield from examples
    if reading.rows == 0:
        raise UserError(f"{reading.source}: the file has no rows")
    if reading.skipped == reading.rows:
        raise UserError(f"{reading.source}: none of its {reading.rows} rows fits; the first: {reading.reasons[0]}")


def _examples(data: Data, reading: Reading, row: Row, where: str, pairs: bool) -> list[Example]:
    renamed = _rename(row, data.columns, where)
    if not reading.format:
        reading.format = data.format or detect_format(renamed, where)
        reading.columns = [str(name) for name in renamed]
    format = FORMATS[reading.format]
    several = format.pairs if pairs else None
    examples = several(renamed, where) if several is not None else [format.parse(renamed, where)]
    # A reward function finds a renamed column under its own name too
    originals = {theirs: row[theirs] for theirs in data.columns.values()}
    return [replace(e, columns={**originals, **e.columns}) for e in examples] if originals else examples


def _rename(row: Row, columns: dict[str, str], where: str) -> Row:
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UserError(
                f"{where}: there is no column {theirs!r}, which data.columns.{ours} names; "
                f"its columns: {short(sorted(map(str, row)))}"
            )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


def check_settings(data: Data) -> None:
    """Refuse a format or a column that does not exist.

    Raises:
        UserError: it names the key.
    """
    if data.format is not None and data.format not in FORMATS:
        raise UserError(f"data.format: {data.format!r} is not known; there are: {', '.join(FORMATS)}")
    for ours in data.columns:
        if ours not in KNOWN_COLUMNS:
            close = difflib.get_close_matches(ours, KNOWN_COLUMNS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(KNOWN_COLUMNS)}"
            raise UserError(f"data.columns.{ours}: no format has this column; {hint} (write ours: theirs)")
