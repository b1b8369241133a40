"""Rows of the common file formats into one shape: a prompt and, where the row has them, its answers.

Detected from the columns: Alpaca (`instruction`/`input`/`output`), `prompt`/`completion`, `prompt`/`chosen`/`rejected`
(strings or messages), HH-RLHF (`chosen`/`rejected` dialogues whose common start is the prompt), and `prompt` alone.
"""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_rlhf.errors import UserError

Messages = list[dict[str, str]]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One row. `chosen` is the demonstration of a demonstration row; the turns that answer the prompt.

    `where` names file and row for error messages; `columns` holds the row's other columns, for reward functions.
    """

    where: str
    prompt: Messages
    chosen: Messages | None = None
    rejected: Messages | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_key(self) -> str:
        """Two rows with the same key have the same prompt: they never stand on both sides of a split."""
        return json.dumps(self.prompt, ensure_ascii=False, sort_keys=True)


def read_examples(path: str | Path, format: str | None = None, max_rows: int | None = None) -> list[Example]:
    """Every row of a file, parsed.

    Args:
        path: `.json` (a list) or `.jsonl`, also with `.gz`.
        format: a name in `FORMATS`; None detects it from the first row's columns.
        max_rows: read no further than this many rows.

    Raises:
        UserError: the file, or the first row that does not fit, with what was expected.
    """
    examples: list[Example] = []
    parse: Callable[[dict[str, Any], str], Example] | None = None
    for where, row in itertools.islice(_rows(Path(path)), max_rows):
        if parse is None:
            parse = FORMATS[format or detect_format(row, where)] if format in (None, *FORMATS) else None
            if parse is None:
                raise UserError(f"data.format: {format!r} is not known; there are: {', '.join(FORMATS)}")
        examples.append(parse(row, where))
    if not examples:
        raise UserError(f"{path}: the file has no rows")
    return examples


def detect_format(row: dict[str, Any], where: str) -> str:
    """The format of a row by its columns.

    >>> detect_format({"instruction": "Say hi.", "input": "", "output": "Hi."}, "demo")
    'alpaca'
    """
    columns = set(row)
    for name, needed in COLUMNS.items():
        if needed <= columns:
            return name
    known = "; ".join(f"{name}: {'/'.join(sorted(needed))}" for name, needed in COLUMNS.items())
    raise UserError(f"{where}: columns {sorted(columns)} fit no known format ({known}); rename them")


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix not in ("json", "jsonl"):
        raise UserError(f"{path}: expected a .json or .jsonl file (or one with .gz)")
    try:
        if suffix == "json":
            with _open(path) as file:
                rows = json.load(file)
            if not isinstance(rows, list):
                raise UserError(f"{path}: a .json file must hold a list of rows; one row a line is .jsonl")
            yield from ((f"{path}, row {i}", _mapping(row, f"{path}, row {i}")) for i, row in enumerate(rows, start=1))
            return
        with _open(path) as file:
            for i, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, row {i}", _mapping(_json_line(line, f"{path}, row {i}"), f"{path}, row {i}")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> Any:
    # -sig: some editors put a byte-order mark in front
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def _json_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with named columns, got {type(row).__name__}")
    return row


def _text(row: dict[str, Any], column: str, where: str, *, empty: bool = False) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where}: column {column!r}: expected text, got {got}")
    if not empty and not value.strip():
        raise UserError(f"{where}: column {column!r} is empty")
    return value


def _messages(row: dict[str, Any], column: str, where: str, role: str, *, empty: bool = False) -> Messages:
    """A column that is either plain text, said by `role`, or a list of chat messages."""
    value = row.get(column)
    if not isinstance(value, list):
        return [{"role": role, "content": _text(row, column, where, empty=empty)}]
    for i, message in enumerate(value):
        fits = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not fits:
            raise UserError(
                f"{where}: column {column!r}, message {i + 1}: expected {{'role': one of {', '.join(ROLES)}, "
                f"'content': text}}, got {message!r:.80}"
            )
    if not value:
        raise UserError(f"{where}: column {column!r} is an empty list of messages")
    if role == "user" and not value[-1]["content"].strip():
        raise UserError(f"{where}: column {column!r} is empty: its last message says nothing")
    if role == "assistant" and value[-1]["role"] != "assistant":
        raise UserError(f"{where}: column {column!r}: expected an answer that ends with the assistant's message")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _others(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}


def _alpaca(row: dict[str, Any], where: str) -> Example:
    instruction = _text(row, "instruction", where)
    context = _text(row, "input", where, empty=True) if row.get("input") is not None else ""
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    answer = _messages(row, "output", where, "assistant")
    columns = _others(row, "instruction", "input", "output")
    return Example(where, [{"role": "user", "content": prompt}], answer, columns=columns)


def _completion(row: dict[str, Any], where: str) -> Example:
    prompt = _messages(row, "prompt", where, "user")
    return Example(
        where, prompt, _messages(row, "completion", where, "assistant"), columns=_others(row, "prompt", "completion")
    )


def _preference(row: dict[str, Any], where: str) -> Example:
    prompt = _messages(row, "prompt", where, "user")
    chosen = _answer(_messages(row, "chosen", where, "assistant", empty=True), prompt)
    rejected = _answer(_messages(row, "rejected", where, "assistant", empty=True), prompt)
    return Example(where, prompt, chosen, rejected, _others(row, "prompt", "chosen", "rejected"))


def _answer(messages: Messages, prompt: Messages) -> Messages:
    """Message-form rows often repeat the prompt in front of the answer."""
    return messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages


def _hh(row: dict[str, Any], where: str) -> Example:
    chosen = _dialogue(_text(row, "chosen", where), "chosen", where)
    rejected = _dialogue(_text(row, "rejected", where), "rejected", where)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    # The prompt ends with the human's turn; where the two answers are equal, the last answer is what is compared.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if shared == 0:
        raise UserError(f"{where}: the chosen and rejected dialogues do not begin with the same human turn")
    return Example(where, chosen[:shared], chosen[shared:], rejected[shared:], _others(row, "chosen", "rejected"))


def _dialogue(text: str, column: str, where: str) -> Messages:
    """'\\n\\nHuman: … \\n\\nAssistant: …' into messages."""
    lead, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if lead.strip() or not parts:
        raise UserError(
            f"{where}: column {column!r}: expected an HH-RLHF dialogue ('\\n\\nHuman: …\\n\\nAssistant: …'); "
            "plain answers need a 'prompt' column beside them"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _prompt(row: dict[str, Any], where: str) -> Example:
    return Example(where, _messages(row, "prompt", where, "user"), columns=_others(row, "prompt"))


FORMATS: dict[str, Callable[[dict[str, Any], str], Example]] = {
    "alpaca": _alpaca,
    "completion": _completion,
    "preference": _preference,
    "hh": _hh,
    "prompt": _prompt,
}
COLUMNS = {
    "alpaca": {"instruction", "output"},
    "completion": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "hh": {"chosen", "rejected"},
    "prompt": {"prompt"},
}
