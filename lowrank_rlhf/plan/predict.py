"""The peak of each phase of a recipe, in bytes by component."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lowrank_rlhf import memory
from lowrank_rlhf.backbone.base import pick_device
from lowrank_rlhf.backbone.blueprint import base_config, is_uniform, with_layers
from lowrank_rlhf.config import Rollout
from lowrank_rlhf.plan.demand import demand
from lowrank_rlhf.plan.rehearsal import UNPACKED, Moments, Rehearsal

SHALLOW = 2  # layers, of the smaller of the two rehearsals
GIB = 2**30
RESERVE = {"cpu": 0.55 * GIB, "cuda": 1.5 * GIB}


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        phases: name → bytes by label, when that phase takes the most.
        device: cpu or cuda.
    """

    phases: dict[str, Counter[str]]
    device: str

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the peak."""
        return self.phases[self.peak_phase].total()

    @property
    def reserve(self) -> int:
        return int(RESERVE[self.device])

    @property
    def peak(self) -> int:
        """Bytes, all in all."""
        return self.tensors + self.reserve


def room_on(device: str, gib: float | None) -> tuple[str, int, str]:
    """cpu or cuda, the bytes that tensors may take there, and the place in words.

    Args:
        device: the recipe's.
        gib: the memory of a card that is planned for; None plans for this machine.

    Raises:
        UserError: there is no such device here.
    """
    if gib is not None:
        return "cuda", int(gib * GIB - RESERVE["cuda"]), f"a card of {gib:g} GiB"
    here = pick_device(device)
    if here.type == "cuda":
        total = torch.cuda.get_device_properties(here).total_memory
        return "cuda", int(total - RESERVE["cuda"]), f"this card, which has {total / GIB:.1f} GiB"
    total = memory.free_bytes(here) + psutil.Process().memory_info().rss
    return "cpu", int(total - RESERVE["cpu"]), f"this machine's CPU, which has {total / GIB:.1f} GiB free"


def predict(recipe: Any, *, device: str, room: int) -> Plan:
    """
    Args:
        device: cpu or cuda.
        room: bytes there, beside what is taken before the first tensor.
    """
    config = base_config(recipe.base)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    wanted = demand(recipe, on_cpu=device == "cpu")

    def rehearsal(layers: int) -> Rehearsal:
        return Rehearsal(
            with_layers(config, layers),
            wanted,
            recipe.lora,
            dtype=dtype,
            quantize=recipe.base.quantization == "nf4",
            checkpointing=recipe.train.gradient_checkpointing,
            rollout=getattr(recipe, "rollout", Rollout()),
        )

    layers = config.get_text_config().num_hidden_layers
    whole = layers <= SHALLOW + 1 or not is_uniform(config)
    depths = (layers,) if whole else (SHALLOW, SHALLOW + 1)
    rehearsals, more = [rehearsal(depth) for depth in depths], layers - depths[0]
    standing = _deeper(*([each.standing()] for each in rehearsals), more=more)[0]
    unpack = standing.pop(UNPACKED) <= (room - standing.total()) // 2
    parts = zip(*(each.moments(unpack=unpack) for each in rehearsals), strict=True)
    found = [_deeper(*moments, more=more) for moments in parts]
    phases: dict[str, Counter[str]] = {}
    for each, moments in zip(wanted.passes, found, strict=True):
        highest = max([*moments, phases.get(each.phase, Counter())], key=Counter.total)
        phases[each.phase] = highest
    return Plan(phases, device)


def _deeper(shallow: Moments, deeper: Moments | None = None, *, more: int) -> Moments:
    """Each layer takes as much as the one by which the rehearsals differ; the second has a middle part besides."""
    if deeper is None:
        return shallow
    if len(deeper) > len(shallow):
        deeper = [deeper[0], *deeper[2:]]
    return [
        Counter({label: a[label] + more * (b[label] - a[label]) for label in a | b})
        for a, b in zip(shallow, deeper, strict=True)
    ]
