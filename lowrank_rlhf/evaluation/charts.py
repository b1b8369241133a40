"""A report as pictures: scores with their intervals, and what each policy paid for its score in KL."""

from pathlib import Path
from typing import Any

from lowrank_rlhf.evaluation.summary import Report

SCORES = ("reward", "gold")


def plot_report(report: Report, folder: Path) -> list[Path]:
    """`scores.png` and `frontier.png`, where anything was scored; returns the files."""
    names = [name for name in SCORES if any(name in p.metrics for p in report.policies)]
    if not names:
        return []
    drawn = {"scores.png": bars(report, names), "frontier.png": frontier(report, names)}
    return [_save(figure, folder / file) for file, figure in drawn.items()]


def bars(report: Report, names: list[str]) -> Any:
    """One bar a policy, one panel a score, each on its own scale."""
    figure, panels = _panels(names)
    for axes, name in zip(panels, names, strict=True):
        values = [p.metrics[name] for p in report.policies]
        heights = [value for value, _, _ in values]
        spread = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
        axes.bar([p.name for p in report.policies], heights, yerr=spread, capsize=4, width=0.6, color="#7aa6c2")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=f"{name}, 95 % interval by prompt", ylabel="mean score")
    return figure


def frontier(report: Report, names: list[str]) -> Any:
    """Score over KL to the base: up is better, left is closer to the base."""
    figure, panels = _panels(names)
    for axes, name in zip(panels, names, strict=True):
        for p in report.policies:
            (kl, kl_low, kl_high), (value, low, high) = p.metrics["kl_to_base"], p.metrics[name]
            spread = {"xerr": [[kl - kl_low], [kl_high - kl]], "yerr": [[value - low], [high - value]]}
            axes.errorbar([kl], [value], **spread, fmt="o", capsize=3, label=p.name)
        axes.set(title=f"{name} and KL", xlabel="KL to the base, nats per completion", ylabel="mean score")
        axes.legend(frameon=False)
    return figure


def _panels(names: list[str]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(names), 3.6), dpi=120, layout="constrained")
    panels = list(figure.subplots(1, len(names), squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Any, path: Path) -> Path:
    scratch = path.with_name(f".{path.name}.tmp")
    figure.savefig(scratch, format="png")
    scratch.replace(path)
    return path
