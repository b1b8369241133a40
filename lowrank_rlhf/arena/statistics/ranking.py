"""Who is ahead of whom, and how sure that is: Bradley–Terry strengths with intervals that resample prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowrank_rlhf.arena.statistics.bradley_terry import (
    Floats,
    fit,
    groups_of,
    lowest_plausible,
    never_lost,
    probabilities,
)
from lowrank_rlhf.arena.statistics.duels import Duel

ELO_MEAN, ELO_SCALE = 1000.0, 400 / np.log(10)
LEVEL = (2.5, 97.5)
SURE = 0.975
Z = 1.959964


@dataclass(frozen=True)
class Ranking:
    """Players from the best to the worst; groups that never met one after the other, the larger first.

    Attributes:
        theta: strengths, log-odds; the mean of each group is 0. Shape (P,).
        low, high: 95 % intervals by prompt; ∞ where somebody never lost, −∞ where somebody never won. Shape (P,).
        group: players of one number are connected by comparisons, if through others. Shape (P,).
        ahead: whether the row's player is surely ahead of the column's. Shape (P, P).
        wins: of the row's against the column's, ties left out. Shape (P, P).
        ties: shape (P, P), symmetric.
    """

    players: tuple[str, ...]
    theta: Floats
    low: Floats
    high: Floats
    group: NDArray[np.intp]
    ahead: NDArray[np.bool_]
    wins: Floats
    ties: Floats

    def rank(self, i: int) -> int:
        """1 and how many are surely ahead of this one; within its group."""
        return 1 + int(self.ahead[:, i].sum())

    def tied_with(self, i: int) -> tuple[str, ...]:
        """Who of the group is neither surely ahead of this one nor surely behind."""
        unsure = (self.group == self.group[i]) & ~self.ahead[i] & ~self.ahead[:, i]
        return tuple(name for j, name in enumerate(self.players) if unsure[j] and j != i)

    def win_probability(self, i: int, j: int) -> float | None:
        """The fitted chance that i is preferred to j, ties half; None where nothing connects the two."""
        return float(probabilities(self.theta)[i, j]) if self.group[i] == self.group[j] else None


def elo(theta: float) -> float:
    """A strength on the scale of chess ratings: 400 points are odds of ten to one, the mean is 1000.

    >>> round(elo(float(np.log(10))))
    1400
    """
    return ELO_MEAN + ELO_SCALE * theta


def few_prompts_factor(prompts: NDArray[np.intp]) -> Floats:
    """How much wider than the bootstrap's an interval from few prompts has to be: t/z·√(n/(n − 1)).

    A percentile interval leaves out what the normal interval with an unknown variance accounts for, so it is expanded;
    Hesterberg 2015, doi:10.1080/00031305.2015.1089789. t by its expansion in 1/(n − 1); Abramowitz and Stegun 26.7.5.

    >>> few_prompts_factor(np.array([2000, 30, 10])).round(2).tolist()
    [1.0, 1.06, 1.21]
    """
    z, degrees = Z, np.maximum(prompts - 1, 1).astype(np.float64)
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return np.asarray(t / z * np.sqrt(1 + 1 / degrees))


def ranking(duels: Sequence[Duel], *, resamples: int = 500, seed: int = 0) -> Ranking:
    """Strengths of all players of some duels, with 95 % percentile intervals from resampling whole prompts.

    Duels of a player with itself say nothing here. Repeats are not left out: the caller decides. Where somebody never
    lost (or never won), every resample says so too, and the bootstrap is blind to it: that end of the interval is open,
    the other is an exact bound that counts each prompt once, and nobody is called ahead on the bootstrap's word alone.
    """
    names = list(dict.fromkeys(name for duel in duels for name in (duel.left, duel.right)))
    if not names:
        none, square = np.zeros(0), np.zeros((0, 0))
        return Ranking((), none, none, none, none.astype(np.intp), square.astype(np.bool_), square, square)
    table = _Table.of([duel for duel in duels if duel.left != duel.right], names)
    groups = groups_of(table.points.T + table.points)
    theta = fit(table.points[None], groups)[0]
    again = fit(table.resampled(resamples, seed), groups) if table.clusters else np.zeros((1, len(names)))
    low, high = np.percentile(again, LEVEL, axis=0)
    wider = few_prompts_factor(table.prompts_met())
    low, high = theta - wider * np.maximum(0.0, theta - low), theta + wider * np.maximum(0.0, high - theta)
    for members in never_lost(table.points):
        low[members] = np.minimum(low, theta + lowest_plausible(theta, table.once(members), members))[members]
        high[members] = np.inf
    for members in never_lost(table.points.T):
        lost = table.once(members, lost=True)
        high[members] = np.maximum(high, theta - lowest_plausible(-theta, lost, members))[members]
        low[members] = -np.inf
    unknown = table.prompts_met() < 2  # one prompt, or none, does not say how much prompts differ
    low[unknown], high[unknown] = -np.inf, np.inf
    often = (again[:, :, None] > again[:, None, :]).mean(axis=0) >= SURE
    together = groups[:, None] == groups[None, :]
    ahead = often & together & (low[:, None] > theta[None, :]) & (high[None, :] < theta[:, None])
    sizes = np.bincount(groups)
    order = sorted(range(len(names)), key=lambda i: (-sizes[groups[i]], groups[i], -theta[i], names[i]))
    pick = np.array(order, dtype=np.intp)
    both = np.ix_(pick, pick)
    return Ranking(
        tuple(names[i] for i in order),
        theta[pick],
        low[pick],
        high[pick],
        groups[pick],
        ahead[both],
        table.wins[both],
        table.ties[both],
    )


@dataclass(frozen=True)
class _Table:
    """Points by prompt: `row`'s player took `value` from `column`'s on prompt `cluster`; a tie gives half to both.

    Attributes:
        points: all of them, shape (P, P).
    """

    cluster: NDArray[np.intp]
    row: NDArray[np.intp]
    column: NDArray[np.intp]
    value: Floats
    points: Floats
    wins: Floats
    ties: Floats
    clusters: int

    @classmethod
    def of(cls, duels: Sequence[Duel], names: Sequence[str]) -> "_Table":
        number = {name: i for i, name in enumerate(names)}
        prompts = {key: i for i, key in enumerate(dict.fromkeys(duel.prompt for duel in duels))}
        cluster = np.array([prompts[duel.prompt] for duel in duels], dtype=np.intp)
        left = np.array([number[duel.left] for duel in duels], dtype=np.intp)
        right = np.array([number[duel.right] for duel in duels], dtype=np.intp)
        weight = np.array([duel.weight for duel in duels], dtype=np.float64)
        outcome = np.array([duel.outcome for duel in duels], dtype=np.float64)
        row, column = np.concatenate([left, right]), np.concatenate([right, left])
        share, both = np.concatenate([outcome, 1 - outcome]), np.concatenate([weight, weight])

        def square(values: Floats) -> Floats:
            table = np.zeros((len(names), len(names)))
            np.add.at(table, (row, column), values)
            return table

        value = both * share
        wins, ties = square(both * (share == 1)), square(both * (share == 0.5))
        return cls(np.concatenate([cluster, cluster]), row, column, value, square(value), wins, ties, len(prompts))

    def prompts_met(self) -> NDArray[np.intp]:
        """On how many prompts each player was compared. Shape (P,)."""
        met = np.zeros((self.clusters, len(self.points)), dtype=bool)
        met[self.cluster, self.row] = True
        return np.asarray(met.sum(axis=0))

    def resampled(self, resamples: int, seed: int) -> Floats:
        """Points in resamples of the prompts with replacement. Shape (R, P, P)."""
        uniform = np.full(self.clusters, 1 / self.clusters)
        draws = np.random.default_rng(seed).multinomial(self.clusters, uniform, size=resamples).astype(np.float64)
        players = len(self.points)
        found = np.empty((resamples, players, players))
        for i in range(players):
            mine = self.row == i
            by_prompt = np.zeros((self.clusters, players))
            np.add.at(by_prompt, (self.cluster[mine], self.column[mine]), self.value[mine])
            found[:, i] = draws @ by_prompt
        return found

    def once(self, members: NDArray[np.bool_], *, lost: bool = False) -> Floats:
        """What members took from the others (or, lost, gave them), each prompt counting at most once. Shape (P, P)."""
        taker, giver = (self.column, self.row) if lost else (self.row, self.column)
        crossing = members[taker] & ~members[giver]
        by_prompt = np.bincount(self.cluster[crossing], weights=self.value[crossing], minlength=self.clusters)
        table = np.zeros(self.points.shape)
        share = self.value / np.maximum(1.0, by_prompt[self.cluster])
        np.add.at(table, (taker[crossing], giver[crossing]), share[crossing])
        return table
