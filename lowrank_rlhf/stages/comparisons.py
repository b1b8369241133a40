"""What a reward model learns from: comparisons of two or more answers to one prompt, and the order they come in."""

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import LEARN
from lowrank_rlhf.progress import progress


@dataclass(frozen=True)
class Comparison:
    """All pairs of one row. A comparison of K answers counts as much as one of two.

    Attributes:
        prompt_key: of the prompt, for splits and intervals.
        answers: prompt and completion of each different answer; each is scored once.
        pairs: (better, worse) places in `answers`.
        margins: by how much, in units of the score, where the row says it, else 0.
    """

    prompt_key: str
    answers: list[Sequence]
    pairs: list[tuple[int, int]]
    margins: list[float]

    @property
    def longer_wins(self) -> int:
        """Pairs whose better answer is the longer one in tokens, minus those whose is the shorter."""
        lengths = [len(answer.completion_ids) for answer in self.answers]
        return sum((lengths[i] > lengths[j]) - (lengths[i] < lengths[j]) for i, j in self.pairs)


def tokenize(examples: SequenceOf[Example], renderer: Renderer) -> list[Comparison]:
    """The examples of a row, which stand together, as one comparison."""
    rows = itertools.groupby(progress(examples, "tokenising", len(examples)), key=lambda e: (e.where, e.prompt_key))
    return [_comparison(list(pairs), renderer) for _, pairs in rows]


def _comparison(examples: list[Example], renderer: Renderer) -> Comparison:
    places: dict[str, int] = {}
    answers: list[Sequence] = []

    def place(example: Example, answer: list[dict[str, str]]) -> int:
        text = repr(answer)
        if text not in places:
            places[text] = len(answers)
            answers.append(renderer.sequence(example.prompt, answer, example.where))
        return places[text]

    pairs = [(place(e, e.chosen or []), place(e, e.rejected or [])) for e in examples]
    return Comparison(examples[0].prompt_key, answers, pairs, [e.margin or 0.0 for e in examples])


def equal_pairs(comparisons: SequenceOf[Comparison]) -> int:
    """How many pairs are the same tokens, as a token limit makes of long ones: they teach nothing."""
    return sum(c.answers[i].ids == c.answers[j].ids for c in comparisons for i, j in c.pairs)


def micro_batches(comparisons: SequenceOf[Comparison], pairs: int) -> Iterator[list[Comparison]]:
    """Groups of like lengths with at most 2 · `pairs` answers each, or one comparison that has more."""
    group: list[Comparison] = []
    for comparison in sorted(comparisons, key=lambda c: max(len(answer.ids) for answer in c.answers)):
        if group and sum(len(c.answers) for c in [*group, comparison]) > 2 * pairs:
            yield group
            group = []
        group.append(comparison)
    if group:
        yield group


def pairs_that_fit(backbone: Backbone, pairs: int) -> int:
    """`pairs`, or as many as memory was found to have room for; one may still have to be learned in two pieces."""
    return max(1, backbone.most_rows.of(2 * pairs, LEARN) // 2)


def pairs_of(group: SequenceOf[Comparison], values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values of the better and of the worse answer, margin and weight of every pair, from the value of every answer.

    The weights of a comparison's pairs sum to 1.

    Args:
        values: scores or log-probs of the group's answers, in order. Shape (A,).

    Returns:
        Four tensors of shape (P,).
    """
    better: list[int] = []
    worse: list[int] = []
    weights: list[float] = []
    first = 0
    for comparison in group:
        better += [first + i for i, _ in comparison.pairs]
        worse += [first + j for _, j in comparison.pairs]
        weights += [1 / len(comparison.pairs)] * len(comparison.pairs)
        first += len(comparison.answers)
    margins = values.new_tensor([margin for comparison in group for margin in comparison.margins])
    return values[better], values[worse], margins, values.new_tensor(weights)


class Order:
    """Which comparisons an epoch shows, and when: all in a new order, or balanced by length.

    Balanced, an epoch has as many whose better answer is the longer as whose is the shorter (the rarer kind all, of the
    other kind a new draw each epoch), so that length alone predicts nothing.

    Raises:
        UserError: balance is asked for and one of the two kinds is missing.
    """

    def __init__(self, comparisons: SequenceOf[Comparison], *, balance_length: bool, seed: int):
        signs = [c.longer_wins for c in comparisons]
        self.kinds = [list(range(len(comparisons)))]
        self.shown = [len(comparisons)]
        self.generator = torch.Generator().manual_seed(seed)
        if balance_length:
            tests = (lambda s: s > 0, lambda s: s < 0, lambda s: s == 0)
            self.kinds = [[i for i, sign in enumerate(signs) if test(sign)] for test in tests]
            longer, shorter, same = map(len, self.kinds)
            if not longer or not shorter:
                raise UserError(
                    f"reward_model.balance_length: the better answer is the longer one in {longer} rows and the "
                    f"shorter one in {shorter}; both are needed"
                )
            self.shown = [min(longer, shorter)] * 2 + [same]

    def __len__(self) -> int:
        """Comparisons an epoch shows."""
        return sum(self.shown)

    def epoch(self) -> list[int]:
        drawn = [kind[i] for kind, count in zip(self.kinds, self.shown, strict=True) for i in self._draw(kind)[:count]]
        return [drawn[i] for i in self._draw(drawn)]

    def _draw(self, items: list[int]) -> list[int]:
        return list(torch.randperm(len(items), generator=self.generator).tolist())
