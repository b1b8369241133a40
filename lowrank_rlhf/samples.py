"""The rows that sampling reads and writes."""

import json
from typing import Any

from lowrank_rlhf.data import Example, read_examples
from lowrank_rlhf.errors import UserError

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


def prompt_value(example: Example) -> Any:
    """The prompt as a row holds it: text where it is one user turn, else its messages."""
    first, *others = example.prompt
    return first["content"] if not others and first["role"] == "user" else example.prompt


def is_answer_to(line: bytes, example: Example) -> bool:
    """Whether a line of the file holds the answers to this prompt."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("prompt") == prompt_value(example)
