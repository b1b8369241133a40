"""The leaderboard as HTML: tables that become cards on a phone, and the sentences below them."""

import math
from collections.abc import Sequence

from lowrank_rlhf.arena.pages.sides import empty, note, plain
from lowrank_rlhf.arena.statistics import words
from lowrank_rlhf.arena.statistics.report import Leaderboard, Standing
from lowrank_rlhf.evaluation.intervals import Interval

# gradio scopes it to the component; colours are its variables, so both themes follow
CSS = """
.standings { color: var(--body-text-color); line-height: 1.5; font-variant-numeric: tabular-nums; }
.standings h3 { font-size: 1.05em; font-weight: 600; margin: 28px 0 8px; color: var(--body-text-color); }
.standings .lead { color: var(--body-text-color-subdued); margin: 4px 0 12px; }
.standings table { border-collapse: collapse; width: 100%; margin: 0; }
.standings th { font-weight: 600; font-size: var(--text-sm); color: var(--body-text-color-subdued); text-align: right;
  vertical-align: bottom; }
.standings th, .standings td { padding: 8px 10px; border: 0; border-bottom: 1px solid var(--border-color-primary);
  background: none; }
.standings td { text-align: right; white-space: nowrap; }
.standings .text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.standings .name { font-weight: 600; }
.standings small { display: block; font-size: var(--text-sm); font-weight: 400; color: var(--body-text-color-subdued); }
.standings td small { display: inline; margin-inline-start: 4px; }
.standings .tied { display: block; margin: 0; }
.standings .track { position: relative; display: block; height: 12px; min-width: 140px; }
.standings .track::before { content: ""; position: absolute; inset: 5px 0 auto; height: 2px; border-radius: 1px;
  background: var(--border-color-primary); }
.standings .track i { position: absolute; top: 3px; height: 6px; border-radius: 3px; background: var(--color-accent);
  opacity: .45; }
.standings .track b { position: absolute; top: 0; width: 12px; height: 12px; margin-left: -6px; border-radius: 50%;
  background: var(--color-accent); }
.standings .matrix { width: auto; }
.standings .matrix th { max-width: 12ch; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.standings .matrix th.text { vertical-align: middle; position: sticky; left: 0; z-index: 1;
  background: var(--body-background-fill); }
.standings .group td { font-size: var(--text-sm); color: var(--body-text-color-subdued); padding-top: 18px; }
.standings .matrix td { text-align: center; min-width: 72px; border: 1px solid var(--border-color-primary); }
.standings .matrix td small { display: block; margin: 0; color: inherit; opacity: .75; }
.standings ul { margin: 0; padding-inline-start: 1.2em; list-style: disc; }
.standings li { margin: 4px 0; overflow-wrap: anywhere; }
.standings .note { margin: 8px 0; }
@media (max-width: 640px) {
  .standings .cards thead { display: none; }
  .standings .cards, .standings .cards tbody { display: block; }
  .standings .cards tr { display: grid; grid-template-columns: 1fr 1fr; gap: 2px 12px; padding: 10px 0;
    border-bottom: 1px solid var(--border-color-primary); }
  .standings .cards td { display: flex; justify-content: space-between; gap: 6px; padding: 1px 0; border: 0;
    white-space: normal; }
  .standings .cards td::before { content: attr(data-label); color: var(--body-text-color-subdued);
    font-size: var(--text-sm); text-align: left; }
  .standings .people tr { grid-template-columns: 1fr; }
  .standings .cards td.wide { grid-column: 1 / -1; }
  .standings .cards td.text { display: block; grid-column: 1 / -1; }
  .standings .cards td.text::before { content: none; }
  .standings .cards td.rank { display: none; }
  .standings .cards td .in-card { display: inline; }
}
@media (min-width: 641px) { .standings .in-card { display: none; } }
"""

GROUP = "A group of its own: no comparison links it with the other models"
UNMET = "Not compared with another model yet"

Cell = tuple[str, str]  # HTML, CSS class


def page(found: Leaderboard) -> str:
    """Everything, or what to do where nobody has voted yet."""
    if not found.counts.votes:
        return f'<div class="standings">{empty(words.EMPTY)}{_notes(found.notes)}</div>'
    parts = [
        f'<p class="lead">{plain(words.headline(found))}</p>',
        _board(found),
        _notes(found.notes),
        "<h3>Does the reward model want what people want?</h3>",
        *([note(verdict) for verdict in found.verdicts] or [note(NO_REWARD)]),
        _matrix(found),
        "<h3>How far to trust the votes</h3>",
        _list(list(words.sentences(found))),
        *(_table(table) for table in (words.annotator_table(found), words.pairs_table(found)) if table.rows),
    ]
    return f'<div class="standings">{"".join(parts)}</div>'


NO_REWARD = "No reward model has scored answers that people decided between; start the app with --reward RUN."


