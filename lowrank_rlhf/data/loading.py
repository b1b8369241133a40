"""A recipe's data group into the examples of a stage, split by prompt."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from lowrank_rlhf.config import Data
from lowrank_rlhf.data.examples import Example, Examples, Reading
from lowrank_rlhf.data.files import source_hash
from lowrank_rlhf.data.formats import stream_examples
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.progress import progress

Split = tuple[Examples, Examples]


def load_demonstrations(data: Data) -> Split:
    """Train and eval examples with an answer: demonstrations, or the best answer of preferences.

    Raises:
        UserError: a row does not fit, or a turn that would be learned is missing or empty.
    """

    def check(example: Example) -> None:
        turns = [*example.prompt, *(example.chosen or [])] if data.loss_on == "all" else (example.chosen or [])[-1:]
        if example.chosen is None and example.rejected is not None:
            raise UserError(
                f"{example.where}: a demonstration needs an answer that was liked, the label of this one is false; "
                "data.on_bad_row: skip leaves such rows out"
            )
        if not example.chosen or not all(m["content"].strip() for m in turns if m["role"] == "assistant"):
            raise UserError(f"{example.where}: a demonstration needs an answer that is not empty")

    return _load(data, check)


def load_preferences(data: Data) -> Split:
    """Train and eval examples with a chosen and a rejected answer, which differ; ranked rows as all their pairs.

    An answer may say nothing: published preferences have some, and reports count them.

    Raises:
        UserError: a row does not fit, or its two answers are the same.
    """

    def check(example: Example) -> None:
        if example.chosen is None or example.rejected is None:
            raise UserError(f"{example.where}: a preference needs a chosen and a rejected answer")
        _refuse_equal(example)

    return _load(data, check, pairs=True)


def load_thumbs(data: Data) -> Split:
    """Train and eval examples of one answer each: `chosen` where it was liked, `rejected` where it was not.

    A pair is two of them. Of a ranked row, an answer that is better than one and worse than another is neither.

    Raises:
        UserError: a row does not fit or has no answer, or no answer was liked, or none was not.
    """

    def check(example: Example) -> None:
        if example.chosen is None and example.rejected is None:
            raise UserError(f"{example.where}: this is a prompt alone; give completion and label, or two answers")
        _refuse_equal(example)

    train, held_out = (_one_by_one(part) for part in _load(data, check, pairs=True))
    liked = sum(example.chosen is not None for example in train)
    if not 0 < liked < len(train):
        raise UserError(
            f"{data.train}: {liked} answers to learn from were liked and {len(train) - liked} were not, both are "
            "needed; give rows of prompt, completion and label (true or false), or preferences"
        )
    return train, held_out


def _refuse_equal(example: Example) -> None:
    if example.chosen == example.rejected:
        raise UserError(f"{example.where}: the chosen and the rejected answer are the same")


def _one_by_one(examples: Examples) -> Examples:
    def answers() -> Iterator[Example]:
        for _, group in itertools.groupby(examples, key=lambda e: (e.where, e.prompt_key)):
            pairs = list(group)
            better, worse = ({repr(getattr(e, side)) for e in pairs} for side in ("chosen", "rejected"))
            seen: set[str] = set()
            for e in pairs:
                for side, lost in (("chosen", worse), ("rejected", better)):
                    answer = getattr(e, side)
                    if answer is not None and repr(answer) not in seen | lost:
                        seen.add(repr(answer))
                        yield replace(e, **{"chosen": None, "rejected": None, side: answer}, weight=1.0, margin=None)

    return Examples(answers(), examples.reading)


def load_prompts(data: Data) -> Split:
    """Train and eval prompts, each once; answers, where the rows have any, are ignored."""
    train, held_out = _load(data, lambda example: None)
    return _distinct(train), _distinct(held_out)


def is_held_out(prompt_key: str, fraction: float) -> bool:
    """Whether a prompt belongs to the eval part: a property of its text alone.

    So every stage of a pipeline, whatever its seed, holds out the same prompts.
    """
    return int.from_bytes(_digest(prompt_key), "big") / 2**64 < fraction


def data_hash(data: Data, *others: str | None) -> str:
    """SHA-256 of the sources a recipe names, shortened."""
    hashes = [source_hash(source) for source in (data.train, data.eval, *others) if source is not None]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _digest(prompt_key: str) -> bytes:
    return hashlib.sha256(prompt_key.encode("utf-8", "surrogatepass")).digest()[:8]


def _distinct(examples: Examples) -> Examples:
    seen: dict[bytes, int] = {}
    for i, example in enumerate(examples):
        seen.setdefault(_digest(example.prompt_key), i)
    return examples.subset(seen.values())


def _read(source: str, data: Data, check: Callable[[Example], None], pairs: bool) -> Examples:
    reading = Reading(source)
    return Examples(
        stream_examples(
            data, reading, pairs=pairs, check=check, watch=lambda rows: progress(rows, f"reading {source}")
        ),
        reading,
    )


def _load(data: Data, check: Callable[[Example], None], *, pairs: bool = False) -> Split:
    examples = _read(data.train, data, check, pairs)
    if data.eval is not None:
        return examples, _read(data.eval, data, check, pairs)
    held_out = [is_held_out(e.prompt_key, data.eval_fraction) for e in examples]
    split = [examples.subset(i for i, held in enumerate(held_out) if held == side) for side in (False, True)]
    if not split[0] or (not split[1] and data.eval_fraction > 0):
        raise UserError(
            f"{data.train}: {len(examples)} rows leave {len(split[0])} for training and {len(split[1])} for "
            "evaluation; give more rows, another data.eval_fraction, or a data.eval file"
        )
    return split[0], split[1]
