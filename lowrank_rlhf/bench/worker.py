"""One row of the benchmark, in a process of its own so that its peak of memory is its own; prints a JSON line.

python -m lowrank_rlhf.bench.worker ROW STEPS key.sub=value …
"""

import importlib
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from lowrank_rlhf import memory
from lowrank_rlhf.bench.bounds import FORWARD, GIGA, LEARN, layer_weights
from lowrank_rlhf.bench.naive import NaivePPO
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.config_pipeline import RECIPES
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.plan.beside import as_long_as_its_rows, predicted_gib
from lowrank_rlhf.quiet import quiet
from lowrank_rlhf.runs import Run

MIB = 2**20


def on_policy(stage: str, recipe: Any, steps: int) -> dict[str, Any]:
    """PPO's or GRPO's own iterations, every answer as long as the limit."""
    module = importlib.import_module(f"lowrank_rlhf.stages.{stage}")
    method = getattr(module, stage.upper())(recipe)
    loop = method.on_policy
    loop.renderer.stop_ids = []
    tokens = 0

    def step() -> dict[str, float]:
        nonlocal tokens
        experiences, _ = method.collect()
        with loop.phases("update"):
            method.update(experiences)
        tokens = sum(int(e.batch.attention_mask.sum()) for e in experiences)
        return {name.removeprefix("time/"): s for name, s in loop.phases.metrics().items() if name.startswith("time/")}

    with loop.unpacked():
        figures = repeated(step, steps)
    new = loop.completions * recipe.data.max_completion_tokens
    prompts = [loop.renderer.prompt(e.prompt, e.where)[0] for e in loop.order.prompts]
    weights, own_value = layer_weights(loop.backbone.model), stage == "ppo"
    gflop = weights * tokens / GIGA
    return figures | {
        "tokens": {"generate": new, "reward": tokens, "score": tokens, "update": tokens},
        "gflop": {
            "reward": FORWARD * gflop,
            "score": (2 + own_value) * FORWARD * gflop,  # policy, reference, values
            "update": (1 + own_value) * LEARN * gflop,
        },
        "gb": {"generate": 2 * weights * recipe.data.max_completion_tokens / GIGA},  # in 16 bit
        "weights_mib": megabytes([loop.backbone.model, loop.backbone.heads]),
        "base_copies": 1,
        "longest": {"prompt": max(map(len, prompts))},
        "prompt_ids": prompts,
    }


def naive(row: str, recipe: PPORecipe, steps: int) -> dict[str, Any]:
    """Four models."""
    method = NaivePPO(recipe)
    figures = repeated(method.step, steps)
    new = len(method.ids) * method.new_tokens
    tokens = new + int(method.mask.sum())
    weights = layer_weights(method.separate.reference)
    gflop, size = weights * tokens / GIGA, 0.5 if row == "naive-nf4" else 4.0  # bytes of a weight
    return figures | {
        "tokens": {"generate": new, "score": tokens, "update": tokens},
        "gflop": {"score": 4 * FORWARD * gflop, "update": 2 * LEARN * gflop},  # the reward among the scores
        "gb": {"generate": size * weights * method.new_tokens / GIGA},
        "weights_mib": megabytes(method.separate.models),
        "base_copies": len(method.separate.models),
    }


def trained(stage: str, recipe: Any, steps: int) -> dict[str, Any]:
    """A stage as its command runs it, without its first step."""
    run = Run(recipe)
    importlib.import_module(f"lowrank_rlhf.stages.{stage}").train(recipe, run)
    rows = [row for row in run.metrics() if "tokens_per_second" in row][1:]
    tokens = statistics.median(row["tokens_per_second"] * row["seconds"] for row in rows)
    longest = {part: figures["max"] for part, figures in run.info["data_report"]["tokens"].items()}
    return {
        "seconds": {"update": [row["seconds"] for row in rows]},
        "tokens": {"update": tokens},
        "base_copies": 1,
        "longest": longest,
    }


def repeated(step: Callable[[], dict[str, float]], steps: int) -> dict[str, Any]:
    """One step to warm up, then the seconds of each phase of `steps` more."""
    step()
    rows = [step() for _ in range(steps)]
    return {"seconds": {name: [row[name] for row in rows] for name in rows[0]}}


def megabytes(modules: list[Any]) -> float:
    """MiB of weights, packed ones and their scales too, each tensor once."""
    tensors: dict[int, torch.Tensor] = {}
    for module in (inner for each in modules for inner in each.modules()):
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            state = getattr(tensor, "quant_state", None)
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])] if state is not None else []
            tensors.update((each.data_ptr(), each) for each in [tensor, *scales])
    return sum(tensor.nbytes for tensor in tensors.values()) / MIB


def main() -> int:
    row, steps, *overrides = sys.argv[1:]
    quiet()
    stage = "ppo" if row.startswith("naive") else row
    recipe = load_recipe(RECIPES[stage], overrides=overrides)
    memory.begin()
    measure: Any = naive if row.startswith("naive") else on_policy if row in ("ppo", "grpo") else trained
    figures = measure(row, recipe, int(steps))
    figures["peak_rss_mib"] = memory.highest_ram() / MIB
    figures["peak_vram_mib"] = memory.highest_vram() / MIB if torch.cuda.is_available() else None
    if longest := figures.pop("longest", None):
        planned = as_long_as_its_rows(recipe, longest)
        figures["predicted_mib"] = 1024 * predicted_gib(planned, planned.base.device)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
