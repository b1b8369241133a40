"""The leaderboard: all that the votes in a store say, as one value, as plain data and as text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lowrank_rlhf.arena.statistics.agreement import Agreement, agreement
from lowrank_rlhf.arena.statistics.bias import (
    RewardAgreement,
    SideBias,
    WinRate,
    longer_wins,
    over_optimised,
    reward_agreements,
    side_bias,
    win_rate,
    worth_ppo,
)
from lowrank_rlhf.arena.statistics.duels import Duel, duels, thumbs
from lowrank_rlhf.arena.statistics.ranking import Ranking, elo, ranking
from lowrank_rlhf.arena.statistics.words import notes, text
from lowrank_rlhf.arena.votes.records import Judged
from lowrank_rlhf.evaluation.intervals import Interval


class HasJudged(Protocol):
    """A store of votes, as far as it is needed here."""

    def judged(self) -> Iterable[Judged]: ...


@dataclass(frozen=True)
class Standing:
    """One line of the leaderboard.

    Attributes:
        rank: 1 and how many of its group are surely ahead.
        tied_with: who is neither surely ahead nor surely behind.
        group: players of one number are connected by comparisons; ranks and ratings of two groups cannot be compared.
        rating: on the scale of chess ratings, mean 1000; an end is infinite where nothing bounds it.
        votes: that it took part in; a ranking counts once.
        wins, losses, ties: of its duels, each pair of a ranking by its weight.
        win_rate: None where it met nobody but itself.
        thumbs_up, thumbs: of its answers.
    """

    rank: int
    player: str
    tied_with: tuple[str, ...]
    group: int
    rating: Interval
    votes: int
    prompts: int
    wins: float
    losses: float
    ties: float
    win_rate: WinRate | None
    thumbs_up: int
    thumbs: int


@dataclass(frozen=True)
class Counts:
    """Of what there is: standing votes on two or more answers, `open_votes` of them not blind."""

    votes: int
    comparisons: int
    prompts: int
    annotators: int
    open_votes: int
    repeats: int
    against_itself: int
    decided: int
    ties: int
    both_bad: int
    first: str | None
    last: str | None


@dataclass(frozen=True)
class Leaderboard:
    """What the votes say.

    Attributes:
        wins, games: of the row's player against the column's, in the order of `standings`; a tie is a game of no win.
        chances: fitted probability that the row's is preferred to the column's; None where nothing connects them.
        longer_wins: how often the longer answer is preferred.
        verdicts: whether PPO on each reward model is worth it, in words.
        notes: what to know before believing the figures.
    """

    counts: Counts
    standings: tuple[Standing, ...]
    wins: tuple[tuple[float, ...], ...]
    games: tuple[tuple[float, ...], ...]
    chances: tuple[tuple[float | None, ...], ...]
    side: SideBias | None
    longer_wins: Interval | None
    agreement: Agreement
    rewards: tuple[RewardAgreement, ...]
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]


def leaderboard(source: HasJudged | Iterable[Judged], *, blind_only: bool = False, seed: int = 0) -> Leaderboard:
    """All statistics of the standing votes of a store, or of some judged comparisons.

    Repeats measure consistency and do not count on the board. Votes on two answers of the same player count for the
    side bias and for agreement only.

    Args:
        blind_only: leave out votes whose annotator could see the names.
        seed: of the resampling; the same votes and seed give the same numbers.
    """
    judged = list(source.judged() if hasattr(source, "judged") else source)
    judged = [one for one in judged if one.comparison.blind or not blind_only]
    every = duels(judged)
    board = [duel for duel in every if duel.repeat_of is None]
    found = ranking(board, seed=seed)
    people = agreement(every)
    rewards = reward_agreements(every, people.consistency[0] if people.consistency else None)
    counts, side = _counts(judged, every), side_bias(every)
    standings = _standings(found, board, thumbs(judged))
    players = range(len(found.players))
    games = found.wins + found.wins.T + found.ties
    return Leaderboard(
        counts=counts,
        standings=standings,
        wins=tuple(tuple(float(found.wins[i, j]) for j in players) for i in players),
        games=tuple(tuple(float(games[i, j]) for j in players) for i in players),
        chances=tuple(tuple(None if i == j else found.win_probability(i, j) for j in players) for i in players),
        side=side,
        longer_wins=longer_wins(board),
        agreement=people,
        rewards=tuple(rewards),
        verdicts=tuple(sentence for reward in rewards for sentence in (worth_ppo(reward), *over_optimised(reward))),
        notes=tuple(notes(counts, standings)),
    )


def text_report(source: HasJudged | Iterable[Judged]) -> str:
    """The leaderboard for a terminal: plain lines, control characters in names replaced."""
    return text(leaderboard(source))


def as_json(found: Leaderboard) -> dict[str, Any]:
    """Plain values: an interval is {"value", "low", "high"}; an end that nothing bounds is null."""
    return {name: _plain(value, name) for name, value in asdict(found).items()}


INTERVALS = {
    "rating", "share", "raw", "length_controlled", "consistency", "with_majority", "alpha", "longer_wins",
    "shorter_wins", "model", "gain", "favours",
}  # fmt: skip


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _plain(one, name if name == "favours" else key) for key, one in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        parts = [_plain(one) for one in value]
        return dict(zip(("value", "low", "high"), parts, strict=True)) if name in INTERVALS else parts
    return value


def _standings(found: Ranking, board: Sequence[Duel], thumbed: dict[str, tuple[int, int]]) -> tuple[Standing, ...]:
    standings = []
    for i, player in enumerate(found.players):
        own = [duel for duel in board if (duel.left == player) != (duel.right == player)]
        up, total = thumbed.get(player, (0, 0))
        value, low, high = (elo(float(theta[i])) for theta in (found.theta, found.low, found.high))
        standings.append(
            Standing(
                rank=found.rank(i),
                player=player,
                tied_with=found.tied_with(i),
                group=int(found.group[i]),
                rating=(value, low, high),
                votes=len({(duel.comparison, duel.annotator) for duel in own}),
                prompts=len({duel.prompt for duel in own}),
                wins=float(found.wins[i].sum()),
                losses=float(found.wins[:, i].sum()),
                ties=float(found.ties[i].sum()),
                win_rate=win_rate(own, player),
                thumbs_up=up,
                thumbs=total,
            )
        )
    return tuple(standings)


def _counts(judged: Sequence[Judged], every: Sequence[Duel]) -> Counts:
    dates = sorted(vote.created for one in judged for vote in one.votes)
    pairs = [duel for duel in every if not duel.ranking]
    votes = {(duel.comparison, duel.annotator): duel for duel in every}.values()
    return Counts(
        votes=len(votes),
        comparisons=len({duel.comparison for duel in every}),
        prompts=len({duel.prompt for duel in every}),
        annotators=len({duel.annotator for duel in every}),
        open_votes=sum(not duel.blind for duel in votes),
        repeats=sum(duel.repeat_of is not None for duel in votes),
        against_itself=sum(duel.left == duel.right for duel in pairs),
        decided=sum(duel.outcome != 0.5 for duel in pairs),
        ties=sum(duel.outcome == 0.5 and not duel.both_bad for duel in pairs),
        both_bad=sum(duel.both_bad for duel in pairs),
        first=dates[0] if dates else None,
        last=dates[-1] if dates else None,
    )
