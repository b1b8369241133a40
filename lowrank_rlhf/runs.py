"""Run directories: what a training leaves behind, and how a later stage reads it.

runs/NAME/run.json        resolved recipe, what identifies the base, data hash, versions, final metrics
runs/NAME/metrics.jsonl   one line per logged step
runs/NAME/adapters/ROLE/  a PEFT folder, plus head.safetensors and a model card
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.store import load_role, save_role
from lowrank_rlhf.config import Run as RunRecipe
from lowrank_rlhf.config import as_dict
from lowrank_rlhf.errors import UserError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "datasets")


class Run:
    """A run directory, which appears with the first thing a stage writes: its data and recipe are accepted by then.

    Args:
        recipe: its `run_dir`, or an unused `runs/STAGE-N`.
        overwrite: replace an earlier run there; otherwise a non-empty folder is an error.

    Raises:
        UserError: the folder holds something and `overwrite` is off, or holds something that is not a run.
    """

    def __init__(self, recipe: RunRecipe, *, overwrite: bool = False):
        self.recipe = recipe
        stage = getattr(recipe, "stage", "run")
        self.dir = Path(recipe.run_dir) if recipe.run_dir else unused_run_dir(stage)
        self.overwrite = overwrite
        self._check_free()
        self.info: dict[str, Any] = {
            "stage": stage,
            "recipe": as_dict(recipe),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
            "seed": recipe.seed,
        }
        self._opened = False

    def _check_free(self) -> bool:
        """Whether an earlier run stands there, which may be deleted."""
        used = self.dir.exists() and (not self.dir.is_dir() or any(self.dir.iterdir()))
        if used and not self.overwrite:
            raise UserError(f"run_dir: {self.dir} is not empty; choose another run_dir or pass --overwrite")
        if used and not (self.dir / "run.json").is_file():
            raise UserError(f"run_dir: {self.dir} has no run.json, so it is not deleted; choose another run_dir")
        existing = next(path for path in (self.dir, *self.dir.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"run_dir: {self.dir} cannot be made, {existing} is not a folder that can be written")
        return used

    def record(self, **facts: Any) -> None:
        """Add facts to run.json; the first call makes the directory, in the place of the one to overwrite."""
        if not self._opened:
            # Again, because minutes of reading and loading have passed
            if self.recipe.run_dir is None:
                self.dir = unused_run_dir(self.info["stage"])
            if self._check_free():
                shutil.rmtree(self.dir)
            self.dir.mkdir(parents=True, exist_ok=True)
            self._opened = True
        self.info.update(facts)
        write_atomic(self.dir / "run.json", json.dumps(self.info, indent=2, ensure_ascii=False) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if not self._opened:
            self.record()
        with (self.dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    def save_role(self, backbone: Backbone, role: str) -> None:
        """Write `adapters/ROLE/`."""
        self.record(base=dataclasses.asdict(backbone.info))
        card = _card(role, self.info, has_head=role in backbone.heads)
        save_role(backbone, role, self.dir / "adapters" / role, card)


def load_run_role(backbone: Backbone, run_dir: str | Path, saved: str, role: str, *, key: str) -> None:
    """Add the adapter that an earlier run saved as `saved`, under the name `role`.

    Args:
        key: the recipe key that named the run, for the message.

    Raises:
        UserError: no such run or adapter, or its base, quantisation or chat template is not this one.
    """
    run_dir = Path(run_dir)
    try:
        info = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {run_dir} is not a run directory (no readable run.json)") from error
    if reason := backbone.info.mismatch(info.get("base", {})):
        raise UserError(f"{key}: {run_dir} was trained on {reason}; its adapter means nothing here")
    load_role(backbone, run_dir / "adapters" / saved, role)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file in one step: a kill leaves the old text or the new, never half of it."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def unused_run_dir(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, … that does not exist."""
    return next(path for n in itertools.count(1) if not (path := Path("runs", f"{name}-{n}")).exists())


def _card(role: str, info: dict[str, Any], *, has_head: bool) -> str:
    base = info["base"]
    head = "\n`head.safetensors` is the fp32 scalar head `linear.weight` (1, hidden), read at the last token.\n"
    return (
        f"---\nbase_model: {base['model']}\nlibrary_name: peft\ntags: [lora, lowrank-rlhf, {info['stage']}]\n---\n\n"
        f"# {role} adapter\n\nLoRA adapter for `{base['model']}` (revision `{base['revision']}`, loaded as "
        f"{base['quantization']}), trained by the {info['stage']} stage of lowrank_rlhf.\n"
        f"{head if has_head else ''}\nThe recipe, data hash and metrics are in the run's `run.json`.\n"
    )
