"""`lowrank-rlhf bench`: its arguments, and one process after the other."""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lowrank_rlhf.bench.rows import DEMONSTRATIONS, PAIRS, PROMPTS, write_rows
from lowrank_rlhf.bench.table import comparison, table
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.quiet import quiet

EMBEDDED = "smollm2-135m-instruct"
SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-3b", "llama-3.1-8b")
DATA = {"sft": DEMONSTRATIONS}
MICRO_BATCH = 4
STAGES = ("sft", "reward", "ppo", "grpo", "dpo", "orpo", "kto")
NAIVE = ("naive", "naive-nf4")
ROWS = (*STAGES, *NAIVE)
EXPLAINED = (
    "\nPhases in tokens per second; in brackets how near they came to the least time that the device needs to multiply "
    "with the layers' weights, or in generate to read them, lm_head and attention aside.\n"
)
QUANTIZATION = {"naive": "none"}  # a row name → of its base; the others are NF4


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", choices=SHAPES, help="an architecture with random weights (default: the embedded model)"
    )
    every = ",".join(ROWS)
    parser.add_argument("--rows", metavar="ROW[,ROW…]", default=every, help="only these (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each, after one more (default: 3)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="rows of a step (default: 16)")
    parser.add_argument("--new-tokens", metavar="N", type=int, default=48, help="of every answer (default: 48)")
    parser.add_argument("--out", metavar="DIR", default="bench", help="for bench.json and bench.md (default: bench)")
    parser.add_argument("--tiny", action="store_true", help="smoke test: a random 2-layer model, short answers")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change, of every row")


def bench(args: argparse.Namespace) -> int:
    """Every row in a process of its own, so that peaks are its own; the table on the terminal and in two files."""
    chosen = args.rows.split(",")
    if unknown := [row for row in chosen if row not in ROWS]:
        raise UserError(f"--rows: no row {unknown[0]!r}; there are: {', '.join(ROWS)}")
    if args.steps < 1 or args.batch_size % MICRO_BATCH:
        raise UserError("--steps: at least 1; --batch-size: a multiple of 4, the rows of a forward")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    quiet()
    from lowrank_rlhf.bench.bounds import measure_bounds

    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "settings": settings(args)}
    report["bounds"] = dataclasses.asdict(measure_bounds())
    report["rows"] = rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder, args.batch_size, args.new_tokens)
        scored = ["reward"] if {"ppo", "grpo"} & set(chosen) else []  # whose reward model is the row before
        for row in dict.fromkeys([*scored, *chosen]):
            print(f"bench: {row} …", flush=True)
            rows[row] = measure(row, recipe(row, args, folder), args.steps)
    bounds = report["bounds"]
    limits = f"{bounds['gflops']:.0f} GFLOP/s in bf16, {bounds['gb_per_second']:.0f} GB/s read"
    text = "\n".join(
        [f"{report['date']}, {report['machine']}: {limits}\n", table(rows, bounds), EXPLAINED, *comparison(rows)]
    )
    print(text)
    (out / "bench.md").write_text(f"{text}\n", encoding="utf-8")
    (out / "bench.json").write_text(f"{json.dumps(report, indent=1)}\n", encoding="utf-8")
    print(f"bench: written to {out}/bench.json and {out}/bench.md")
    return 0


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("shape", "steps", "batch_size", "new_tokens", "tiny", "overrides")
    return {name: getattr(args, name) for name in names}


def recipe(row: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """The recipe of one row, as overrides; every row learns from as many rows of as many tokens, four to a forward."""
    on_policy, new = row in ("ppo", "grpo", *NAIVE), args.new_tokens
    keys = {
        "run_dir": folder / row,
        "base.model": "tiny" if args.tiny else f"random/{args.shape}" if args.shape else EMBEDDED,
        "base.quantization": QUANTIZATION.get(row, "nf4"),
        "data.train": folder / DATA.get(row, PROMPTS if on_policy else PAIRS),
        "data.eval_fraction": 0,
        "data.max_prompt_tokens": 128,  # cuts nothing
        "data.max_completion_tokens": new,
        "train.max_steps": args.steps + 1,
        "train.batch_size": args.batch_size,
        "train.micro_batch_size": MICRO_BATCH,
        "save.steps": "null",
    }
    if row in ("ppo", "grpo"):
        keys |= {"reward_from": f"[{{run: {folder / 'reward'}}}]", "reference": "base"}
    if on_policy:
        keys["rollout.batch_size"] = args.batch_size
        method = "grpo" if row == "grpo" else "ppo"
        keys |= {f"{method}.inner_epochs": 1, f"{method}.minibatches": args.batch_size // MICRO_BATCH}
    if row == "grpo":
        keys |= {"train.batch_size": args.batch_size // MICRO_BATCH, "grpo.group_size": MICRO_BATCH}
    if row in ("reward", "dpo", "orpo"):  # pairs: two to a forward are four rows
        keys |= {"train.batch_size": args.batch_size // 2, "train.micro_batch_size": MICRO_BATCH // 2}
    return [f"{key}={value}" for key, value in keys.items()] + args.overrides


def measure(row: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """What the worker of a row says.

    Raises:
        UserError: it failed; says why.
    """
    words = [sys.executable, "-m", "lowrank_rlhf.bench.worker", row, str(steps), *overrides]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench: {row} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def machine() -> str:
    """In words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