def _board(found: Leaderboard) -> str:
    ends = _ends(found.standings)
    heads = [
        ("#", ""),
        ("model", "text"),
        ("rating", ""),
        ("95 %, by prompt", ""),
        ("votes", ""),
        ("win %", ""),
        ("win %, same length", ""),
        *([("thumbs up", "")] if any(one.thumbs for one in found.standings) else []),
    ]
    rows: list[list[Cell] | str] = []
    groups = len({one.group for one in found.standings})
    for before, one in zip((None, *found.standings), found.standings, strict=False):
        if groups > 1 and (before is None or before.group != one.group):
            rows.append(GROUP if one.votes else UNMET)
        tied = f'<small class="tied">tied with {plain(words.tied_with(one))}</small>' if one.tied_with else ""
        rank = f'<span class="in-card">{words.rank(one)} </span>'
        rates, value = one.win_rate, one.rating[0]
        interval = words.rating_interval(one.rating).split(" ", 1)[1]
        cells = [
            (words.rank(one), "rank"),
            (f'{rank}<span class="name">{plain(one.player)}</span>{tied}', "text"),
            (f"<span><b>{value:.0f}</b> <small>{interval}</small></span>" if one.votes else words.NOTHING, "wide"),
            (_track(one.rating, ends) if one.votes else "", "wide"),
            (f"{one.votes}", ""),
            (_share(rates.raw if rates else None), ""),
            (_share(rates.length_controlled if rates else None), "wide"),
        ]
        if len(heads) > len(cells):
            cells.append((f"{one.thumbs_up} of {one.thumbs}" if one.thumbs else words.NOTHING, ""))
        rows.append(cells)
    return _rows(heads, rows)


def _ends(standings: Sequence[Standing]) -> tuple[float, float]:
    finite = [end for one in standings for end in one.rating if math.isfinite(end)]
    low, high = min(finite, default=1000.0), max(finite, default=1000.0)
    return low - 20, high + 20


def _track(rating: Interval, ends: tuple[float, float]) -> str:
    """The interval as a bar and the rating as a dot on a line that all players share."""
    value, low, high = (100 * (min(max(x, ends[0]), ends[1]) - ends[0]) / (ends[1] - ends[0]) for x in rating)
    bar = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
    return f'<span class="track" aria-hidden="true">{bar}<b style="left:{value:.1f}%"></b></span>'


def _share(interval: Interval | None) -> str:
    if interval is None:
        return words.NOTHING
    value, low, high = (100 * number for number in interval)
    return f"<span>{value:.0f} <small>[{low:.0f}, {high:.0f}]</small></span>"


def _matrix(found: Leaderboard) -> str:
    names = [one.player for one in found.standings]
    if len(names) < 2:
        return ""
    title = "<h3>Who beats whom</h3>"
    lead = '<p class="lead">Share that the row won against the column, ties half; below it the comparisons.</p>'
    heads = "".join(f'<th title="{plain(name)}">{plain(name)}</th>' for name in names)
    rows = [
        f'<tr><th class="text" title="{plain(name)}">{plain(name)}</th>'
        f"{''.join(_against(found, i, j) for j in range(len(names)))}</tr>"
        for i, name in enumerate(names)
    ]
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    table = f'<table class="matrix">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'{title}{lead}<div class="scroll-x">{table}</div>'


def _against(found: Leaderboard, i: int, j: int) -> str:
    if i == j:
        return "<td></td>"
    games, chance = found.games[i][j], found.chances[i][j]
    fitted = "" if chance is None else f' title="fitted: {chance:.0%}"'
    if not games:
        return f"<td{fitted}>{words.NOTHING}</td>"
    share = (found.wins[i][j] + (games - found.wins[i][j] - found.wins[j][i]) / 2) / games
    colour = f"color-mix(in srgb, var(--color-accent) {45 * share:.0f}%, transparent)"
    return f'<td{fitted} style="background:{colour}">{share:.0%}<small>{words.number(games)}</small></td>'


def _table(table: words.Table) -> str:
    heads = [(plain(head), "text" if i < table.texts else "") for i, head in enumerate(table.header)]
    rows = [
        [(f'<span class="name">{plain(cell)}</span>' if i < table.texts else plain(cell), heads[i][1])
         for i, cell in enumerate(row)]
        for row in table.rows
    ]  # fmt: skip
    return f"<h3>{plain(table.title)}</h3>{_rows(heads, rows, 'people')}"


def _rows(heads: list[Cell], rows: Sequence[list[Cell] | str], kind: str = "") -> str:
    top = "".join(f'<th class="{kind}" scope="col">{head}</th>' for head, kind in heads)
    body = ""
    for row in rows:
        if isinstance(row, str):
            body += f'<tr class="group"><td class="text" colspan="{len(heads)}">{plain(row)}</td></tr>'
        else:
            cells = zip(row, heads, strict=True)
            drawn = (f'<td class="{kind}" data-label="{head}">{cell}</td>' for (cell, kind), (head, _) in cells)
            body += f"<tr>{''.join(drawn)}</tr>"
    return f'<table class="cards {kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _notes(notes: Sequence[str]) -> str:
    return f'<div class="note">{_list(notes)}</div>' if notes else ""


def _list(said: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{plain(one)}</li>' for one in said)}</ul>"
