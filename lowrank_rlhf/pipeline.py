"""One command from data to aligned policies side by side; a stage whose inputs are unchanged is kept.

DIR/STAGE/         a run directory for each stage, as the stage alone leaves it
DIR/inputs.json    what each of them was made from, as a hash
DIR/comparison/    base, SFT and every aligned policy on the same prompts: report, answers, plots
DIR/report.md      one table of it, with minutes and memory
"""

import dataclasses
import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from lowrank_rlhf import __version__, processes
from lowrank_rlhf.backbone.embedded import sha256_of
from lowrank_rlhf.data import Examples
from lowrank_rlhf.data.files import source_hash
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.evaluation.policy import PolicyEvaluation, compare_policies, read_prompts
from lowrank_rlhf.loader import as_dict
from lowrank_rlhf.pipeline_recipes import COMPARISON, REWARD, SFT, Pipeline
from lowrank_rlhf.pipeline_report import write_pipeline_report
from lowrank_rlhf.plan.beside import compare_memory
from lowrank_rlhf.runs import Interrupted, Run, write_atomic

INPUTS = "inputs.json"
SHOWN = 3  # prompts whose answers are printed at the end


def run_pipeline(pipeline: Pipeline) -> Path:
    """Train what is not there yet, compare, report; returns the folder.

    Raises:
        Interrupted: a stage was asked to stop; the same pipeline goes on from there.
        UserError: prompts that do not fit are told before anything trains; or this is one of several processes.
    """
    if processes.started() > 1:
        raise UserError("pipeline: several processes cannot share it; start it as one, or each stage alone")
    prompts = read_prompts(evaluation(pipeline))
    for name, recipe in pipeline.recipes.items():
        print(f"\npipeline: {name}", flush=True)
        run_stage(name, recipe, pipeline.folder)
    compare(pipeline, prompts)
    report = write_pipeline_report(pipeline.folder, list(pipeline.recipes))
    print(f"pipeline: {report}", flush=True)
    return pipeline.folder


def run_stage(name: str, recipe: Any, folder: Path) -> None:
    """Train a stage, go on with it, or keep it."""
    if is_changed(folder, name, stage_inputs(recipe)):
        put_aside(folder / name)
        remember(folder, name, stage_inputs(recipe))
    run = Run(recipe, resume=(folder / name / "run.json").is_file())
    if run.finished:
        print(f"{name}: unchanged, kept as it is in {run.dir}", flush=True)
        return
    with run.stop_on_signal():
        importlib.import_module(f"lowrank_rlhf.stages.{recipe.stage}").train(recipe, run)
    if run.stopping:  # asked after the last step that a checkpoint is written for
        raise Interrupted(run.dir, int(run.metrics()[-1]["step"]), run.signum)
    compare_memory(recipe, run)


def evaluation(pipeline: Pipeline) -> PolicyEvaluation:
    """The policies against SFT, where there is one."""
    folder, settings = pipeline.folder, pipeline.settings.comparison
    return PolicyEvaluation(
        runs=tuple(str(folder / name) for name in pipeline.policies),
        prompts=settings.prompts,
        format=settings.format,
        columns=settings.columns,
        on_bad_row=settings.on_bad_row,
        reward_from=str(folder / REWARD) if REWARD in pipeline.recipes else None,
        gold=settings.gold,
        against=str(folder / SFT) if SFT in pipeline.recipes else "base",
        samples=settings.samples,
        batch_size=settings.batch_size,
        out=str(folder / COMPARISON),
    )


def compare(pipeline: Pipeline, prompts: Examples) -> None:
    """All policies on the held-out prompts."""
    folder, settings, asked = pipeline.folder, evaluation(pipeline), pipeline.settings.comparison.max_prompts
    inputs = {
        "settings": dataclasses.asdict(settings) | {"max_prompts": asked},
        "prompts": source_hash(settings.prompts),
        "adapters": {name: adapter_hashes(folder / name) for name in pipeline.recipes},
    }
    report = folder / COMPARISON / "report.json"
    if is_changed(folder, COMPARISON, inputs) and report.is_file():
        put_aside(report.parent)
    if report.is_file():
        print(f"\ncomparison: unchanged, kept as it is in {report.parent}", flush=True)
        return
    if report.parent.is_dir():
        shutil.rmtree(report.parent)  # answers without a report: it was interrupted, and makes them again
    remember(folder, COMPARISON, inputs)
    compare_policies(settings, prompts.subset(range(len(prompts))[:asked]), show=SHOWN)


# What a stage was made from


def stage_inputs(recipe: Any) -> dict[str, Any]:
    """All that decides what a stage learns: its recipe, its data and the adapters it starts from."""
    values = as_dict(recipe)
    for key in ("save", "track"):  # how often it is saved changes nothing
        del values[key]
    runs = [values["policy_from"]] if values.get("policy_from") else []
    runs += [source["run"] for source in values.get("reward_from", [])]
    mixed = recipe.ptx.data if hasattr(recipe, "ptx") else None
    return {
        "recipe": values,
        "data": data_hash(recipe.data, mixed),
        "adapters": {run: adapter_hashes(Path(run)) for run in runs},
        "version": __version__,
    }


def adapter_hashes(run_dir: Path) -> dict[str, str]:
    files = sorted(run_dir.glob("adapters/*/*.safetensors"))
    return {str(path.relative_to(run_dir)): sha256_of(path) for path in files}


def is_changed(folder: Path, name: str, inputs: dict[str, Any]) -> bool:
    return known_inputs(folder).get(name) != hash_of(inputs)


def remember(folder: Path, name: str, inputs: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = known_inputs(folder) | {name: hash_of(inputs)}
    write_atomic(folder / INPUTS, json.dumps(known, indent=2) + "\n")


def known_inputs(folder: Path) -> dict[str, str]:
    path = folder / INPUTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def hash_of(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def put_aside(path: Path) -> None:
    """Rename what was made from other inputs to PATH.before-N: nothing is lost."""
    if not path.exists():
        return
    n = 1
    while (target := path.with_name(f"{path.name}.before-{n}")).exists():
        n += 1
    path.rename(target)
    print(f"{path.name}: made from other data or another recipe; the earlier one is now {target}", flush=True)
