"""Two pictures of a reward model's report: its calibration, and by how much the chosen answers win."""

from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike


def plot_report(folder: Path, report: dict[str, Any], margins: ArrayLike) -> list[Path]:
    """Draw `calibration.png` and `margins.png`; returns the files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in ("calibration", "margins"):
        figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
        axes = figure.subplots()
        if name == "calibration":
            _calibration(axes, report["calibration"])
        else:
            _margins(axes, margins)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        scratch, path = folder / f".{name}.tmp.png", folder / f"{name}.png"
        figure.savefig(scratch)
        files.append(scratch.replace(path))
    return files


def _calibration(axes: Any, calibration: dict[str, Any]) -> None:
    axes.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1, linestyle="--", label="calibrated")
    curves = {"all pairs": calibration["bins"]}
    if calibration["scaling"] is not None:
        curves[f"judged half, T = {calibration['scaling']['temperature']:.2f}"] = calibration["scaled_bins"]
    for label, bins in curves.items():
        points = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axes.plot(*points, marker="o", markersize=4, linewidth=1.5, label=label)
    axes.set(
        title="Calibration",
        xlabel="confidence σ(|margin|)",
        ylabel="share right",
        xlim=(0.49, 1.01),
        ylim=(-0.02, 1.02),
    )
    axes.legend(frameon=False)


def _margins(axes: Any, margins: ArrayLike) -> None:
    axes.hist(margins, bins=40)
    axes.axvline(0, color="black", linewidth=1)
    axes.set(
        title="Margins: right of 0 the chosen answer wins", xlabel="score of chosen − score of rejected", ylabel="pairs"
    )
