"""Values of a row's columns, checked: texts, messages and numbers, or what is wrong and what was expected."""

import contextlib
import json
import math
from typing import Any

from lowrank_rlhf.data.examples import Messages
from lowrank_rlhf.errors import UserError

Row = dict[str, Any]

ROLES = ("system", "user", "assistant")
# The names ShareGPT's and OASST's files use for them
ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def short(value: Any, limit: int = 80) -> str:
    """`value` as it would be written, cut: a message stays one readable line whatever the row holds."""
    text = repr(value[:limit] if isinstance(value, str | list) else value)
    return text if len(text) <= limit else text[:limit] + "…"


def check_text(value: Any, what: str, *, empty: bool = False) -> str:
    """`value` if it is text, well-formed and (unless `empty`) says something.

    Raises:
        UserError: it begins with `what`, which names file, row and column.
    """
    if not isinstance(value, str):
        raise UserError(f"{what}: expected text, got {'nothing' if value is None else type(value).__name__}")
    if not empty and not value.strip():
        raise UserError(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what}: character {error.start + 1} is {short(value[error.start])}, half of a surrogate pair or a byte "
            "that is not UTF-8: expected Unicode text"
        ) from error
    return value


def text(row: Row, column: str, where: str, *, empty: bool = False) -> str:
    return check_text(row.get(column), f"{where}: column {column!r}", empty=empty)


def sequence(row: Row, column: str, where: str) -> list[Any]:
    """A column that holds a list; CSV files hold it as JSON text."""
    value = row.get(column)
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):  # told below: it is text, not a list
            value = json.loads(value)
    if not isinstance(value, list):
        got = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where}: column {column!r}: expected a list, got {got}")
    if not value:
        raise UserError(f"{where}: column {column!r} is an empty list")
    return value


def message(value: Any, what: str, *, empty: bool = True) -> dict[str, str]:
    """One turn, in the words of chat templates ('role', 'content') or of ShareGPT ('from', 'value')."""
    turn = value if isinstance(value, dict) else {}
    role, said = ("role", "content") if "role" in turn else ("from", "value")
    name = turn.get(role)
    known = ALIASES.get(name, name) if isinstance(name, str) else None
    if known not in ROLES or not isinstance(turn.get(said), str):
        raise UserError(
            f"{what}: expected {{'role': one of {', '.join(ROLES)}, 'content': text}} "
            f"(or ShareGPT's 'from', 'value'), got {short(value)}"
        )
    return {"role": known, "content": check_text(turn[said], what, empty=empty)}


def messages(row: Row, column: str, where: str) -> Messages:
    """A column that is a list of turns."""
    turns = sequence(row, column, where)
    return [message(turn, f"{where}: column {column!r}, message {i}") for i, turn in enumerate(turns, start=1)]


def prompt(row: Row, column: str, where: str) -> Messages:
    """A column that is a question in plain text, or the turns up to where the answer begins."""
    if not isinstance(row.get(column), list):
        return [{"role": "user", "content": text(row, column, where)}]
    return check_prompt(messages(row, column, where), f"{where}: column {column!r}")


def check_prompt(turns: Messages, what: str) -> Messages:
    if not any(turn["role"] == "user" for turn in turns):
        raise UserError(f"{what}: expected a user's message before the answer")
    if not turns[-1]["content"].strip():
        raise UserError(f"{what} is empty: its last message says nothing")
    return turns


def answer(row: Row, column: str, where: str, asked: Messages, *, empty: bool = False) -> Messages:
    """A column that is an answer in plain text, or one turn, or turns that end with the assistant's."""
    value = row.get(column)
    if isinstance(value, dict):
        turns = [message(value, f"{where}: column {column!r}")]
    elif isinstance(value, list):
        turns = messages(row, column, where)
    else:
        return [{"role": "assistant", "content": text(row, column, where, empty=empty)}]
    if turns[: len(asked)] == asked:  # message-form rows often repeat the prompt in front of the answer
        turns = turns[len(asked) :]
    return check_answer(turns, f"{where}: column {column!r}")


def check_answer(turns: Messages, what: str) -> Messages:
    if not turns or turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
        raise UserError(f"{what}: expected an answer that begins and ends with the assistant's message")
    return turns


def split_dialogue(turns: Messages, what: str) -> tuple[Messages, Messages | None]:
    """A dialogue into the turns before the last answer, and that answer; None where the user speaks last."""
    if turns[-1]["role"] != "assistant":
        return check_prompt(turns, what), None
    return check_prompt(turns[:-1], what), turns[-1:]


def number(row: Row, column: str, where: str) -> float | None:
    """An optional column that holds a finite number, perhaps as text."""
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        result = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise UserError(f"{where}: column {column!r}: expected a finite number, got {short(value)}")
    return result


def thumb(row: Row, column: str, where: str) -> bool:
    """A column that says up or down: true or false, 1 or 0, perhaps as text."""
    value = row.get(column)
    said = value.strip().lower() if isinstance(value, str) else value
    for meant, words in ((True, ("true", "1")), (False, ("false", "0"))):
        if said in words or (isinstance(said, bool | int | float) and said == meant):
            return meant
    raise UserError(
        f"{where}: column {column!r}: expected true or false (or 1 or 0), got {short(value)}; where it is no thumb, "
        "data.format: completion reads the rows without it"
    )


def others(row: Row, *used: str) -> Row:
    return {name: value for name, value in row.items() if name not in used}
