"""Trainings as HTML: the list of them, and the curves, samples, recipe and report of one."""

import re
import time
from collections.abc import Sequence
from typing import Any

from lowrank_rlhf.arena.chat.scan import Problem
from lowrank_rlhf.arena.pages.charts import chart, number
from lowrank_rlhf.arena.pages.sides import answer, markdown, plain
from lowrank_rlhf.arena.trainings import Trained
from lowrank_rlhf.arena.votes.records import Message

SHOWN_RESULTS = 3  # of a run's final metrics, in the list
TELLING = ("eval_accuracy", "objective/scores", "objective/kl", "eval_loss", "eval_rewards/margins", "eval_kl")  # first
SHOWN_WARNINGS = 10  # the last ones

CSS = """
.runs table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums;
  color: var(--body-text-color); }
.runs table, .runs thead, .runs tbody, .runs tr { border: none; }
.runs th, .runs td { text-align: start; padding: 7px 12px; vertical-align: top; border: none;
  border-bottom: 1px solid var(--border-color-primary); }
.runs th { font-size: var(--text-sm); font-weight: 600; color: var(--body-text-color-subdued); white-space: nowrap; }
.runs td.name { font-weight: 600; overflow-wrap: anywhere; min-width: 6em; }
.runs td.nowrap { white-space: nowrap; }
@media (max-width: 640px) { .runs .wide { display: none; } .runs th, .runs td { padding: 6px 8px; } }
.state { display: inline-block; padding: 0 .6em; border-radius: 999px; font-size: var(--text-sm); line-height: 1.7;
  border: 1px solid currentColor; }
.state.finished { color: #15803d; } .dark .state.finished { color: #4ade80; }
.state.running { color: #4338ca; } .dark .state.running { color: #a5b4fc; }
.state.stopped { color: #b45309; } .dark .state.stopped { color: #fbbf24; }
.state.report { color: var(--body-text-color-subdued); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.chart { margin: 0; padding: 10px 12px; border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--background-fill-primary); color: var(--body-text-color); min-width: 0; }
.chart figcaption { font-weight: 600; margin-bottom: 4px; }
.chart figcaption span { font-weight: 400; font-size: var(--text-sm); color: var(--body-text-color-subdued); }
.chart svg { width: 100%; height: auto; display: block; }
.chart svg text { font-size: 11px; fill: var(--body-text-color-subdued); }
.chart svg line { stroke: var(--border-color-primary); stroke-width: 1; }
.chart ul { list-style: none; margin: 6px 0 0; padding: 0; font-size: var(--text-sm); display: flex; flex-wrap: wrap;
  gap: 2px 14px; color: var(--body-text-color-subdued); }
.chart li i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-inline-end: 5px; }
.chart li b { color: var(--body-text-color); font-weight: 600; }
.sample { margin: 0 0 14px; } .sample .prompt { margin-bottom: 8px; }
.sample .foot { font-size: var(--text-sm); color: var(--body-text-color-subdued); margin-top: 6px; }
.recipe { overflow-x: auto; font-family: var(--font-mono); font-size: var(--text-sm); line-height: 1.5; margin: 0;
  white-space: pre; color: var(--body-text-color); }
.report table { font-variant-numeric: tabular-nums; }
.report th, .report td { overflow-wrap: normal; word-break: normal; }
"""

_PICTURE = re.compile(r"!\[([^\]\n]*)\]\(([^)\n]*)\)")
_LINK = re.compile(r"\[([^\]\n]+)\]\([^)\n]*\)")


def runs_table(runs: list[Trained], folder: str) -> str:
    """The list of trainings, or what to do where there is none."""
    if not runs:
        return (
            f'<div class="empty">No runs in {plain(folder)} yet. Train one, for example<br>'
            "<code>lowrank-rlhf sft --config recipes/sft.yaml</code><br>"
            "and press Refresh: it appears while it runs.</div>"
        )
    rows = "".join(
        f'<tr><td class="name">{plain(run.name)}</td><td class="wide">{plain(run.stage)}</td><td>{_state(run)}</td>'
        f'<td class="nowrap">{_steps(run)}</td><td class="nowrap">{_minutes(run.minutes)}</td>'
        f'<td class="wide">{plain(results(run.final))}</td></tr>'
        for run in runs
    )
    columns = {"run": "", "stage": "wide", "state": "", "step": "", "time": "", "result": "wide"}
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in columns.items())
    return f'<div class="runs scroll-x"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def problems(found: Sequence[Problem]) -> str:
    """Run directories nobody of which can answer, and why."""
    if not found:
        return ""
    lines = "".join(f"<li>{plain(str(problem.path))}: {plain(problem.reason)}</li>" for problem in found)
    return f'<details class="note"><summary>{len(found)} not offered for comparison</summary><ul>{lines}</ul></details>'


