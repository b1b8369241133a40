"""Several processes that train one role together, a GPU each: who writes, who takes what, and how gradients meet.

Started by `accelerate launch --config_file lowrank_rlhf/remote/ddp.yaml`. In a process alone every function is what its
name says of one: `share` gives all, `together` changes nothing.
"""

import contextlib
import os
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_rlhf.errors import UserError

T = TypeVar("T")

DIVIDED = ("sft", "reward", "dpo", "orpo", "kto")  # stages whose steps can be shared
LAUNCHER_SETS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CONFIG = Path(__file__).parent / "remote" / "ddp.yaml"
PATIENCE = timedelta(hours=1)  # for a process that the others wait for


def started() -> int:
    """How many processes the launcher said to start; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(stage: str, device: str) -> None:
    """Meet the other processes, where there are any, each on its own card (nccl) or on the CPU (gloo).

    Args:
        device: the recipe's `base.device`.

    Raises:
        UserError: a stage that is not divided, not enough cards, one card for all, or not started by a launcher.
    """
    if (count := started()) == 1:
        return
    if stage not in DIVIDED:
        raise UserError(f"{stage}: rollouts are not divided over processes yet; start it as one process, on one GPU")
    if missing := [name for name in LAUNCHER_SETS if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE: says {count} processes, but {missing[0]} is not set; unset it, or start them with "
            f"accelerate launch --config_file {CONFIG} --num_processes N"
        )
    if ":" in device:
        raise UserError(f"base.device: {device} is one card for {count} processes; give its kind alone, or auto")
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    if not on_cpu and int(os.environ["LOCAL_RANK"]) >= torch.accelerator.device_count():
        raise UserError(f"--num_processes: {count} is more than this machine's {torch.accelerator.device_count()} GPUs")
    from accelerate import PartialState

    PartialState(cpu=on_cpu, timeout=PATIENCE)
    if not dist.is_initialized():
        raise UserError(f"base.device: processes cannot add up their gradients on {device}; start it as one")


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that writes and prints."""
    return rank() == 0


def command() -> str:
    """How the package's command is started with as many processes."""
    if count() == 1:
        return "lowrank-rlhf"
    return f"accelerate launch --config_file {CONFIG} --num_processes {count()} -m lowrank_rlhf.cli"


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """Errors are everybody's."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def share(items: SequenceOf[T]) -> list[T]:
    """This process's part: every n-th."""
    return list(items[rank() :: count()])


def gather(value: T) -> list[T]:
    """The value of each process, in their order; tensors are to be on the CPU."""
    if count() == 1:
        return [value]
    values: list[T | None] = [None] * count()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def together(mine: SequenceOf[T]) -> list[T]:
    """What all made of their `share`, in the order of the whole."""
    return interleave(gather(list(mine)))


def interleave(parts: SequenceOf[SequenceOf[T]]) -> list[T]:
    """
    >>> interleave([[0, 2, 4], [1, 3]])
    [0, 1, 2, 3, 4]
    """
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


@torch.no_grad()
def add_gradients(parameters: SequenceOf[Tensor]) -> None:
    """Each gradient becomes the sum of all processes'; to be called by all, before clipping.

    One message for all of them. Not torch's DistributedDataParallel: it adds up only behind its own forward, which the
    backbone's passes do not go through.
    """
    if count() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).clone()


@torch.no_grad()
def take_mains(weights: SequenceOf[Tensor]) -> None:
    """Each process's weights become the main one's."""
    if count() > 1:
        for weight in weights:
            dist.broadcast(weight.data, 0)
