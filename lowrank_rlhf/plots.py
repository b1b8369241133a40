"""metrics.jsonl as pictures: one PNG per group of curves that belong together."""

import json
from pathlib import Path

# File → (title, y axis, metrics that are drawn when they are there)
PLOTS = {
    "loss": ("Loss", "loss", ("loss", "eval_loss", "loss/policy_avg", "loss/value_avg")),
    "accuracy": (
        "Accuracy",
        "share",
        ("mean_token_accuracy", "eval_mean_token_accuracy", "rewards/accuracies", "eval_accuracy"),
    ),
    "reward": ("Reward of the rollouts", "score", ("objective/scores", "objective/rlhf_reward")),
    "kl": ("KL to the reference", "nats per completion", ("objective/kl",)),
    "length": ("Completion length", "tokens", ("objective/length",)),
    "clip_fraction": ("Clipped share", "share", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    "explained_variance": ("Explained variance of the values", "share", ("val/explained_variance",)),
}


def plot_run(run_dir: Path) -> list[Path]:
    """Draw every group that the run has numbers for into `plots/`; returns the files."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = []
    for name, (title, unit, metrics) in PLOTS.items():
        curves = {metric: [(row["step"], row[metric]) for row in rows if metric in row] for metric in metrics}
        curves = {metric: points for metric, points in curves.items() if len(points) > 1}
        if not curves:
            continue
        figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
        axes = figure.subplots()
        for metric, points in curves.items():
            marker = "o" if metric.startswith("eval_") else ""
            axes.plot(*zip(*points, strict=True), label=metric, linewidth=1.5, marker=marker, markersize=4)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        path = run_dir / "plots" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        files.append(path)
    return files
