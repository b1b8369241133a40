"""The run directories of a folder, and what they must have in common to be on one base."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_rlhf.arena.chat.files import Broken, inside, run_info
from lowrank_rlhf.config import Base

NO_CHAT_TEMPLATE = hashlib.sha256(b"null").hexdigest()[:16]  # the template_hash of a base without one
IDENTITY = ("model", "quantization", "revision", "template_hash")
REASONS = {
    "model": "another base model",
    "quantization": "another quantisation",
    "revision": "another revision of the base",
    "template_hash": "another chat template",
    "prompt_template": "another data.prompt_template",
}


@dataclass(frozen=True)
class Problem:
    """A run, adapter or checkpoint that cannot be used, and why, in words."""

    path: Path
    reason: str


@dataclass
class RunFolder:
    """A readable run directory."""

    name: str
    folder: Path
    info: dict[str, Any]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What runs must have in common; the prompt template counts where there is no chat template."""
        base = self.info["base"]
        no_template = base.get("template_hash") == NO_CHAT_TEMPLATE
        own = self.info["recipe"]["data"]["prompt_template"] if no_template else None
        return (*(base.get(key) for key in IDENTITY), own)


def readable_runs(runs: Path, problems: list[Problem]) -> list[RunFolder]:
    """The readable runs, the newest first; a broken one becomes a problem, a folder that is no run is passed by."""
    root = runs.resolve()
    found: list[RunFolder] = []
    for name, folder in _folders(runs):
        if not inside(folder, root):
            problems.append(Problem(folder, f"is a link that leads out of {runs}; name it with --adapter instead"))
            continue
        try:
            info = run_info(folder)
        except Broken as error:
            problems.append(Problem(folder, str(error)))
            continue
        if info is not None:
            found.append(RunFolder(name, folder, info))
    return sorted(found, key=_age)


def _folders(runs: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of whatever may be a run; the folders of a folder that is none are the next to look at."""
    if os.path.isfile(runs / "run.json"):
        yield runs.resolve().name, runs
        return
    for folder in _subfolders(runs):
        yield folder.name, folder
        if not os.path.isfile(folder / "run.json") and inside(folder, runs.resolve()):
            yield from ((f"{folder.name}/{inner.name}", inner) for inner in _subfolders(folder))


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir())
    except OSError:  # not there yet, or removed meanwhile
        return []


def _age(run: RunFolder) -> float:
    try:
        return -(run.folder / "run.json").stat().st_mtime
    except OSError:
        return 0.0


def pinned_identity(base: Base, identity: tuple[Any, ...] | None, prompt_template: str) -> tuple[Any, ...]:
    """What a run must be made of to be on a base that is loaded, with the template that its prompts are written in."""
    *known, template = identity or (base.model, base.quantization, base.revision, None, None)
    return (*known, template or prompt_template)


def choose_base(found: list[RunFolder], base: Base | None) -> tuple[Base, tuple[Any, ...] | None]:
    """The base of the app, and what a run must be made of to be on it; None where no run says."""
    fitting = [r for r in found if base is None or _is_of(r, base)]
    if not fitting:
        return base or Base(), None if base is None else (base.model, base.quantization, base.revision, None, None)
    # The newest is counted first, so it wins a draw
    identity = Counter(run.identity for run in fitting).most_common(1)[0][0]
    chosen = next(run for run in fitting if run.identity == identity)
    return base or _base_of(chosen), identity


def _is_of(run: RunFolder, base: Base) -> bool:
    info = run.info["base"]
    return (info.get("model"), info.get("quantization")) == (base.model, base.quantization) and (
        base.revision in (None, info.get("revision"))
    )


def _base_of(run: RunFolder) -> Base:
    recipe = run.info["recipe"]["base"]
    return Base(recipe["model"], recipe["quantization"], "auto", recipe.get("revision"))


def mismatch(run: RunFolder, identity: tuple[Any, ...] | None) -> str | None:
    """In words, why a run is not on the app's base; None where it is."""
    if identity is None:
        return None
    for key, here, theirs in zip(REASONS, identity, run.identity, strict=True):
        # A run on a base with a chat template has no prompt template
        if here not in (None, theirs) and not (theirs is None and key == "prompt_template"):
            fix = f"; start the app with --base {theirs}" if key == "model" else ""
            return f"is on {REASONS[key]} ({theirs!r}, here {here!r}), so its adapter means nothing here{fix}"
    return None
