"""The page a pipeline ends with: every policy's figures beside what it took to make it."""

import json
from pathlib import Path
from typing import Any

from lowrank_rlhf.evaluation.tables import QUALITY, TEXTS, Figure, cell, head
from lowrank_rlhf.runs import write_atomic

FIGURES = {**QUALITY, "length": TEXTS["length"]}


def write_pipeline_report(folder: Path, stages: list[str]) -> Path:
    """`report.md` from the comparison's report.json and the run.json of every stage.

    Args:
        stages: names of the run directories in `folder`, in order.
    """
    compared = json.loads((folder / "comparison/report.json").read_text(encoding="utf-8"))
    runs = {name: json.loads((folder / name / "run.json").read_text(encoding="utf-8")) for name in stages}
    lines = [f"# {compared['base']}: {', '.join(stages)}", ""]
    lines += policy_table(compared["policies"], runs)
    lines += ["", f"{compared['prompts']} prompts × {compared['samples']} samples at temperature "]
    lines[-1] += f"{compared['temperature']:g}; win rates against {compared['against']}. In brackets: 95 % interval by "
    lines[-1] += "prompt; minutes and memory are of the stage's training. More in "
    lines[-1] += "[comparison/report.md](comparison/report.md)."
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
    heads = ["policy", *(head(figure) for figure in figures.values()), "minutes", "memory, GiB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for policy in policies:
        metrics = {name: (m["value"], m["low"], m["high"]) for name, m in policy["metrics"].items()}
        cells = [cell(metrics.get(name), figure) for name, figure in figures.items()]
        run = runs.get(policy["name"])
        cells += [str(run["minutes"]), memory(run)] if run else ["–", "–"]
        lines.append(f"| {' | '.join([policy['name'], *cells])} |")
    return lines


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
