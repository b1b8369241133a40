"""Whether people agree: with each other, with themselves, and with the majority."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lowrank_rlhf.arena.statistics.duels import Duel
from lowrank_rlhf.arena.statistics.shares import share
from lowrank_rlhf.evaluation.intervals import Interval, bootstrap_statistic


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters beyond what their habits alone would give: (p_o − p_e)/(1 − p_e).

    p_o is the share of equal labels, p_e = Σ_c p_first(c)·p_second(c); Cohen 1960, doi:10.1177/001316446002000104.
    None where it is undefined: there is no item, or both use one and the same label throughout.

    >>> yes_yes, yes_no, no_yes, no_no = 20, 5, 10, 15  # p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5
    >>> a = "y" * yes_yes + "y" * yes_no + "n" * no_yes + "n" * no_no
    >>> b = "y" * yes_yes + "n" * yes_no + "y" * no_yes + "n" * no_no
    >>> round(cohen_kappa(a, b), 10)
    0.4
    """
    items = len(first)
    if not items:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True))
    ours, theirs = Counter(first), Counter(second)
    chance = sum(count * theirs[label] for label, count in ours.items())  # p_e · items², a whole number
    if chance == items**2:
        return None
    return (observed * items - chance) / (items**2 - chance)


def krippendorff_alpha(units: Sequence[Mapping[str, Hashable]]) -> float | None:
    """Agreement of any number of raters, who may each have judged only some units: 1 − D_o/D_e, nominal.

    D_o is the share of unequal pairs of labels within units, each unit's pairs weighted by 1/(m_u − 1); D_e the share
    among all labels of units with at least two; Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    None where it is undefined: no unit has two labels, or all labels are the same.

    Args:
        units: label by rater, of each unit.

    >>> krippendorff_alpha([{"ann": 1, "bob": 1}, {"ann": 2, "bob": 2}, {"ann": 3}])
    1.0
    """
    labels = sorted({label for unit in units for label in unit.values()}, key=repr)
    counts = np.zeros((len(units), max(1, len(labels))))
    for row, unit in enumerate(units):
        for label in unit.values():
            counts[row, labels.index(label)] += 1
    return alpha_of_counts(*counts.T)


def alpha_of_counts(*counts: np.ndarray) -> float | None:
    """Nominal alpha from how often each label was given to each unit: one column per label, shape (U,).

    >>> alpha_of_counts(np.array([2.0, 1.0]), np.array([0.0, 1.0]))  # D_o = 2/4, D_e = 2·3·1/(4·3)
    0.0
    """
    table = np.stack(counts, axis=1)
    table = table[table.sum(axis=1) >= 2]
    sizes, totals = table.sum(axis=1), table.sum(axis=0)
    pairs = totals.sum() ** 2 - (totals**2).sum()
    if not pairs:
        return None
    unequal = ((sizes**2 - (table**2).sum(axis=1)) / (sizes - 1)).sum()
    return float(1 - (totals.sum() - 1) * unequal / pairs)


@dataclass(frozen=True)
class Annotator:
    """One person's votes; None where there is nothing to compute it from.

    Attributes:
        votes: comparisons judged, repeats included.
        repeats: pairs of answers that were judged again with sides swapped.
        consistency: share of them judged the same both times.
        self_kappa: Cohen's kappa of the first judgements and the second.
        same_side: of repeats decided both times, how many went to the same side, so to the other answer.
        with_majority: share of agreement with the majority of the others, where they have one.
        majority_items: on how many pairs of answers.
    """

    name: str
    votes: int
    repeats: int
    consistency: Interval | None
    self_kappa: float | None
    same_side: int
    with_majority: Interval | None
    majority_items: int


@dataclass(frozen=True)
class PairOfAnnotators:
    """Two people on the pairs of answers that both judged."""

    first: str
    second: str
    items: int
    agreement: float
    kappa: float | None


