"""What a recipe needs on another machine: its data files, runs and modules, and the recipe with their paths there."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_rlhf.config_pipeline import RECIPES
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import as_dict, as_yaml, load_recipe
from lowrank_rlhf.pipeline_recipes import load_pipeline

PIPELINE = "pipeline"
INPUTS = "inputs"  # below the working directory there: what lies elsewhere here, or in a run
DATA = re.compile(r"\.(json|jsonl|csv)(\.gz)?$|\.parquet$", re.IGNORECASE)
MODULE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):\w+")
SKIPPED = {"checkpoints", "__pycache__"}


@dataclass
class Shipment:
    """A recipe that is to run elsewhere.

    Attributes:
        stage: of the recipe; `pipeline` for several.
        run_dir: where the recipe writes, None for a new folder.
        files: on this machine, as absolute paths, with their place below the working directory there.
        needs: (key, folder) of runs that are not here, so they must be there.
    """

    stage: str
    values: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    needs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def run_dir(self) -> str | None:
        given: str | None = self.values["run_dir"]
        return given

    def recipes(self, folder: str, run_dir: str) -> dict[str, str]:
        """Name → text of the recipe files, to be put into `folder` there."""
        values = {**self.values, "run_dir": run_dir}
        if self.stage == PIPELINE:
            values |= {"stages": {name: f"{folder}/{name}.yaml" for name in self.stages}, "more": {}}
        return {"recipe.yaml": as_yaml(values), **{f"{name}.yaml": as_yaml(v) for name, v in self.stages.items()}}

    def commands(self, folder: str, run_dir: str, overwrite: bool) -> dict[str, list[str]]:
        """The command line's words that start it there, and those that go on with it."""
        start = [self.stage, "--config", f"{folder}/recipe.yaml"]
        if self.stage == PIPELINE:
            return {"command": start, "resume_command": start}
        again = [self.stage, f"--config={run_dir}/recipe.yaml", "--resume"]  # its name may begin with a dash
        return {"command": [*start, *(["--overwrite"] if overwrite else [])], "resume_command": again}


def read_shipment(path: str, overrides: Sequence[str], *, tiny: bool = False, everything: bool = False) -> Shipment:
    """Read a recipe as the command line would, and find what it names of this machine.

    Raises:
        UserError: the recipe does not fit, its file does not say of which stage it is, or a file is not here.
    """
    stage = stage_of(path)
    if stage == PIPELINE:
        pipeline = load_pipeline(path, overrides, run_dir=None, everything=everything, tiny=tiny)
        stages = {name: as_dict(recipe) for name, recipe in pipeline.recipes.items()}
        shipment = Shipment(stage, as_dict(pipeline.settings), stages)
    elif everything:
        raise UserError("--all: only a pipeline has more stages")
    else:
        shipment = Shipment(stage, as_dict(load_recipe(RECIPES[stage], path, overrides, tiny=tiny)))
    _check_run_dir(shipment.run_dir)
    made = shipment.run_dir if stage == PIPELINE else None
    for values in (shipment.values, *shipment.stages.values()):
        for holder, key, dotted, kind in _places(values):
            holder[key] = _sent(shipment, holder[key], dotted, kind, made)
    return shipment


def stage_of(path: str) -> str:
    """The stage by the name of its recipe: the first word of `ppo_from_sft.yaml`, or that of the run it lies in.

    >>> stage_of("recipes/ppo_from_sft.yaml")
    'ppo'

    Raises:
        UserError: the name says nothing.
    """
    known = (*RECIPES, PIPELINE)
    word = re.split(r"[_.-]", Path(path).name)[0]
    if word in known and not path.endswith(".py"):
        return word
    if path.endswith(".py"):
        raise UserError(f"{path}: give the recipe, a YAML file such as recipes/{Path(path).stem}.yaml, not a script")
    if Path(path).is_file() and (info := Path(path).with_name("run.json")).is_file():
        return str(as_json(info)["stage"])
    raise UserError(f"{path}: the file's name is to begin with its stage ({', '.join(known)}), as in ppo_mine.yaml")


def as_json(path: Path) -> Any:
    import json

    return json.loads(path.read_text(encoding="utf-8"))


def _check_run_dir(run_dir: str | None) -> None:
    if run_dir is not None and (_is_elsewhere(run_dir) or Path(run_dir) == Path()):
        raise UserError(f"run_dir: {run_dir} is to lie below the working directory, as runs/NAME does")


def _is_elsewhere(path: str) -> bool:
    return Path(path).is_absolute() or ".." in Path(path).parts


def _places(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, str]]:
    """(the group, the key, its dotted name, what it names) of every key that names something on this machine."""
    for group, key, kind in (
        ("data", "train", "data"),
        ("data", "eval", "data"),
        ("ptx", "data", "data"),
        ("comparison", "prompts", "data"),
        ("comparison", "gold", "module"),
        ("reward_model", "init_from", "run"),
        ("base", "model", "model"),
    ):
        if values.get(group) and values[group].get(key):
            yield values[group], key, f"{group}.{key}", kind
    for key, kind in (("policy_from", "run"), ("reward", "module")):
        if values.get(key):
            yield values, key, key, kind
    for number, source in enumerate(values.get("reward_from") or []):
        yield source, "run", f"reward_from.{number}.run", "run"


def _sent(shipment: Shipment, value: str, dotted: str, kind: str, made: str | None) -> str:
    """The value as it is there; what it names here is added to the shipment."""
    if kind == "data":
        if not Path(value).is_file():
            if DATA.search(value):
                raise UserError(f"{dotted}: there is no file {value} here")
            return value  # of the hub
        return _add(shipment, value)
    if kind == "model":
        return _add(shipment, value) if (Path(value) / "config.json").is_file() else value
    if kind == "module":
        if found := MODULE.fullmatch(value):
            _add_module(shipment, found[1])
        return value
    if made is not None and Path(made) in Path(value).parents:
        return value  # an earlier stage's
    if (Path(value) / "run.json").is_file():
        return _add(shipment, value)
    if _is_elsewhere(value):
        raise UserError(f"{dotted}: {value} is neither a run here nor below the working directory there")
    shipment.needs.append((dotted, value))
    return value


def _add(shipment: Shipment, path: str) -> str:
    """Add a file, or a folder without checkpoints; returns its place there."""
    whole = Path(os.path.abspath(path))
    for file in [whole] if whole.is_file() else _below(whole):
        shipment.files[str(file)] = _place(file)
    return _place(whole)


def _place(path: Path) -> str:
    """A file below the working directory has the same place there; what lies elsewhere, or in a run, which could be
    another run there, is put into `inputs/` with its whole path."""
    here = Path.cwd()
    if here not in path.parents or any((folder / "run.json").is_file() for folder in (path, *path.parents)):
        return f"{INPUTS}{path}"
    return str(path.relative_to(here))


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _add_module(shipment: Shipment, module: str) -> None:
    """Add a module of the working directory with the Python files beside it, or those of its package."""
    first, _, rest = module.partition(".")
    here = Path.cwd()
    if not rest and (here / f"{first}.py").is_file():
        files = sorted(here.glob("*.py"))
    elif (here / first).is_dir():
        files = [path for path in _below(here / first) if path.suffix == ".py"]
    else:
        return  # an installed package's
    shipment.files |= {str(file): _place(file) for file in files}
