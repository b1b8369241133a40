"""Which adapters are on the base: loaded on first use, and the ones not used for longest leave."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lowrank_rlhf.arena.chat.catalog import Found
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.embedded import sha256_of
from lowrank_rlhf.backbone.store import load_role
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import is_out_of_memory
from lowrank_rlhf.rewards import load_members, saved_members

Key = tuple[str, str]
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError, EOFError, RuntimeError)


@dataclass
class Loaded:
    """An adapter, or the members of a reward model, on the base.

    Attributes:
        roles: on the backbone.
        version: of the file it came from: a run that is written again is loaded again.
        hash: SHA-256 of that file.
    """

    roles: list[str]
    version: tuple[int, ...]
    hash: str


class Adapters:
    """Adapters by the file they come from.

    Args:
        backbone: the base that they are put on.
        most: adapters to keep; those that one call needs together stay together, also where they are more.
    """

    def __init__(self, backbone: Backbone, most: int):
        if most < 1:
            raise UserError(f"--max-adapters: must be at least 1, got {most}")
        self.backbone, self.most = backbone, most
        self.loaded: OrderedDict[Key, Loaded] = OrderedDict()  # from the one not used for longest
        self._count = 0

    def roles(self, speakers: Iterable[Found]) -> list[str | None]:
        """The roles of these speakers, all of them on the base now; None is the bare base.

        Raises:
            UserError: a file has vanished, is damaged, or belongs to another base.
        """
        speakers = list(speakers)
        needed = {_key(found): found for found in speakers if found.weights is not None}
        for key, found in needed.items():
            assert found.weights is not None
            self._want(key, found.weights, 1, needed, lambda role, found=found: self._load(found, role))  # type: ignore[misc]
        return [None if found.weights is None else self.loaded[_key(found)].roles[0] for found in speakers]

    def reward(self, run: Path) -> list[str]:
        """The roles of a reward run's members.

        Raises:
            UserError: as `roles`, or the run has no head.
        """
        key = (str(run), "reward")
        weights = run / "adapters" / "reward" / "adapter_model.safetensors"
        members = len(saved_members(run))
        self._want(key, weights, members, {key}, lambda role: load_members(self.backbone, run, role, key="reward"))
        return self.loaded[key].roles

    def hash(self, found: Found) -> str | None:
        """SHA-256 of the file that a speaker answers from while it is loaded; asks nobody to wait."""
        loaded = self.loaded.get(_key(found))
        return None if loaded is None else loaded.hash

    def _want(
        self, key: Key, weights: Path, count: int, needed: Iterable[Key], load: Callable[[str], list[str]]
    ) -> None:
        version = _version(weights)
        ready = self.loaded.get(key)
        # What is gone from the disk goes on answering while it is loaded: checkpoints of a running training vanish
        if ready is not None and version in ((), ready.version):
            self.loaded.move_to_end(key)
            return
        if not version:
            raise UserError(f"{weights}: has vanished since the runs were scanned; press Refresh")
        self._drop(key)
        self._make_room(count, set(needed))
        roles, hashed = self._put(weights, load)
        self.loaded[key] = Loaded(roles, version, hashed)
        if _version(weights) != version:
            self._drop(key)
            raise UserError(f"{weights}: was written again while it was read; try once more")

    def _put(self, weights: Path, load: Callable[[str], list[str]]) -> tuple[list[str], str]:
        """Roles and hash of the weights; where either cannot be had, no role stays."""
        self._count += 1
        before = set(self.backbone.roles)
        try:
            return load(f"adapter{self._count}"), sha256_of(weights)
        except BaseException as error:
            for role in set(self.backbone.roles) - before:
                self.backbone.drop_role(role)
            if "size mismatch" in str(error):
                base = self.backbone.info.model
                raise UserError(f"{weights}: does not fit {base}; was it trained on another base?") from error
            if isinstance(error, DAMAGED) and not is_out_of_memory(error):
                reason = (str(error) or repr(error)).splitlines()[0]
                raise UserError(f"{weights}: cannot be read, it is damaged or not of this version: {reason}") from error
            raise

    def _load(self, found: Found, role: str) -> list[str]:
        assert found.weights is not None
        if reason := found.base and self.backbone.info.mismatch(dict(found.base)):
            raise UserError(f"{found.speaker.name}: was trained on {reason}; its adapter means nothing here")
        if found.lora is None:
            # PEFT would ask the hub for a config that is not there
            json.loads((found.weights.parent / "adapter_config.json").read_text(encoding="utf-8"))
            load_role(self.backbone, found.weights.parent, role)
        else:
            self.backbone.add_role(role, found.lora)
            _copy_state(self.backbone, role, found)
        return [role]

    def _make_room(self, count: int, needed: set[Key]) -> None:
        for key in [key for key in self.loaded if key not in needed]:
            if sum(len(loaded.roles) for loaded in self.loaded.values()) + count <= self.most:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        if key in self.loaded:
            for role in self.loaded.pop(key).roles:
                self.backbone.drop_role(role)


@torch.no_grad()
def _copy_state(backbone: Backbone, role: str, found: Found) -> None:
    """The weights of one role of a checkpoint; nothing else of the file is read into memory."""
    assert found.weights is not None
    state: Any = torch.load(found.weights, map_location="cpu", mmap=True, weights_only=True)
    saved = state["roles"].get(found.role)
    if saved is None:
        raise UserError(f"{found.weights}: holds no {found.role}, only {', '.join(state['roles'])}")
    ours = backbone.parameters(role)
    # A policy that shares its trunk with its value has a head behind its adapter
    if [p.shape for p in ours] != [p.shape for p in saved[: len(ours)]]:
        raise UserError(f"{found.weights}: the checkpoint does not fit {backbone.info.model} with rank {found.lora}")
    for parameter, value in zip(ours, saved, strict=False):
        parameter.copy_(value)


def _key(found: Found) -> Key:
    return (str(found.weights), found.role)


def _version(path: Path) -> tuple[int, ...]:
    """What changes when a file is written again; () where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino)
