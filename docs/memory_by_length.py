"""Peak memory of SFT and PPO against the length of completions: python docs/memory_by_length.py [FOLDER]

Every length and stage in a process of its own, by `lowrank-rlhf bench`: the embedded base, four rows a step, one to a
forward. Prints a table and the slopes, and draws docs/memory_by_length.png.
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

LENGTHS = (128, 256, 512, 1024, 2048)
STAGES = ("sft", "ppo")


def measure(folder: Path, length: int) -> dict[str, float]:
    """Stage → peak, MiB."""
    out = folder / str(length)
    if not (out / "bench.json").exists():
        words = ["--rows", ",".join(STAGES), "--steps", "1", "--batch-size", "4", "--new-tokens", str(length)]
        command = [sys.executable, "-m", "lowrank_rlhf.cli", "bench", *words, "--out", str(out)]
        subprocess.run([*command, "train.micro_batch_size=1"], check=True)
    rows = json.loads((out / "bench.json").read_text())["rows"]
    return {stage: rows[stage]["peak_vram_mib"] or rows[stage]["peak_rss_mib"] for stage in STAGES}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "memory_by_length")
    peaks = {length: measure(folder, length) for length in LENGTHS}
    print(f"| completion tokens | {' | '.join(STAGES)} |\n|{'---|' * (1 + len(STAGES))}")
    for length, found in peaks.items():
        print(f"| {length} | {' | '.join(f'{found[stage]:.0f}' for stage in STAGES)} |")
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for stage in STAGES:
        values = [found[stage] for found in peaks.values()]
        slope, _ = np.polyfit(LENGTHS, values, 1)
        print(f"{stage}: {1024 * slope:.0f} KiB a token")
        axes.plot(LENGTHS, values, marker="o", label=f"{stage}: {1024 * slope:.0f} KiB a token")
    axes.set(xlabel="tokens of a completion", ylabel="peak memory, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig("docs/memory_by_length.png", dpi=150)


if __name__ == "__main__":
    main()
