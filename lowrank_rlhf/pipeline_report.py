"""The page a pipeline ends with: every policy's figures beside what it took to make it."""

import json
from pathlib import Path
from typing import Any

from lowrank_rlhf.evaluation.summary import Interval
from lowrank_rlhf.evaluation.tables import QUALITY, TEXTS, Figure, cell, head
from lowrank_rlhf.runs import write_atomic

FIGURES = {name: QUALITY[name] for name in ("reward", "gold", "win_rate", "kl_to_base", "ended")} | {
    "length": TEXTS["length"]
}
PAIRED = ("reward", "gold")  # also as a difference, on the same prompts


def write_pipeline_report(folder: Path, stages: list[str]) -> Path:
    """`report.md` from the comparison's report.json and the run.json of every stage.

    Args:
        stages: names of the run directories in `folder`, in order.
    """
    compared = json.loads((folder / "comparison/report.json").read_text(encoding="utf-8"))
    runs = {name: json.loads((folder / name / "run.json").read_text(encoding="utf-8")) for name in stages}
    lines = [f"# {compared['base']}: {', '.join(stages)}", ""]
    lines += policy_table(compared["policies"], runs)
    lines += [
        "",
        f"{compared['prompts']} prompts × {compared['samples']} at temperature {compared['temperature']:g}; wins are "
        f"over {compared['against']}. In brackets: 95 % interval by prompt. Minutes and memory are of the training. "
        "All figures: [comparison/report.md](comparison/report.md).",
    ]
    lines += ["", "![scores](comparison/scores.png)", "![frontier](comparison/frontier.png)", ""]
    lines += ["| stage | result | minutes | memory, GiB |", "|---|---|---|---|"]
    lines += [f"| {name} | {result(run)} | {run['minutes']} | {memory(run)} |" for name, run in runs.items()]
    path = folder / "report.md"
    write_atomic(path, "\n".join([*lines, ""]))
    return path


def policy_table(policies: list[dict[str, Any]], runs: dict[str, Any]) -> list[str]:
    figures: dict[str, Figure] = {
        name: figure for name, figure in FIGURES.items() if any(name in p["metrics"] for p in policies)
    }
    against = policies[0]["against"]
    paired = [name for name in PAIRED if name in figures]
    heads = ["policy", *(head(figure) for figure in figures.values())]
    heads += [*(f"{name} − {against}" for name in paired), "minutes", "memory, GiB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for policy in policies:
        metrics, differences = intervals(policy["metrics"]), intervals(policy["differences"])
        cells = [cell(metrics.get(name), figure) for name, figure in figures.items()]
        if policy["name"] == against:
            differences = {}
        cells += [cell(differences.get(name), figures[name]) for name in paired]
        run = runs.get(policy["name"])
        cells += [str(run["minutes"]), memory(run)] if run else ["–", "–"]
        lines.append(f"| {' | '.join([policy['name'], *cells])} |")
    return lines


def intervals(figures: dict[str, Any]) -> dict[str, Interval]:
    return {name: (figure["value"], figure["low"], figure["high"]) for name, figure in figures.items()}


def memory(run: dict[str, Any]) -> str:
    """Of the GPU where there is one, else of the process."""
    peak = run["peak_memory_gib"]
    return str(peak.get("vram", peak["ram"]))


def result(run: dict[str, Any]) -> str:
    """The figure that a stage is known by."""
    final = run["final"]
    known = {
        "eval_accuracy": "held-out accuracy {:.3f}",
        "objective/scores": "score of the last rollouts {:+.2f}",
        "eval_loss": "held-out loss {:.3f}",
    }
    return next((text.format(final[name]) for name, text in known.items() if name in final), "–")