def overview(run: Trained) -> str:
    """What one run is, and what is wrong with it."""
    what = "a report" if run.state == "report" else f"stage {run.stage} · {run.state}"
    facts = [f"{what}, last wrote {_ago(time.time() - run.updated)}"]
    base = run.info.get("base")
    if isinstance(base, dict) and base.get("model"):
        facts.append(f"base {base['model']} ({base.get('quantization', '')})")
    notes = [f'<p class="muted">{plain(" · ".join(facts))}</p>']
    if run.final:
        everything = plain(results(run.final, len(run.final)))
        notes.append(f'<details class="muted"><summary>All final metrics</summary>{everything}</details>')
    if run.state == "stopped":
        command = f"lowrank-rlhf {run.stage} --config {run.path / 'recipe.yaml'} --resume"
        notes.append(f'<div class="note">It has stopped or was killed. Go on with <code>{plain(command)}</code></div>')
    wrong = [*run.problems, *(f"Step {step}: {words}" for step, words in run.warnings()[-SHOWN_WARNINGS:])]
    return "".join([*notes, *(f'<div class="note problem">{plain(words)}</div>' for words in wrong)])


def curves(run: Trained) -> str:
    """Its metrics as figures."""
    drawn = [chart(plot.title, plot.unit, found) for plot, found in run.curves()]
    if run.state == "report":
        return '<div class="empty">No training: see its report.</div>'
    if not drawn:
        return '<div class="empty">No curves yet: they begin with the second line of metrics.jsonl.</div>'
    return f'<div class="charts">{"".join(drawn)}</div>'


def samples(rows: list[dict[str, Any]]) -> str:
    """Answers shown at one step."""
    shown = []
    for row in rows:
        prompt = row.get("prompt", "")
        asked = "\n\n".join(map(_turn, prompt)) if isinstance(prompt, list) else str(prompt)
        figures = [f"{key} {number(row[key])}" for key in ("score", "kl") if isinstance(row.get(key), int | float)]
        shown.append(
            f'<div class="sample"><div class="prompt">{plain(asked)}</div>'
            f'<div class="side">{answer(str(row.get("completion", "")))}'
            f'<div class="foot">{plain(" · ".join(figures))}</div></div></div>'
        )
    return "".join(shown)


def recipe(run: Trained) -> str:
    text = run.text("recipe.yaml")
    return f'<pre class="recipe">{plain(text)}</pre>' if text else '<div class="empty">It has no recipe.yaml.</div>'


def report(run: Trained) -> str:
    """Its report.md, or for an SFT run its samples.md; pictures are named, links are their words."""
    text = run.text("report.md") or run.text("samples.md")
    if not text:
        return (
            '<div class="empty">No report yet. <code>lowrank-rlhf evaluate reward</code> writes one into a reward run, '
            "<code>evaluate policy</code> and <code>pipeline</code> into folders of their own.</div>"
        )
    words = _LINK.sub(r"\1", _PICTURE.sub(r"(picture: \2)", text))
    return f'<div class="report answer">{markdown(words)}</div>'


def results(final: dict[str, Any], most: int = SHOWN_RESULTS) -> str:
    """Final metrics in a line, the telling ones first.

    >>> results({"eval_loss_before": 1.40506, "eval_loss": 1.30277})
    'eval_loss 1.3 · eval_loss_before 1.41'
    """
    ordered = {key: final[key] for key in (*TELLING, *final) if key in final}
    figures = [f"{key} {number(value)}" for key, value in ordered.items() if isinstance(value, int | float)]
    return " · ".join(figures[:most])


def _turn(message: Message | Any) -> str:
    return f"{message.get('role', '')}: {message.get('content', '')}" if isinstance(message, dict) else str(message)


def _state(run: Trained) -> str:
    problem = " · a problem" if run.problems else ""
    return f'<span class="state {run.state}">{run.state}{problem}</span>'


def _steps(run: Trained) -> str:
    if run.step is None:
        return ""
    return f"{run.step} of {run.max_steps}" if run.max_steps and run.state != "finished" else str(run.step)


def _minutes(minutes: float | None) -> str:
    if minutes is None:
        return ""
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _ago(seconds: float) -> str:
    """
    >>> _ago(12), _ago(600), _ago(3 * 86400)
    ('12 s ago', '10 min ago', '72 h ago')
    """
    if seconds < 120:
        return f"{max(0, seconds):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"
