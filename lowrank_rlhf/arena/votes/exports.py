"""Votes out as training data: one folder of JSONL files that TRL and our own stages read, with a data card."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank_rlhf.arena.votes.card import data_card
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.export_rows import KINDS, Row, Rows
from lowrank_rlhf.arena.votes.records import new_id
from lowrank_rlhf.errors import UserError

CARD, REPORT = "README.md", "export.json"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class ExportReport:
    """What an export holds; also in its export.json.

    Attributes:
        folder: where it is.
        files: rows by file name; a file without rows is not written.
        prompts: distinct first questions by split.
        votes: that gave rows.
        blind: how many of these were given before the names were shown.
        left_out: votes that gave none, by reason.
        annotators: how many voted.
        models: answers judged, by model.
        strengths: votes by strength, 1 to 4.
        reasons: votes by reason.
        dates: of the first and last vote.
        settings: what `export` was called with.
    """

    folder: str
    files: dict[str, int]
    prompts: dict[str, int]
    votes: int
    blind: int
    left_out: dict[str, int]
    annotators: int
    models: dict[str, int]
    strengths: dict[int, int]
    reasons: dict[str, int]
    dates: list[str]
    settings: dict[str, Any]


def export(
    store: Store,
    folder: str | Path,
    *,
    eval_fraction: float = 0.1,
    seed: int = 0,
    blind_only: bool = False,
    names: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write every standing vote as rows of training data; the folder appears whole or not at all.

    Args:
        store: of the votes.
        folder: made; may exist where it is empty or, with `overwrite`, an earlier export.
        eval_fraction: share of prompts on the test side, 0 to below 1. A prompt's side is a property of its first
            question and the seed, so it stays there when more votes come and is the same in every file.
        blind_only: leave out votes that were given with the names in sight.
        names: annotators under their own names, not a1, a2 ….

    Raises:
        UserError: the folder is not free, a value is out of range, or no vote gives a row.
    """
    folder = Path(folder)
    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction: expected a share from 0 to below 1, got {eval_fraction:g}")
    _check_free(folder, overwrite)
    rows = Rows(blind_only=blind_only, names=names)
    made = list(_distinct(row for judged in store.judged() for row in rows.of(judged)))
    if not made:
        why = "".join(f"; {count}: {reason}" for reason, count in rows.left_out.items())
        raise UserError(f"{store.path}: no vote gives training data (vote in the app first{why})")
    held_out = split({row.group for row in made}, eval_fraction, seed)
    sides = {(kind, side): f"{kind}_{side}.jsonl" for kind in KINDS for side in SPLITS}
    files = {
        name: [row.value for row in made if row.kind == kind and (row.group in held_out) == (side == "test")]
        for (kind, side), name in sides.items()
    }
    settings = {"eval_fraction": eval_fraction, "seed": seed, "blind_only": blind_only, "names": names}
    prompts = {"train": len({row.group for row in made} - held_out), "test": len(held_out)}
    counts = {name: len(values) for name, values in files.items() if values}
    report = _report(str(folder), rows, counts, prompts, settings)
    _write(folder, files, report, overwrite)
    return report


def _report(
    folder: str, rows: Rows, files: dict[str, int], prompts: dict[str, int], settings: dict[str, Any]
) -> ExportReport:
    return ExportReport(
        folder=folder,
        files=files,
        prompts=prompts,
        votes=rows.votes,
        blind=rows.blind,
        left_out=dict(rows.left_out),
        annotators=len(rows.annotators),
        models=dict(rows.models),
        strengths=dict(sorted(rows.strengths.items())),
        reasons=dict(rows.reasons),
        dates=rows.dates,
        settings=settings,
    )


def split(groups: set[str], eval_fraction: float, seed: int) -> set[str]:
    """The groups on the test side: those whose hash is in its lowest part, at least one where there are two.

    Neither other groups nor their number change a group's side, except where a side would else be empty.

    >>> split({"a", "b", "c"}, 0.0, seed=0), len(split({"a", "b", "c"}, 0.01, seed=0))
    (set(), 1)
    """
    places = {g: int.from_bytes(hashlib.sha256(f"{seed}:{g}".encode()).digest()[:8], "big") / 2**64 for g in groups}
    held_out = {group for group, place in places.items() if place < eval_fraction}
    if len(groups) > 1 and eval_fraction > 0:
        held_out = held_out or {min(places, key=places.__getitem__)}
        held_out = held_out if held_out != groups else groups - {max(places, key=places.__getitem__)}
    return held_out


def _distinct(rows: Iterable[Row]) -> Iterator[Row]:
    """Prompts once each; of other kinds every row, because two annotators' equal votes are two votes."""
    seen: Counter[str] = Counter()
    for row in rows:
        text = json.dumps(row.value, ensure_ascii=False) if row.kind == "prompts" else ""
        seen[text] += 1
        if row.kind != "prompts" or seen[text] == 1:
            yield row


def _check_free(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: there is a file of this name; choose another")
    if not overwrite:
        raise UserError(f"{folder} is not empty; choose another, or pass --overwrite")
    if not (folder / REPORT).is_file() or not (folder / CARD).is_file():
        raise UserError(f"{folder} is no export (it has no {REPORT}), so it is not deleted; choose another")


def _write(folder: Path, files: dict[str, list[dict[str, Any]]], report: ExportReport, overwrite: bool) -> None:
    texts = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for name, rows in files.items()}
    texts[REPORT] = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    texts[CARD] = data_card(report)
    try:
        with _appearing(folder) as scratch:
            for name, text in texts.items():
                if text:
                    _write_file(scratch / name, text)
            _check_free(folder, overwrite)  # once more: somebody else may have written it meanwhile
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); what was there is as it was") from error


def _write_file(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` whose place it takes when the block ends without an error."""
    mark = new_id()[:8]
    scratch, old = (target.absolute().with_name(f".{target.name}.{mark}.{word}") for word in ("tmp", "old"))
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if target.exists():
            target.rename(old)
        try:
            scratch.rename(target)
        except OSError:
            _put_back(old, target)
            raise
        descriptor = os.open(target.absolute().parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    """
    Raises:
        UserError: somebody else has taken the place meanwhile.
    """
    try:
        if old.exists():
            old.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); what was there is now {old}") from error
