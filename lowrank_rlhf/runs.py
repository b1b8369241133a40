"""Run directories: what a training leaves behind, and how a later stage reads it.

runs/NAME/run.json        resolved recipe, what identifies the base, data hash, versions, final metrics
runs/NAME/recipe.yaml     the same recipe as a file to start from, or to go on with
runs/NAME/metrics.jsonl   one line per logged step
runs/NAME/samples.jsonl   a few answers of some steps, where the stage shows them
runs/NAME/adapters/ROLE/  a PEFT folder, plus head.safetensors and a model card
runs/NAME/plots/*.png     the metrics as curves
runs/NAME/checkpoints/    what is needed to go on where the run stopped
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank_rlhf import memory, processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.store import load_role, save_role
from lowrank_rlhf.cards import model_card
from lowrank_rlhf.checkpoints import Checkpoints
from lowrank_rlhf.config import Base, Data
from lowrank_rlhf.config import Run as RunRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import as_dict, as_yaml
from lowrank_rlhf.plots import plot_run
from lowrank_rlhf.tracking import Trackers, check_installed

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "datasets")

METRICS, SAMPLES, WARNINGS, RECIPE = "metrics.jsonl", "samples.jsonl", "warnings.jsonl", "recipe.yaml"
BEGUN = (RECIPE, f".{RECIPE}.tmp", ".run.json.tmp")  # all that a run holds that was killed while it was made
# Log → its length in a checkpoint: what is behind was logged later and is written again
LOGS = {METRICS: "metrics_bytes", SAMPLES: "samples_bytes", WARNINGS: "warnings_bytes"}


class Interrupted(Exception):
    """The run was asked to stop, has written a checkpoint and can go on later.

    A shell is told `status`, 128 + the signal; 0 of several processes, whose launcher takes others for a crash.
    """

    def __init__(self, run_dir: Path, step: int, signum: int = 0):
        super().__init__(f"stopped after step {step}, which is saved in {run_dir}")
        self.status = 128 + signum if signum and processes.count() == 1 else 0


class Run:
    """A run directory, which appears with the first thing a stage writes: its data and recipe are accepted by then.
    Of several processes the main one writes it, while the others call the same methods.

    Args:
        recipe: its `run_dir`, or an unused `runs/STAGE-N`.
        overwrite: replace an earlier run there; otherwise a non-empty folder is an error.
        resume: go on with the run there, from its newest checkpoint or, where there is none, from the start.

    Attributes:
        checkpoint: what to go on from, or None.
        stopping: set to make the run write a checkpoint after its current step and stop; `signum` asked for it, or 0.

    Raises:
        UserError: the folder holds something and neither flag is on, holds something that is not a run, or holds a
            run of another recipe; or several processes are to train a stage that cannot be divided.
    """

    def __init__(self, recipe: RunRecipe, *, overwrite: bool = False, resume: bool = False):
        self.recipe = recipe
        stage = getattr(recipe, "stage", "run")
        self.dir = Path(recipe.run_dir) if recipe.run_dir else unused_run_dir(stage)
        self.checkpoints = Checkpoints(self.dir / "checkpoints", recipe.save.keep)
        self.checkpoint: Path | None = None
        self.stopping, self.signum = False, 0
        self.opened = time.perf_counter()
        processes.join(stage, recipe.base.device)  # before anything touches a GPU, which is to be this process's own
        memory.begin()
        check_installed(recipe.track)
        self.trackers: Trackers | None = None
        self.overwrite, self.written = overwrite, resume
        if resume:
            self._reopen()
            return
        self._check_free()
        self.info: dict[str, Any] = {
            "stage": stage,
            "recipe": as_dict(recipe),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
            "seed": recipe.seed,
            "processes": processes.count(),
        }

    def _check_free(self) -> bool:
        """Whether an earlier run stands there, which may be deleted."""
        used = self.dir.exists() and (not self.dir.is_dir() or any(p.name not in BEGUN for p in self.dir.iterdir()))
        if used and not self.overwrite:
            raise UserError(f"run_dir: {self.dir} is not empty; choose another, or pass --resume or --overwrite")
        if used and not (self.dir / "run.json").is_file():
            raise UserError(f"run_dir: {self.dir} has no run.json, so it is not deleted; choose another run_dir")
        existing = next(path for path in (self.dir, *self.dir.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"run_dir: {self.dir} cannot be made, {existing} is not a folder that can be written")
        return used

    def _create(self) -> None:
        if processes.is_main():
            self._make_folder()
        self.dir = processes.gather(self.dir)[0]
        self.checkpoints.folder = self.dir / "checkpoints"
        self.written = True
        self.info["recipe"] = as_dict(dataclasses.replace(self.recipe, run_dir=str(self.dir)))

    def _make_folder(self) -> None:
        # Again, because minutes of reading and loading have passed
        if self.recipe.run_dir is None:
            self.dir = unused_run_dir(self.info["stage"])
        if self._check_free():
            shutil.rmtree(self.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        write_atomic(self.dir / RECIPE, as_yaml(dataclasses.replace(self.recipe, run_dir=str(self.dir))))

    def _reopen(self) -> None:
        self.info = read_run(self.dir, "--resume")
        ours, theirs = as_dict(dataclasses.replace(self.recipe, run_dir=str(self.dir))), self.info["recipe"]
        changed = [key for key in ours if ours[key] != theirs.get(key) and key not in ("save", "track")]
        if changed:
            raise UserError(
                f"--resume: {self.dir} was started with another {' and '.join(changed)}; go on with its own recipe, "
                f"--config {self.dir / RECIPE}"
            )
        self.checkpoint = self.checkpoints.latest()
        for log, length in LOGS.items():
            if processes.is_main() and (self.dir / log).exists() and not self.finished:
                written = self.checkpoint / length if self.checkpoint else None
                os.truncate(self.dir / log, int(written.read_text()) if written and written.exists() else 0)

    @property
    def finished(self) -> bool:
        return "final" in self.info

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`: by the recipe, or because a process was asked to stop."""
        asked = any(processes.gather(self.stopping))  # not kept: a signal may come while the others answer
        every = self.recipe.save.steps
        return asked or bool(every and step % every == 0)

    @contextmanager
    def write_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to fill with all that is needed to go on after `step`; only the main process's is kept.

        Raises:
            Interrupted: the run was asked to stop; the checkpoint is written.
            UserError: the disk is full.
        """
        with self.checkpoints.write(step) as folder:
            yield folder
            for log, length in LOGS.items():
                if (self.dir / log).exists():
                    (folder / length).write_text(str((self.dir / log).stat().st_size))
        if any(processes.gather(self.stopping)):  # asked since, perhaps only one of them yet
            raise Interrupted(self.dir, step, self.signum)

    @contextmanager
    def stop_on_signal(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C make the run stop after its current step; a second Ctrl-C stops it at once."""

        def stop(signum: int, frame: Any) -> None:
            print(f"{signal.Signals(signum).name}: stopping after this step …", flush=True)
            self.stopping, self.signum = True, signum
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, backbone: Backbone, data_hash: str, **facts: Any) -> None:
        """Record what the training is made of.

        Raises:
            UserError: this goes on with a run of another base or other data.
        """
        if self.checkpoint:
            reason = backbone.info.mismatch(self.info["base"])
            if self.info["data_hash"] != data_hash:
                reason = "other data: the files have changed"
            if reason:
                raise UserError(f"--resume: {self.dir} was started with {reason}")
        processes.take_mains([p for role in backbone.roles for p in backbone.parameters(role)])
        self.record(base=dataclasses.asdict(backbone.info), data_hash=data_hash, **facts)

    def record(self, **facts: Any) -> None:
        """Add facts to run.json; the first call makes the directory, in the place of the one to overwrite."""
        if not self.written:
            self._create()
        self.info.update(facts)
        write_atomic(self.dir / "run.json", json.dumps(self.info, indent=2, ensure_ascii=False) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and tell the trackers."""
        self.append(METRICS, [{"step": step, **metrics}])
        if processes.is_main():
            self.trackers = self.trackers or Trackers(self.recipe.track, self.dir, self.info["recipe"])
            self.trackers.log(step, metrics)

    def append(self, log: str, rows: list[dict[str, Any]]) -> None:
        """Add lines to one of `LOGS`. Those of a step come before its checkpoint, or a resumed run lacks them."""
        if not self.written:
            self.record()
        if processes.is_main():
            with (self.dir / log).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def finish(self, **final: Any) -> None:
        """Draw the plots and record the final metrics, time and peak of memory: nothing is left to do."""
        if processes.is_main():
            plot_run(self.dir)
        if self.trackers is not None:
            self.trackers.close()
        minutes = round((time.perf_counter() - self.opened) / 60, 1)  # of this process, where the run was resumed
        self.record(final=final, minutes=minutes, peak_memory_gib=memory.peak_memory_gib())

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.dir / METRICS).read_text(encoding="utf-8").splitlines()]

    def save_role(self, backbone: Backbone, role: str, metrics: dict[str, float]) -> None:
        """Write `adapters/ROLE/`, its card with the last metrics."""
        self.record(base=dataclasses.asdict(backbone.info))
        if processes.is_main():
            card = model_card(role, self.info, metrics, has_head=role in backbone.heads)
            save_role(backbone, role, self.dir / "adapters" / role, card)


def load_run_role(backbone: Backbone, run_dir: str | Path, saved: str, role: str, *, key: str) -> None:
    """Add the adapter that an earlier run saved as `saved`, under the name `role`.

    Args:
        key: the recipe key that named the run, for the message.

    Raises:
        UserError: no such run or adapter, or its base, quantisation or chat template is not this one.
    """
    run_dir = Path(run_dir)
    info = read_run(run_dir, key)
    if reason := backbone.info.mismatch(info.get("base", {})):
        raise UserError(f"{key}: {run_dir} was trained on {reason}; its adapter means nothing here")
    load_role(backbone, run_dir / "adapters" / saved, role)


def read_run(run_dir: Path, key: str) -> dict[str, Any]:
    """A run's run.json.

    Raises:
        UserError: there is none; names `key`, which asked for it.
    """
    try:
        return dict(json.loads((run_dir / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {run_dir} is not a run directory (no readable run.json)") from error


def recipe_base_and_data(run_dir: Path, source: str, **changed: Any) -> tuple[Base, Data]:
    """The base of a run on this machine's device, and how the run renders and cuts texts, for those of `source`.

    Raises:
        UserError: not a run, or one of another version.
    """
    info = read_run(run_dir, "RUN")
    try:
        base, data = info["recipe"]["base"], info["recipe"]["data"]
        kept = {key: data[key] for key in ("prompt_template", "max_prompt_tokens", "max_completion_tokens")}
        return Base(**{**base, "device": "auto"}), Data(source, **{**kept, **changed})
    except (KeyError, TypeError) as error:
        raise UserError(f"{run_dir}/run.json: not a run of this version: {error!r}") from error


def write_atomic(path: Path, text: str) -> None:
    """Replace a file in one step: a kill leaves the old text or the new, never half of it. The main process does."""
    if not processes.is_main():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def unused_run_dir(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, … that does not exist."""
    return next(path for n in itertools.count(1) if not (path := Path("runs", f"{name}-{n}")).exists())
