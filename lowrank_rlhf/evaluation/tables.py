"""A report on the terminal and as Markdown. Which figures there are, their names, units and definitions."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lowrank_rlhf.evaluation.summary import Interval, PolicyReport, Report

WIDTH = 110
FEW_PROMPTS = 10
RAW = "{:z.2f}"


@dataclass(frozen=True)
class Figure:
    """
    Attributes:
        label: the column's head.
        format: of the value and of the ends of its interval.
        meaning: for the reader of the report.
        scale: of what is shown; 100 for shares.
    """

    label: str
    format: str
    meaning: str
    scale: float = 1.0


# z: no minus before a zero
SHARE, MEAN = "{:z.0f}%", "{:+z.2f}"
QUALITY = {
    "reward": Figure("reward", MEAN, "mean score of the reward"),
    "gold": Figure("gold", MEAN, "mean score of the gold rule, which never trained a policy"),
    "win_rate": Figure("win rate", SHARE, "share of comparisons won, ties half; a pairwise judge saw both orders", 100),
    "length_controlled_win_rate": Figure(
        "win rate,\nsame len.",
        SHARE,
        "win rate predicted at equal length: σ(θ) of P(win) = σ(θ + φ·tanh(Δ/std Δ)), Δ in tokens, after Dubois et al. "
        "2024 (arXiv:2404.04475) without the term for each instruction's difficulty",
        100,
    ),
    "kl_to_base": Figure("KL to\nbase", "{:z.1f}", "nats per completion to the bare base, k1 estimate"),
    "kl_to_reference": Figure("KL to\nstart", "{:z.1f}", "the same to the run's own reference, where that is another"),
    "ended": Figure("ended", SHARE, "answers that ended by themselves before the token limit", 100),
}
TEXTS = {
    "length": Figure("tokens", "{:z.0f}", "mean length of an answer, its end-of-turn token included"),
    "distinct_1": Figure("distinct-1", RAW, "distinct words / all words of all answers (Li et al. 2016); jackknife"),
    "distinct_2": Figure("distinct-2", RAW, "the same of pairs of words"),
    "self_bleu": Figure(
        "self-BLEU",
        RAW,
        "mean BLEU-4 of an answer against the others to the same prompt, or with one sample to all prompts (Zhu et al. "
        "2018): high means all alike",
    ),
    "repetition": Figure("repeated\n3-grams", SHARE, "share of an answer's 3-grams that it had said before", 100),
    "refusals": Figure("refusals", SHARE, "answers that open by declining: a pattern, not a judgement", 100),
    "safety_violations": Figure(
        "unsafe\nper 100",
        "{:z.1f}",
        "answers in 100 with a phrase of a short list (threats, self-harm, weapons, insults, personal numbers): a "
        "coarse filter that knows no context; 0 does not mean safe",
    ),
}


def print_report(report: Report) -> None:
    """Two tables: how good the answers are, and what they are like. `*`: differs from `against`, paired."""
    console = Console(width=WIDTH)
    facts = report.facts
    title = (
        f"{facts['prompts']} prompts × {facts['samples']} samples at temperature {facts['temperature']:g}, "
        f"against {facts['against']}" + (f", judged by {facts['judge']}" if facts["judge"] else "")
    )
    for heading, figures in ((title, QUALITY), ("Texts", TEXTS)):
        console.print(_table(report, heading, figures))
    console.print(f"below each value: 95 % interval by prompt; *: differs from {facts['against']}, paired by prompt")
    for note in all_notes(report):
        console.print(f"note: {note}", markup=False, highlight=False)


def markdown(report: Report) -> str:
    """The report as a page: figures, differences, what each means, notes."""
    facts = [f"- {name}: {value}" for name, value in report.facts.items() if value is not None]
    who = [f"- policy {p.name}: {p.run or 'the bare base'}" for p in report.policies]
    others = [p for p in report.policies if p.name != p.against]
    metrics, differences = [p.metrics for p in report.policies], [p.differences for p in others]
    lines = ["# Policies side by side", "", *facts, *who, "", "## Figures", ""]
    for figures in (QUALITY, TEXTS):
        lines += _markdown_table([p.name for p in report.policies], metrics, figures)
    lines += [f"## Differences to {report.facts['against']}, paired by prompt", ""]
    for figures in (QUALITY, TEXTS):
        lines += _markdown_table([f"{p.name} − {p.against}" for p in others], differences, figures, signed=True)
    lines += ["In brackets: 95 % interval by prompt.", "", "## What the figures are", ""]
    for figures in (QUALITY, TEXTS):
        lines += [f"- **{head(figure)}**: {figure.meaning}." for figure in present(metrics, figures).values()]
    return "\n".join([*lines, "", *(f"- Note: {note}." for note in all_notes(report)), ""])


def _markdown_table(
    names: list[str], values: list[dict[str, Interval]], figures: dict[str, Figure], signed: bool = False
) -> list[str]:
    shown = present(values, figures)
    if not shown:
        return []
    heads = ["policy", *(head(figure) for figure in shown.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in zip(names, values, strict=True):
        cells = [cell(own.get(key), figure, signed=signed) for key, figure in shown.items()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return [*lines, ""]


def all_notes(report: Report) -> list[str]:
    """The report's own, how far to trust the intervals, and what the judges could not be read on or leaned to."""
    notes = list(report.notes)
    if report.facts["prompts"] < FEW_PROMPTS:
        notes.append(f"{report.facts['prompts']} prompts are too few for intervals; these are too narrow")
    for p in report.policies:
        if lost := p.judged.get("comparisons", 0) - p.judged.get("read", 0):
            said = p.judged["unreadable"][0]["said"]
            notes.append(
                f"{p.name}: {lost} of {p.judged['comparisons']} comparisons are left out of the win rate, the judge's "
                f"words name no side, for example {said!r:.80}"
            )
        if "first_rate" in p.judged:
            rate = p.judged["first_rate"]
            notes.append(f"{p.name}: {rate:.0%} of the judge's preference went to what it was shown first; 50% is fair")
    return notes


