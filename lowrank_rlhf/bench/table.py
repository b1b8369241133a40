"""The benchmark's rows as a Markdown table."""

import statistics
from typing import Any

HEADER = ("row", "s/step", "generate", "reward", "score", "update", "peak MiB", "predicted", "weights MiB", "bases")


def median_step(row: dict[str, Any]) -> float:
    """Seconds of the median step, all phases."""
    return statistics.median(sum(parts) for parts in zip(*row["seconds"].values(), strict=True))


def speed(row: dict[str, Any], phase: str, bounds: dict[str, float]) -> str:
    """Tokens per second of a phase, at its median time, and what share of the bound the layers' weights took.

    Args:
        bounds: `gflops` and `gb_per_second` of the device.
    """
    if phase not in row["seconds"]:
        return "–"
    seconds = statistics.median(row["seconds"][phase])
    least = (
        row.get("gflop", {}).get(phase, 0) / bounds["gflops"]
        + row.get("gb", {}).get(phase, 0) / bounds["gb_per_second"]
    )
    return f"{row['tokens'][phase] / seconds:.0f}" + (f" ({least / seconds:.0%})" if least else "")


def table(rows: dict[str, dict[str, Any]], bounds: dict[str, float]) -> str:
    """One line a row: seconds of the median step, tokens per second of each phase, memory."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for name, row in rows.items():
        peak = row["peak_vram_mib"] or row["peak_rss_mib"]
        others = (f"{row[key]:.0f}" if key in row else "–" for key in ("predicted_mib", "weights_mib"))
        cells = [name, f"{median_step(row):.2f}", *(speed(row, phase, bounds) for phase in HEADER[2:6])]
        lines.append(f"| {' | '.join([*cells, f'{peak:.0f}', *others, str(row['base_copies'])])} |")
    return "\n".join(lines)


def comparison(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Ours against each naive row: time and memory."""
    ours = rows.get("ppo")
    lines = []
    for name, row in rows.items():
        if ours is not None and name.startswith("naive"):
            kind = "peak_vram_mib" if row["peak_vram_mib"] else "peak_rss_mib"
            times, share = median_step(row) / median_step(ours), ours[kind] / row[kind]
            lines.append(f"ppo beside {name}: {times:.2f} times as fast, {share:.2f} of its peak")
    return lines
