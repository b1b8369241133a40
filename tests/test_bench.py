"""The benchmark runs every row for real, in small, and its table says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_rlhf.bench.table import comparison, median_step, table

COMMAND = [sys.executable, "-m", "lowrank_rlhf.cli", "bench", "--tiny", "--steps", "1", "--new-tokens", "8"]
ROOT = Path(__file__).parent.parent


def row(generate, update, peak, **more):
    phases = {"generate": generate, "update": update}
    return {
        "seconds": phases,
        "tokens": {"generate": 768, "update": 1408},
        "peak_rss_mib": peak,
        "peak_vram_mib": None,
        "base_copies": 1,
        **more,
    }


def test_the_table_is_of_median_steps():
    rows = {"ppo": row([1.0, 2.0, 9.0], [3.0, 2.0, 1.0], 1500.4, predicted_mib=1430.1, weights_mib=162.2)}
    rows["naive"] = row([4.0, 4.0, 4.0], [8.0, 8.0, 8.0], 4000.0) | {"base_copies": 4}
    assert median_step(rows["ppo"]) == 4.0
    rows["ppo"] |= {"gflop": {"update": 500.0}, "gb": {"generate": 10.0}}
    assert table(rows, {"gflops": 1000.0, "gb_per_second": 20.0}).splitlines() == [
        "| row | s/step | generate | reward | score | update | peak MiB | predicted | weights MiB | bases |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| ppo | 4.00 | 384 (25%) | – | – | 704 (25%) | 1500 | 1430 | 162 | 1 |",
        "| naive | 12.00 | 192 | – | – | 176 | 4000 | – | – | 4 |",
    ]
    assert comparison(rows) == ["ppo beside naive: 3.00 times as fast, 0.38 of its peak"]


def bench(folder, *words):
    done = subprocess.run([*COMMAND, "--out", folder, *words, "lora.r=4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "bench.json").read_text())


@pytest.mark.slow
def test_every_row(tmp_path):
    said, report = bench(tmp_path)
    rows = report["rows"]
    assert list(rows) == ["reward", "sft", "ppo", "grpo", "dpo", "orpo", "kto", "naive", "naive-nf4"]
    for name, found in rows.items():
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["seconds"].values()), name
        assert found["peak_rss_mib"] > 100
        assert min(found["tokens"].values()) > 0
        assert name.startswith("naive") or abs(found["predicted_mib"] / found["peak_rss_mib"] - 1) < 0.15, name
    ours, naive = rows["ppo"], rows["naive-nf4"]
    assert (ours["base_copies"], naive["base_copies"]) == (1, 4)
    assert naive["weights_mib"] > 2 * ours["weights_mib"]
    assert ours["tokens"]["generate"] == naive["tokens"]["generate"] == 16 * 8  # nothing ends before its limit
    assert sum(map(len, ours["prompt_ids"])) + 16 * 8 == ours["tokens"]["update"] == naive["tokens"]["update"]
    assert "| naive-nf4 |" in said
    assert (tmp_path / "bench.md").read_text() in said
    assert {"score", "update"} <= ours["gflop"].keys() == naive["gflop"].keys() | {"reward"}
    assert ours["gflop"]["update"] == naive["gflop"]["update"]
    assert 4 * ours["gflop"]["score"] == 3 * naive["gflop"]["score"]
    assert ours["gb"]["generate"] == 4 * naive["gb"]["generate"]


def test_a_row_that_fails_says_why(tmp_path):
    words = [*COMMAND, "--rows", "sft", "--out", str(tmp_path), "base.device=nowhere"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "bench: sft failed: " in done.stderr
    assert "nowhere" in done.stderr


def test_an_unknown_row_is_told(tmp_path):
    done = subprocess.run([*COMMAND, "--rows", "ppo,dqo"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--rows: no row 'dqo'; there are: sft, reward," in done.stderr
