"""A recipe's data group into the examples of a stage, split by prompt."""

import hashlib
from pathlib import Path

from lowrank_rlhf.config import Data
from lowrank_rlhf.data.formats import Example, read_examples
from lowrank_rlhf.errors import UserError


def load_demonstrations(data: Data) -> tuple[list[Example], list[Example]]:
    """Train and eval examples with an answer: demonstrations, or the chosen side of preferences.

    Raises:
        UserError: a row does not fit or has no answer.
    """
    train, held_out = _load(data)
    for example in train + held_out:
        if example.chosen is None or not any(m["content"].strip() for m in example.chosen):
            raise UserError(f"{example.where}: a demonstration needs an answer that is not empty")
    return train, held_out


def load_preferences(data: Data) -> tuple[list[Example], list[Example]]:
    """Train and eval examples with a chosen and a rejected answer, which differ.

    Raises:
        UserError: a row does not fit, or its two answers are the same.
    """
    train, held_out = _load(data)
    for example in train + held_out:
        if example.chosen is None or example.rejected is None:
            raise UserError(f"{example.where}: a preference needs a chosen and a rejected answer")
        if example.chosen == example.rejected:
            raise UserError(f"{example.where}: the chosen and the rejected answer are the same")
    return train, held_out


def load_prompts(data: Data) -> tuple[list[Example], list[Example]]:
    """Train and eval prompts, each once; answers, where the rows have any, are ignored."""
    train, held_out = _load(data)
    return list({e.prompt_key: e for e in train}.values()), list({e.prompt_key: e for e in held_out}.values())


def is_held_out(prompt_key: str, fraction: float) -> bool:
    """Whether a prompt belongs to the eval part: a property of its text alone.

    So every stage of a pipeline, whatever its seed, holds out the same prompts.
    """
    digest = hashlib.sha256(prompt_key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def data_hash(data: Data) -> str:
    """SHA-256 of the files a recipe names, shortened."""
    digest = hashlib.sha256()
    for path in filter(None, (data.train, data.eval)):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _load(data: Data) -> tuple[list[Example], list[Example]]:
    examples = read_examples(data.train, data.format, data.max_rows)
    if data.eval is not None:
        return examples, read_examples(data.eval, data.format, data.max_rows)
    held_out = [e for e in examples if is_held_out(e.prompt_key, data.eval_fraction)]
    train = [e for e in examples if not is_held_out(e.prompt_key, data.eval_fraction)]
    if not train or (not held_out and data.eval_fraction > 0):
        raise UserError(
            f"{data.train}: {len(examples)} rows leave {len(train)} for training and {len(held_out)} for evaluation; "
            "give more rows, another data.eval_fraction, or a data.eval file"
        )
    return train, held_out
