"""A leaderboard in words: cells, sentences and the text for a terminal. Which sentence is said when."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lowrank_rlhf.arena.statistics.bias import FEW_PROMPTS, SideBias
from lowrank_rlhf.evaluation.intervals import Interval

if TYPE_CHECKING:
    from lowrank_rlhf.arena.statistics.report import Counts, Leaderboard, Standing

NOTHING, OPEN = "–", "∞"
EMPTY = "No votes yet: compare two models on the Compare tab and choose one, or vote on the page /vote."


class Table(NamedTuple):
    """Text cells; the first columns, `texts` of them, are text, the others are figures."""

    title: str
    header: list[str]
    rows: list[list[str]]
    texts: int


def percent(value: float | None) -> str:
    """
    >>> percent(0.504), percent(None)
    ('50%', '–')
    """
    return NOTHING if value is None else f"{100 * value:.0f}%"


def percent_interval(interval: Interval | None) -> str:
    """
    >>> percent_interval((0.5, 0.25, 0.75))
    '50% [25, 75]'
    """
    if interval is None:
        return NOTHING
    value, low, high = (100 * number for number in interval)
    return f"{value:.0f}% [{low:.0f}, {high:.0f}]"


def rating_interval(interval: Interval) -> str:
    """
    >>> rating_interval((1200.4, 1100.0, float("inf")))
    '1200 [1100, ∞]'
    """
    value, low, high = interval
    return f"{value:.0f} [{_end(low)}, {_end(high)}]"


def _end(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else f"−{OPEN}" if value < 0 else OPEN


def number(value: float) -> str:
    """A count, or a weighted count with one digit.

    >>> number(3.0), number(2.34)
    ('3', '2.3')
    """
    return f"{value:.0f}" if abs(value - round(value)) < 1e-6 else f"{value:.1f}"


def board_table(found: "Leaderboard") -> Table:
    header = ["#", "model", "tied with", "rating [95 %]", "votes", "win %", "win %, same length", "thumbs up"]
    rows = []
    for one in found.standings:
        rates = one.win_rate
        rows.append(
            [
                rank(one),
                one.player,
                tied_with(one),
                rating_interval(one.rating) if one.votes else NOTHING,
                f"{one.votes}",
                percent_interval(rates.raw) if rates else NOTHING,
                percent_interval(rates.length_controlled) if rates else NOTHING,
                f"{one.thumbs_up} of {one.thumbs}" if one.thumbs else NOTHING,
            ]
        )
    return Table("Leaderboard", header, rows, 3)


def rank(one: "Standing") -> str:
    return f"{one.rank}" if one.votes else NOTHING


def tied_with(one: "Standing") -> str:
    shown = ", ".join(one.tied_with[:3])
    return f"{shown} and {len(one.tied_with) - 3} more" if len(one.tied_with) > 3 else shown or NOTHING


def matrix_table(found: "Leaderboard") -> Table:
    """Who beats whom: the share of points, ties half, and in brackets how many comparisons."""
    names = [one.player for one in found.standings]
    rows = []
    for i, name in enumerate(names):
        cells = [name]
        for j in range(len(names)):
            games = found.games[i][j]
            points = found.wins[i][j] + (games - found.wins[i][j] - found.wins[j][i]) / 2
            cells.append(f"{points / games:.0%} ({number(games)})" if games and i != j else NOTHING)
        rows.append(cells)
    return Table("Row against column: share won, ties half (comparisons)", ["", *names], rows, 1)


def annotator_table(found: "Leaderboard") -> Table:
    rows = [
        [
            one.name,
            f"{one.votes}",
            percent_interval(one.with_majority),
            f"{one.repeats}",
            percent_interval(one.consistency),
            NOTHING if one.self_kappa is None else f"{one.self_kappa:.2f}",
        ]
        for one in found.agreement.annotators
    ]
    header = ["annotator", "votes", "with the majority", "repeats", "same again", "kappa with oneself"]
    return Table("Annotators", header, rows, 1)


def pairs_table(found: "Leaderboard") -> Table:
    rows = [
        [
            f"{pair.first} and {pair.second}",
            f"{pair.items}",
            percent(pair.agreement),
            NOTHING if pair.kappa is None else f"{pair.kappa:.2f}",
        ]
        for pair in found.agreement.pairs
    ]
    return Table("Two people on the same answers", ["who", "pairs of answers", "agree", "Cohen's kappa"], rows, 1)


def tables(found: "Leaderboard") -> list[Table]:
    """Those that have something to show."""
    every = [board_table(found), matrix_table(found), annotator_table(found), pairs_table(found)]
    return [table for table in every if table.rows and len(table.header) > 2]


def headline(found: "Leaderboard") -> str:
    c = found.counts
    return (
        f"{_many(c.votes, 'vote')} of {_many(c.annotators, 'person', 'people')} on {_many(c.prompts, 'prompt')}"
        f", {_many(len(found.standings), 'model')}"
    )


def sentences(found: "Leaderboard") -> Iterator[str]:
    """Ties, biases and agreement, one sentence each."""
    c = found.counts
    if pairs := c.decided + c.ties + c.both_bad:
        yield f"Pairs: {percent(c.decided / pairs)} decided, {percent(c.ties / pairs)} ties, " + (
            f"{percent(c.both_bad / pairs)} both bad."
        )
    yield side_sentence(found.side)
    if found.longer_wins:
        yield f"Length: the longer answer is preferred in {percent_interval(found.longer_wins)} of decided pairs."
    people = found.agreement
    if people.consistency:
        kept = percent_interval(people.consistency)
        yield f"Consistency: {kept} of {_many(people.repeats, 'repeat')} with swapped sides were judged the same again."
        if same := sum(one.same_side for one in people.annotators):
            yield f"Consistency: in {_many(same, 'repeat')} the choice followed the side, not the answer."
    if people.alpha:
        alpha, low, high = people.alpha
        shared = _many(people.shared_items, "pair")
        yield (
            f"Agreement: Krippendorff's alpha {alpha:.2f} [{low:.2f}, {high:.2f}] on {shared} of answers that two or "
            "more people judged (1 is perfect, 0 is chance)."
        )
    elif c.annotators > 1:
        shared = "no two people judged the same answers" if not people.shared_items else "everybody says the same"
        yield f"Agreement: nothing to compute it from, {shared}."


def side_sentence(side: SideBias | None) -> str:
    if side is None:
        return "Side: no blind vote for a side yet."
    share = f"A is preferred in {percent_interval(side.share)} of {_many(side.votes, 'blind vote')} for a side"
    p = f"p = {side.p_value:.2g}" if side.p_value >= 1e-4 else "p < 0.0001"
    if not side.found:
        return f"Side: no bias found; {share} (exact test {p})."
    letter = "A" if side.share[0] > 0.5 else "B"
    return f"Side: people lean to {letter}, whatever stands there; {share} (exact test {p}). It blurs the ranking."


def notes(counts: "Counts", standings: Sequence["Standing"]) -> Iterator[str]:
    """What to know before believing the figures."""
    if not counts.votes:
        return
    if counts.prompts < FEW_PROMPTS:
        yield f"Only {_many(counts.prompts, 'prompt')}: every figure is rough, and the intervals may be too narrow."
    groups: dict[int, list[str]] = {}
    for one in standings:
        groups.setdefault(one.group, []).append(one.player)
    if len(groups) > 1:
        apart = " | ".join(", ".join(players) for players in groups.values())
        yield (
            f"Not connected: {apart}. No comparison links these groups, so their ranks and ratings cannot be "
            "compared; compare a model of one with a model of the other."
        )
    never_lost = [one.player for one in standings if one.votes and not one.losses and not one.ties and one.wins]
    never_won = [one.player for one in standings if one.votes and not one.wins and not one.ties and one.losses]
    for players, what, end in ((never_lost, "lost", "upper"), (never_won, "won", "lower")):
        if players:
            yield f"{', '.join(players)} never {what}: the rating has no {end} end."
    if counts.open_votes:
        yield f"{counts.open_votes} of {_many(counts.votes, 'vote')} were not blind: the names were on the screen."
    if counts.against_itself:
        yield f"Not on the board: {_many(counts.against_itself, 'vote')} between two answers of one model."
    if counts.repeats:
        yield f"Not on the board: {_many(counts.repeats, 'repeat')}; they only measure consistency."


def _many(count: int, one: str, several: str = "") -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def text(found: "Leaderboard") -> str:
    """Plain lines for a terminal."""
    if not found.counts.votes:
        return EMPTY
    lines = [headline(found), ""]
    for table in tables(found):
        lines += [table.title, *_aligned(table), ""]
    lines += sentences(found)
    lines += [f"Reward model: {verdict}" for verdict in found.verdicts]
    lines += [f"Note: {note}" for note in found.notes]
    return "\n".join(printable(line) for line in lines)


def _aligned(table: Table) -> list[str]:
    rows = [[printable(cell) for cell in row] for row in [table.header, *table.rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    return [
        "  ".join(
            cell.ljust(width) if i < table.texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def printable(said: str) -> str:
    """Without what a terminal would obey; on one line.

    >>> printable("a" + chr(27) + "[31mb")
    'a␛[31mb'
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: "␛" if found[0] == "\x1b" else " ", said)
