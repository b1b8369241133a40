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
# Beside tensors. CUDA: context, kernels and fragments, as recipes/README.md estimates. CPU: Python and its libraries;
# and, as a share of the tensors, what glibc keeps of freed blocks in pieces that nothing fits (docs/measurements.md)
RESERVED = {"cpu": int(0.55 * GIB), "cuda": int(1.5 * GIB)}
PIECES = {"cpu": 0.2, "cuda": 0.0}


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        phases: name → bytes of tensors by label, when that phase takes the most.
        device: cpu or cuda.

    >>> plan = Plan({"update": Counter(base=GIB)}, "cuda")
    >>> plan.peak_phase, plan.peak / GIB
    ('update', 2.5)
    """

    phases: dict[str, Counter[str]]
    device: str

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the peak: on CUDA what torch counts as allocated."""
        return self.phases[self.peak_phase].total()

    @property
    def peak(self) -> int:
        """Bytes, all in all: on a CPU what is resident."""
        return self.of(self.peak_phase)

    def of(self, phase: str) -> int:
        """Bytes of a phase, all in all."""
        tensors = self.phases[phase].total()
        return tensors + int(PIECES[self.device] * tensors) + RESERVED[self.device]


def place(device: str, gib: float | None) -> tuple[str, int, str]:
    """cpu or cuda, the bytes that a process may take there, and the place in words.

    Args:
        device: the recipe's.
        gib: the memory of a card that is planned for; None plans for this machine.

    Raises:
        UserError: there is no such device here.
    """
    if gib is not None:
        return "cuda", int(gib * GIB), f"a card of {gib:g} GiB"
    here = pick_device(device)
    if here.type == "cuda":
        room = torch.cuda.get_device_properties(here).total_memory
        return "cuda", room, f"this machine's card of {room / GIB:.1f} GiB"
    room = memory.free_bytes(here) + psutil.Process().memory_info().rss
    return "cpu", room, f"this machine's CPU with {room / GIB:.1f} GiB free"


def predict(recipe: Any, *, device: str, room: int) -> Plan:
    """
    Args:
        device: cpu or cuda.
        room: bytes that there are.
    """
    config = base_config(recipe.base)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    wanted = demand(recipe, on_cpu=device == "cpu")

    def rehearsal(layers: int) -> Rehearsal:
        made = Rehearsal.without_content(
            with_layers(config, layers),
            wanted,
            recipe.lora,
            getattr(recipe, "rollout", Rollout()),
            dtype=dtype,
            quantize=recipe.base.quantization == "nf4",
        )
        if recipe.train.gradient_checkpointing:
            made.backbone.enable_gradient_checkpointing()
        return made

    layers = config.get_text_config().num_hidden_layers
    whole = layers <= SHALLOW + 1 or not is_uniform(config)
    depths = (layers,) if whole else (SHALLOW, SHALLOW + 1)
    rehearsals, more = [rehearsal(depth) for depth in depths], layers - depths[0]
    standing = _deeper(*([each.standing()] for each in rehearsals), more=more)[0]
    unpack = standing.pop(UNPACKED) <= (room - RESERVED[device] - standing.total()) // 2
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
