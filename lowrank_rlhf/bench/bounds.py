"""What this device can do at most, products of matrices and reading memory, and what a row needs at least of both."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank_rlhf.backbone.base import pick_device

GIGA = 1e9
FORWARD, LEARN = 2, 4  # operations for each weight and token; the frozen weights get no gradient


@dataclass(frozen=True)
class Bounds:
    """`gflops`: of a large matrix product in bf16. `gb_per_second`: read while summing a large tensor."""

    gflops: float
    gb_per_second: float


def measure_bounds(device: str = "auto") -> Bounds:
    """The better of a few tries each; a second or two."""
    where = pick_device(device)
    size = 1024 if where.type == "cpu" else 8192
    dtype = torch.bfloat16
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    product = best_seconds(lambda: torch.mm(a, b), where)
    many = torch.ones(2**26 if where.type == "cpu" else 2**30, device=where, dtype=dtype)
    reading = best_seconds(lambda: many.sum(), where)
    return Bounds(2 * size**3 / product / GIGA, many.nbytes / reading / GIGA)


def layer_weights(model: nn.Module) -> int:
    """How many weights the base's linear layers have, adapters and lm_head aside, which reads completions only."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    sizes = [
        (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and ".lora_" not in name
    ]
    return sum(rows * columns for rows, columns in sizes)


def best_seconds(work: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    found = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)