@dataclass(frozen=True)
class Agreement:
    """
    Attributes:
        shared_items: pairs of answers that at least two people judged.
        alpha: Krippendorff's, over all of them; None where it is undefined.
        consistency: share of repeats judged the same both times, over everybody.
    """

    annotators: tuple[Annotator, ...]
    pairs: tuple[PairOfAnnotators, ...]
    shared_items: int
    alpha: Interval | None
    repeats: int
    consistency: Interval | None


def agreement(duels: Sequence[Duel]) -> Agreement:
    """Who agrees with whom on the same two texts: the first, the second, or neither of them is better.

    A tie and "both bad" are both neither. Repeats only measure consistency; the first judgement is the one compared
    with other people's.
    """
    prompts = {duel.item: duel.prompt for duel in duels if duel.item}
    units: dict[str, dict[str, str]] = defaultdict(dict)
    for duel in duels:
        if duel.item and duel.repeat_of is None:
            units[duel.item][duel.annotator] = duel.label
    again = _repeats(duels)
    names = sorted({duel.annotator for duel in duels})
    shared = {item: unit for item, unit in units.items() if len(unit) >= 2}
    pairs = []
    for first, second in combinations(names, 2):
        both = [(unit[first], unit[second]) for unit in shared.values() if first in unit and second in unit]
        if both:
            same = sum(a == b for a, b in both) / len(both)
            pairs.append(PairOfAnnotators(first, second, len(both), same, cohen_kappa(*zip(*both, strict=True))))
    return Agreement(
        tuple(_annotator(name, duels, again, shared, prompts) for name in names),
        tuple(pairs),
        len(shared),
        _alpha(shared, prompts),
        len(again),
        share([a.label == b.label for a, b in again], [b.prompt for _, b in again]),
    )


def _repeats(duels: Sequence[Duel]) -> list[tuple[Duel, Duel]]:
    """Each repeat beside what the same person said of the same two texts the first time."""
    first = {(duel.comparison, duel.item, duel.annotator): duel for duel in duels}
    found = ((first.get((d.repeat_of or "", d.item, d.annotator)), d) for d in duels if d.repeat_of and d.item)
    return [(original, duel) for original, duel in found if original is not None]


def _annotator(
    name: str,
    duels: Sequence[Duel],
    again: Sequence[tuple[Duel, Duel]],
    shared: Mapping[str, Mapping[str, str]],
    prompts: Mapping[str, str],
) -> Annotator:
    own = [(a, b) for a, b in again if b.annotator == name]
    decided = [(a, b) for a, b in own if "neither" not in (a.label, b.label)]
    items, right = [], []
    for item, unit in shared.items():
        others = majority([label for who, label in unit.items() if who != name])
        if name in unit and others is not None:
            items.append(item)
            right.append(unit[name] == others)
    return Annotator(
        name,
        len({duel.comparison for duel in duels if duel.annotator == name}),
        len(own),
        share([a.label == b.label for a, b in own], [b.prompt for _, b in own]),
        cohen_kappa([a.label for a, _ in own], [b.label for _, b in own]),
        sum(a.outcome == b.outcome and a.label != b.label for a, b in decided),
        share(right, [prompts[item] for item in items]),
        len(items),
    )


def majority(labels: Sequence[str]) -> str | None:
    """The label that more people gave than any other; None for fewer than two people, or where none leads.

    >>> majority(["first", "first", "second"]), majority(["first", "second"]), majority(["first"])
    ('first', None, None)
    """
    leading = Counter(labels).most_common(2)
    if len(labels) < 2 or (len(leading) == 2 and leading[0][1] == leading[1][1]):
        return None
    return leading[0][0]


def _alpha(shared: Mapping[str, Mapping[str, str]], prompts: Mapping[str, str]) -> Interval | None:
    if not shared:
        return None
    columns = [
        [float(sum(given == label for given in unit.values())) for unit in shared.values()]
        for label in ("first", "second", "neither")
    ]
    return bootstrap_statistic(alpha_of_counts, columns, [prompts[item] for item in shared])
