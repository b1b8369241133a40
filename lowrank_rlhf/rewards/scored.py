"""What a reward source is: completions in, one score for each out."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError


@dataclass(frozen=True)
class Scored:
    """One score per completion.

    Attributes:
        disagreement: how far the members of ensembles are apart on each (standard deviation, else 0).
        parts: of several sources the scores of each, by its name, before its weight; empty for a single one.
    """

    scores: list[float]
    disagreement: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)


# What goes on in the main thread while a source of rewards is asked: nothing, so that it is asked there itself; the
# passes without gradient over the completions; or also the generation of those that come after.
Overlap = Literal["none", "scoring", "generation"]


class Reward(Protocol):
    """A source that may be asked in another thread says so in an attribute `overlap`."""

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> Scored: ...


class Texts(NamedTuple):
    """What scores texts is given: the last turn of each prompt, the completions, the data's other columns."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]


def plain_texts(examples: SequenceOf[Example], sequences: SequenceOf[Sequence], renderer: Renderer) -> Texts:
    """A column that a row lacks is None there."""
    prompts = [e.prompt[-1]["content"] for e in examples]
    completions = [renderer.decode(s.completion_ids) for s in sequences]
    columns = {name: [e.columns.get(name) for e in examples] for name in column_names(examples)}
    return Texts(prompts, completions, columns)


def column_names(examples: Iterable[Example]) -> list[str]:
    """Of the data's other columns, each once."""
    return list(dict.fromkeys(name for e in examples for name in e.columns))


def checked_scores(scores: Any, count: int, who: str) -> Scored:
    """Scores from code or a server that is not ours.

    Args:
        count: of the completions.
        who: returned them.

    Raises:
        UserError: they are anything but a list of `count` finite numbers.
    """
    if not isinstance(scores, list) or len(scores) != count:
        raise UserError(f"reward: {who} must return a list of {count} numbers, got {scores!r:.80}")
    for i, score in enumerate(scores, start=1):
        if not _is_finite_number(score):
            raise UserError(f"reward: {who} returned {score!r:.80} for completion {i}: not a finite number")
    return Scored([float(score) for score in scores], [0.0] * count)


def _is_finite_number(score: Any) -> bool:
    try:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:  # a whole number that no float holds
        return False
