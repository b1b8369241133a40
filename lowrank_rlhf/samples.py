"""The file that sampling writes and goes on with: what it was sampled with, and which of its rows stay."""

import json
from pathlib import Path
from typing import Any

from lowrank_rlhf.data import Example, read_examples
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import write_atomic

COLUMNS = ("responses", "temperatures", "seed", "ended")


def read_prompts(path: str) -> list[Example]:
    """The rows of a prompts file.

    Raises:
        UserError: a row does not fit, or has a column that sampling writes.
    """
    examples = read_examples(path)
    for example in examples:
        if taken := example.columns.keys() & set(COLUMNS):
            raise UserError(f"{example.where}: sampling writes a column {min(taken)!r} itself; rename or drop this one")
    return examples


def row_line(example: Example, responses: list[str], temperatures: list[float], seed: int, ended: list[bool]) -> bytes:
    """One row of the file: the prompt, its answers, and the other columns of the prompt's row."""
    row = {
        "prompt": prompt_value(example),
        "responses": responses,
        "temperatures": temperatures,
        "seed": seed,
        "ended": ended,
        **example.columns,
    }
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def meta_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.meta.json")


def record_meta(out: Path, meta: dict[str, Any]) -> None:
    """Say beside `out` what its rows are sampled with, before there is a row."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(meta_path(out), json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def refuse_other(out: Path, meta: dict[str, Any]) -> None:
    """Nothing is added to a file whose rows another model or other values gave.

    Raises:
        UserError: `out` exists and was sampled with something else, or does not say with what.
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
            raise UserError(f"{out}: holds other samples ({was}); give the same as then, or another --out")


def keep_whole_batches(out: Path, examples: list[Example], batch_prompts: int) -> int:
    """How many rows of `out` stay. The rows of a half-written batch are cut off; sampled again, they are the same.

    Raises:
        UserError: a row is not the one that was written.
    """
    if not out.exists():
        return 0
    ends = [0]
    with out.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            row = len(ends)
            if row > len(examples) or not _answers(line, examples[row - 1]):
                raise UserError(f"{out}, row {row}: was changed since it was sampled; choose another --out")
            ends.append(ends[-1] + len(line))
        rows = len(ends) - 1
        done = rows if rows == len(examples) else rows - rows % batch_prompts
        file.truncate(ends[done])
    return done


def prompt_value(example: Example) -> Any:
    """The prompt as a row holds it: text where it is one user turn, else its messages."""
    first, *others = example.prompt
    return first["content"] if not others and first["role"] == "user" else example.prompt


def _answers(line: bytes, example: Example) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("prompt") == prompt_value(example)