def present(values: list[dict[str, Interval]], figures: dict[str, Figure]) -> dict[str, Figure]:
    """The figures that some policy has."""
    return {name: figure for name, figure in figures.items() if any(name in own for own in values)}


def head(figure: Figure) -> str:
    return figure.label.replace("\n", " ")


def _table(report: Report, title: str, figures: dict[str, Figure]) -> Table:
    table = Table(title=title)
    table.add_column("policy", overflow="fold")
    shown = present([p.metrics for p in report.policies], figures)
    for figure in shown.values():
        table.add_column(figure.label, justify="right", no_wrap=True)
    for p in report.policies:
        cells = [cell(p.metrics.get(name), figure, "\n", differs(p, name)) for name, figure in shown.items()]
        table.add_row(p.name, *(cell.replace("[", r"\[") for cell in cells))
    return table


def differs(policy: PolicyReport, name: str) -> bool:
    """Whether the interval of a difference leaves out 0; a win rate's, whether it leaves out one half. Not told of KL.

    >>> report = PolicyReport("a", None, "base", {"win_rate": (0.6, 0.4, 0.8)}, {"reward": (1.0, 0.5, 1.5)})
    >>> differs(report, "reward"), differs(report, "win_rate"), differs(report, "gold")
    (True, False, False)
    """
    if name in policy.differences and name != "kl_to_base":
        _, low, high = policy.differences[name]
        return low > 0 or high < 0
    if name in ("win_rate", "length_controlled_win_rate") and name in policy.metrics:
        _, low, high = policy.metrics[name]
        return low > 0.5 or high < 0.5
    return False


def cell(
    interval: Interval | None, figure: Figure, between: str = " ", star: bool = False, signed: bool = False
) -> str:
    """
    >>> cell((0.5, 0.25, 0.75), QUALITY["ended"])
    '50% [25, 75]'
    """
    if interval is None:
        return "–"
    format = figure.format if not signed else figure.format.replace("{:+", "{:").replace("{:", "{:+")
    value, low, high = (format.format(figure.scale * number) for number in interval)
    return f"{value}{'*' if star else ''}{between}[{low.rstrip('%')}, {high.rstrip('%')}]"


def as_json(report: Report) -> dict[str, Any]:
    """Plain values: an interval is {"value", "low", "high"}."""

    def plain(figures: dict[str, Interval]) -> dict[str, dict[str, float]]:
        return {name: dict(zip(("value", "low", "high"), interval, strict=True)) for name, interval in figures.items()}

    return {
        **report.facts,
        "policies": [
            {
                "name": p.name,
                "run": p.run,
                "against": p.against,
                "metrics": plain(p.metrics),
                "differences": plain(p.differences),
                "judged": p.judged,
            }
            for p in report.policies
        ],
        "notes": all_notes(report),
    }
