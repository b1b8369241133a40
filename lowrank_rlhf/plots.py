"""metrics.jsonl as pictures: one PNG per group of curves that belong together, and score over KL."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_rlhf.stability import KL, SCORES, entropy_per_token

Row = dict[str, float]
Curve = tuple[list[float], list[float]]  # steps, values

ENTROPY = "entropy per token"
FEW = 25  # points that are marked each


@dataclass(frozen=True)
class Plot:
    """
    Attributes:
        metrics: drawn where a row has them; a name that ends in / stands for all that begin with it.
        only_changes: left out where no curve changes.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    only_changes: bool = False


PLOTS = {
    "loss": Plot("Loss", "loss", ("loss", "eval_loss", "loss/policy_avg", "loss/value_avg", "loss/ptx_avg")),
    "accuracy": Plot(
        "Accuracy",
        "share",
        ("mean_token_accuracy", "eval_mean_token_accuracy", "rewards/accuracies", "eval_accuracy"),
    ),
    "margin": Plot("Lead of the chosen answer", "reward", ("rewards/margins", "eval_rewards/margins")),
    "reward": Plot("Reward of the rollouts", "score", (SCORES, "objective/rlhf_reward")),
    "reward_sources": Plot("Score by source of reward", "score", (f"{SCORES}/",)),
    "disagreement": Plot(
        "Disagreement of the reward's members", "standard deviation", ("objective/disagreement",), only_changes=True
    ),
    "kl": Plot("KL to the reference", "nats per completion", (KL,)),
    "kl_coef": Plot("KL coefficient", "score per nat", ("objective/kl_coef",), only_changes=True),
    "length": Plot("Completion length", "tokens", ("objective/length",)),
    "ended": Plot("Completions that ended before the limit", "share", ("val/eos_rate",)),
    "entropy": Plot("Entropy of the policy", "nats per token", (ENTROPY,)),
    "diversity": Plot("Diversity and repetition", "share", ("val/distinct_1", "val/distinct_2", "val/repetition")),
    "clip_fraction": Plot("Clipped share", "share", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    "explained_variance": Plot("Explained variance of the values", "share", ("val/explained_variance",)),
    "time": Plot("Time of an iteration's phases", "seconds", ("time/",)),
}


def plot_run(run_dir: Path) -> list[Path]:
    """Draw into `plots/` every group of which the run has two finite numbers; returns the files."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        entropy = entropy_per_token(row)
        if entropy is not None:
            row[ENTROPY] = entropy
    figures = {name: _curves(plot, curves) for name, plot in PLOTS.items() if (curves := curves_of(plot, rows))}
    if bought := bought_score(rows):
        figures["frontier"] = _frontier(bought)
    files = []
    for name, figure in figures.items():
        path = run_dir / "plots" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        files.append(path)
    return files


def curves_of(plot: Plot, rows: list[Row]) -> dict[str, Curve]:
    """The plot's curves, each of at least two finite values; other values are nan, which leaves a gap.

    >>> rows = [{"step": 1, "time/a": 2.0}, {"step": 2, "time/a": float("inf")}, {"step": 3, "time/a": 4.0}]
    >>> curves_of(PLOTS["time"], rows)
    {'time/a': ([1, 2, 3], [2.0, nan, 4.0])}
    """
    seen = dict.fromkeys(name for row in rows for name in row)
    names = [name for metric in plot.metrics for name in seen if _stands_for(metric, name)]
    found: dict[str, Curve] = {}
    for name in names:
        points = [(row["step"], row[name] if math.isfinite(row[name]) else math.nan) for row in rows if name in row]
        if sum(math.isfinite(value) for _, value in points) > 1:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    if plot.only_changes and all(len({v for v in values if math.isfinite(v)}) == 1 for _, values in found.values()):
        return {}
    return found


def _stands_for(metric: str, name: str) -> bool:
    return name.startswith(metric) if metric.endswith("/") else name == metric


def bought_score(rows: list[Row]) -> list[tuple[float, float, float]]:
    """(KL, score, step) of every iteration that has both; nothing for fewer than two of them."""
    points = [(row[KL], row[SCORES], row["step"]) for row in rows if row["step"] > 0 and KL in row and SCORES in row]
    points = [point for point in points if all(map(math.isfinite, point))]
    return points if len(points) > 1 else []


def _curves(plot: Plot, curves: dict[str, Curve]) -> Any:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes()
    for name, (steps, values) in curves.items():
        marked = name.startswith("eval_") or len(steps) <= FEW or any(map(math.isnan, values))
        axes.plot(steps, values, label=name, linewidth=1.5, marker="o" if marked else "", markersize=3)
    axes.set(title=plot.title, xlabel="step", ylabel=plot.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _frontier(points: list[tuple[float, float, float]]) -> Any:
    """Up is better, left is nearer to the reference; once the points go right and no longer up, KL buys nothing."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes()
    kl, scores, steps = zip(*points, strict=True)
    axes.plot(kl, scores, color="0.8", linewidth=0.8, zorder=1)
    dots = axes.scatter(kl, scores, c=steps, cmap="viridis", s=18, zorder=2)
    axes.set(title="Score and what it cost", xlabel="KL to the reference, nats per completion", ylabel="score")
    bar = figure.colorbar(dots, label="step")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    return figure


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
