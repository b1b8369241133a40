"""Checkpoints: everything a training needs to go on, so that a killed run resumes to the bit.

checkpoints/step-000020/ appears by one rename after every byte is on disk: a kill at any moment leaves either the
checkpoint before it or this one.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.errors import UserError

STATE = "state.pt"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `runs/NAME/checkpoints`, made when the first one is written.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self.folder.glob("step-*"), default=None)

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """A scratch folder to fill; it becomes the checkpoint of `step` when the block ends without an error.

        Of several processes the main one's does; those of the others are thrown away.

        Raises:
            UserError: the disk is full; the earlier checkpoints are as they were.
        """
        if not processes.is_main():
            with TemporaryDirectory() as nowhere:
                yield Path(nowhere)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step-*"):  # of a kill while writing
            shutil.rmtree(leftover)
        scratch = self.folder / f".step-{step:06d}"
        target = self.folder / f"step-{step:06d}"
        try:
            scratch.mkdir()
            yield scratch
            for path in [*scratch.rglob("*"), scratch]:
                fsync(path)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
            fsync(self.folder)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise UserError(self._full(error, step)) from error
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)

    def _full(self, error: OSError, step: int) -> str:
        last = self.latest()
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        kept = f"{last.name} is intact; make room and go on with --resume" if last else "there is no earlier one"
        return f"{self.folder}: the checkpoint of step {step} could not be written: {reason}; {kept}"


def save_state(folder: Path, backbone: Backbone, optimizers: Mapping[str, tuple[Any, Any]], **extra: Any) -> None:
    """Adapters, heads, optimizers, schedules, random states and what fits into memory into `folder`.

    Of several processes the main one writes, also the others' random states.

    Args:
        optimizers: role → (optimizer, schedule).
        extra: the loop's own cursor.
    """
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random_states = processes.gather((torch.get_rng_state(), cuda_rng))
    most_rows = backbone.most_rows.state_dict()
    if not processes.is_main():
        return
    state = {
        "roles": {role: [p.detach() for p in backbone.parameters(role)] for role in backbone.roles},
        "optimizers": {role: optimizer.state_dict() for role, (optimizer, _) in optimizers.items()},
        "schedules": {role: schedule.state_dict() for role, (_, schedule) in optimizers.items()},
        "random_states": random_states,
        "most_rows": most_rows,
        "extra": extra,
    }
    torch.save(state, folder / STATE)


def load_state(folder: Path, backbone: Backbone, optimizers: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Put everything back in place; returns `extra`.

    Raises:
        UserError: the checkpoint does not fit these roles.
    """
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    roles = state["roles"]
    shapes = {role: [p.shape for p in backbone.parameters(role)] for role in backbone.roles}
    if {role: [p.shape for p in saved] for role, saved in roles.items()} != shapes:
        raise UserError(f"{folder}: the checkpoint holds other roles or ranks than this recipe has")
    with torch.no_grad():
        for role, saved in roles.items():
            for parameter, value in zip(backbone.parameters(role), saved, strict=True):
                parameter.copy_(value)
    for role, (optimizer, schedule) in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][role])
        schedule.load_state_dict(state["schedules"][role])
    random_states = state["random_states"]
    rng, cuda_rng = random_states[processes.rank() % len(random_states)]
    torch.set_rng_state(rng)
    if cuda_rng:
        torch.cuda.set_rng_state_all(cuda_rng)
    backbone.most_rows.load_state_dict(state.get("most_rows", {}))  # an earlier version's checkpoint has none
    return dict(state["extra"])


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
