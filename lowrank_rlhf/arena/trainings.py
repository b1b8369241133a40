"""What the trainings under a folder are doing, read from what they write; a broken file is a problem in words."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lowrank_rlhf.arena.chat.files import inside
from lowrank_rlhf.plots import ENTROPY, PLOTS, Curve, Plot, Row, curves_of
from lowrank_rlhf.runs import METRICS, RECIPE, SAMPLES, WARNINGS
from lowrank_rlhf.stability import entropy_per_token

State = Literal["finished", "running", "stopped", "report"]

MARKS = ("run.json", RECIPE, METRICS, "report.md")  # a folder with one of these is shown
MAX_BYTES = 64 * 2**20  # of a log; a longer one is shown from its end
SILENT_SECONDS = 300.0  # without news a training counts as stopped, or ten times its steps' time if that is longer
MAX_PROBLEMS = 5  # told of each file


@dataclass(frozen=True)
class Trained:
    """One run directory.

    Attributes:
        name: its path under the folder of runs: sft, pipeline/ppo.
        info: run.json, {} where there is none that can be read.
        rows: of metrics.jsonl that can be read; every value a number, every row with a finite step.
        problems: what is wrong with its files, in words.
        updated: when it last wrote, seconds since the epoch.
    """

    name: str
    path: Path
    info: dict[str, Any]
    rows: list[Row]
    updated: float
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return str(self.info.get("stage", "report" if not self.rows else "run"))

    @cached_property
    def state(self) -> State:
        if "final" in self.info:
            return "finished"
        if not self.rows and not (self.path / RECIPE).exists():
            return "report"
        paces = sorted(row["seconds"] for row in self.rows[-20:] if "seconds" in row)
        patience = max(SILENT_SECONDS, 10 * paces[len(paces) // 2] if paces else 0)
        return "running" if time.time() - self.updated < patience else "stopped"

    @property
    def step(self) -> int | None:
        return int(self.rows[-1]["step"]) if self.rows else None

    @property
    def max_steps(self) -> int | None:
        train = _group(_group(self.info, "recipe"), "train")
        return train["max_steps"] if isinstance(train.get("max_steps"), int) else None

    @property
    def minutes(self) -> float | None:
        """Of training: as the run recorded them, else since its recipe was written."""
        if isinstance(self.info.get("minutes"), int | float):
            return float(self.info["minutes"])
        started = _written(self.path / RECIPE)
        return None if started is None else max(0.0, self.updated - started) / 60

    @property
    def final(self) -> dict[str, Any]:
        """The metrics it ended with."""
        return _group(self.info, "final")

    def curves(self) -> list[tuple[Plot, dict[str, Curve]]]:
        """The plots of which it has two numbers or more."""
        rows = []
        for row in self.rows:
            entropy = entropy_per_token(row)
            rows.append(row if entropy is None else {**row, ENTROPY: entropy})
        drawn = [(plot, curves_of(plot, rows)) for plot in PLOTS.values()]
        return [(plot, curves) for plot, curves in drawn if curves]

    def samples(self) -> dict[int, list[dict[str, Any]]]:
        """Step → answers shown then, of samples.jsonl."""
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in _rows(self.path / SAMPLES, []):
            if _has_step(_numbers(row)):
                by_step.setdefault(int(row["step"]), []).append(row)
        return by_step

    def warnings(self) -> list[tuple[Any, str]]:
        """(step, words) of what training warned of."""
        found = _rows(self.path / WARNINGS, [])
        return [(row["step"], str(row["warning"])) for row in found if {"step", "warning"} <= row.keys()]

    def text(self, name: str) -> str:
        """A text file of the run, "" where there is none."""
        try:
            with (self.path / name).open(encoding="utf-8", errors="replace") as file:
                return file.read(MAX_BYTES // 64)
        except OSError:
            return ""


def read_runs(folder: Path) -> list[Trained]:
    """Every run directory at FOLDER/* and FOLDER/*/*, the one that wrote last first; links out of it are left out."""
    return sorted((read_run(path, folder) for path in _folders(folder)), key=lambda run: -run.updated)


def read_run(path: Path, folder: Path) -> Trained:
    """One run directory, whatever state its files are in."""
    problems: list[str] = []
    info: dict[str, Any] = {}
    if (path / "run.json").exists():
        try:
            info = _object((path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"run.json: cannot be read ({error})")
    elif (path / METRICS).exists():
        problems.append("run.json: missing; the run was killed while it was made, or the folder was copied in part")
    rows = [row for row in map(_numbers, _rows(path / METRICS, problems)) if _has_step(row)]
    updated = max(_written(path / name) or 0.0 for name in MARKS)
    return Trained(path.relative_to(folder).as_posix(), path, info, rows, updated, problems)


def _folders(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    root = folder.resolve()
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and inside(path, root) and any((path / mark).is_file() for mark in MARKS):
            yield path


def _written(path: Path) -> float | None:
    """When a file was last written, None where there is none; a training may replace or remove it at any moment."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _rows(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file that can be read; of the others the first few become problems."""
    try:
        with path.open("rb") as file:
            cut = max(0, path.stat().st_size - MAX_BYTES)
            file.seek(cut)
            lines = file.read(MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
        return
    if lines and lines[-1] and not lines[-1].endswith(b"}"):
        lines.pop()  # being written at this moment
    broken = 0
    for number, line in enumerate(lines, start=1):
        if line.strip() and not (cut and number == 1):
            try:
                yield _object(line)
            except ValueError:
                broken += 1
                if broken <= MAX_PROBLEMS:
                    problems.append(f"{path.name}, line {number}: not a JSON object; it is left out of what is shown")
    if broken > MAX_PROBLEMS:
        problems.append(f"{path.name}: {broken - MAX_PROBLEMS} more lines like these")


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _numbers(row: dict[str, Any]) -> Row:
    """The numbers of a row; one too large for a float is infinite.

    >>> _numbers({"step": 3, "loss": 0.5, "note": "x", "on": True})
    {'step': 3, 'loss': 0.5}
    """
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and value is not True}
    return {key: value if abs(value) < 1e300 or value != value else math.inf for key, value in numbers.items()}


def _has_step(row: Row) -> bool:
    """
    >>> [_has_step(row) for row in ({"step": 3}, {"step": math.nan}, {"step": math.inf}, {"loss": 0.5})]
    [True, False, False, False]
    """
    return math.isfinite(row.get("step", math.nan))


def _group(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}
