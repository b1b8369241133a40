"""Who can answer: the bare base, and every adapter and checkpoint that a folder of runs holds for that base.

A scan reads run.json, adapter_config.json and the header of each weights file, so that it takes milliseconds and can be
repeated; no weights are read. What cannot be used becomes a `Problem` with its reason in words.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_rlhf.arena.chat.files import Broken, adapter_lora, inside, lora_of_recipe, run_info
from lowrank_rlhf.arena.chat.scan import Problem, RunFolder, choose_base, mismatch, pinned_identity, readable_runs
from lowrank_rlhf.arena.votes.records import Speaker
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.errors import UserError

BASE = "base"
ANSWERING = {"sft": "sft", "dpo": "policy", "kto": "policy", "orpo": "policy", "grpo": "policy", "ppo": "policy"}
STATES = ("state.pt", "roles.pt")  # of our own loops and of trl's trainers
DEFAULT_TEMPLATE = "Instruction: {prompt}\nResponse: "


@dataclass(frozen=True)
class Limits:
    """The longest prompt and answer, in tokens, that the recipes of the runs allow; what their policies know."""

    max_prompt_tokens: int = 256
    max_completion_tokens: int = 256


@dataclass(frozen=True)
class Found:
    """Where a speaker's weights are.

    Attributes:
        speaker: without the hash of its weights, which `Engine.speaker` adds.
        weights: an adapter_model.safetensors, or a checkpoint's state; None is the bare base.
        role: whose weights those of a checkpoint are.
        lora: the options of a checkpoint's adapter; None where adapter_config.json beside the weights says them.
        base: what its run says identifies the base; empty where nobody says.
    """

    speaker: Speaker
    weights: Path | None = None
    role: str = ""
    lora: Lora | None = None
    base: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalog:
    """What one scan found.

    Attributes:
        base: what all speakers are on.
        speakers: name → where it is; the bare base first, then the runs from the newest, each with its checkpoints.
        rewards: name of a reward run → its folder.
        problems: what was left out.
        prompt_template: of a base without a chat template.
        limits: of the runs' recipes.
        identity: what a run must be made of to be on the base; None where no run says.
    """

    base: Base
    speakers: dict[str, Found]
    rewards: dict[str, Path]
    problems: list[Problem]
    prompt_template: str = DEFAULT_TEMPLATE
    limits: Limits = Limits()
    identity: tuple[Any, ...] | None = None


def find(
    runs: Path, adapters: Mapping[str, Path] = {}, base: Base | None = None, *, pinned: Catalog | None = None
) -> Catalog:
    """Scan a folder of runs (`runs/*` and `runs/*/*`), and add adapters from anywhere.

    Args:
        runs: the folder; one that does not exist has no runs. It may be a run itself.
        adapters: name → a PEFT folder, or a run directory that is not in `runs`.
        base: what the speakers must be on; None is the base of most runs, of the newest where that is a draw.
        pinned: an earlier scan whose base is loaded; its base, identity and template stay, whatever runs there are.
    """
    problems: list[Problem] = []
    found = readable_runs(runs, problems)
    if pinned is None:
        base, identity = choose_base(found, base)
    else:
        base, identity = pinned.base, pinned_identity(pinned.base, pinned.identity, pinned.prompt_template)
    speakers = {BASE: Found(_speaker(BASE, base, identity))}
    rewards: dict[str, Path] = {}
    limits, template = None, (identity and identity[-1]) or DEFAULT_TEMPLATE
    root = runs.resolve()
    for run in found:
        if reason := mismatch(run, identity):
            problems.append(Problem(run.folder, reason))
            continue
        before = len(speakers) + len(rewards)
        _add_run(run, root, speakers, rewards, problems)
        if len(speakers) + len(rewards) > before:
            limits = _wider(limits, run)
    for name, folder in adapters.items():
        try:
            _add_adapter(name, folder, speakers, base, identity)
        except Broken as error:
            problems.append(Problem(folder, str(error)))
    return Catalog(base, speakers, rewards, problems, template, limits or Limits(), identity)


def _wider(limits: Limits | None, run: RunFolder) -> Limits:
    data = run.info["recipe"]["data"]
    own = Limits(**{f.name: data[f.name] for f in dataclasses.fields(Limits) if isinstance(data.get(f.name), int)})
    if limits is None:
        return own
    return Limits(
        max(limits.max_prompt_tokens, own.max_prompt_tokens),
        max(limits.max_completion_tokens, own.max_completion_tokens),
    )


def _speaker(name: str, base: Base, identity: tuple[Any, ...] | None, **who: Any) -> Speaker:
    revision = identity[2] if identity else base.revision
    return Speaker(name, **who, base=base.model, revision=revision, quantization=base.quantization)


def _add_run(
    run: RunFolder, root: Path, speakers: dict[str, Found], rewards: dict[str, Path], problems: list[Problem]
) -> None:
    """The adapters and checkpoints of one run; weights that cannot be used are problems of their own."""
    adapters, before = run.folder / "adapters", (len(speakers), len(rewards), len(problems))
    for role in ("policy", "sft"):
        if (adapters / role).is_dir():
            name = run.name if role == "policy" or not (adapters / "policy").is_dir() else f"{run.name} sft"
            try:
                weights = _weights(adapters / role, root)
            except Broken as error:
                problems.append(Problem(adapters / role, str(error)))
                continue
            _add(name, run, speakers, role, weights=weights, lora=None)
    if (adapters / "reward" / "head.safetensors").is_file():
        try:
            _weights(adapters / "reward", root)
            rewards[run.name] = run.folder
        except Broken as error:
            problems.append(Problem(adapters / "reward", str(error)))
    _add_checkpoints(run, root, speakers, problems)
    if before == (len(speakers), len(rewards), len(problems)):
        ended = (
            "finished, but holds no adapter that answers or scores"
            if "final" in run.info
            else ("has no adapter yet: it is still training, or was stopped before its end (go on with --resume)")
        )
        problems.append(Problem(run.folder, ended))


def _add_checkpoints(run: RunFolder, root: Path, speakers: dict[str, Found], problems: list[Problem]) -> None:
    role = ANSWERING.get(str(run.info.get("stage")))
    states = sorted(p for name in STATES for p in run.folder.glob(f"checkpoints/step-*/{name}"))
    if role is None or not states:
        return
    try:
        lora = _checkpoint_lora(run, role, root)
    except Broken as error:
        problems.append(Problem(run.folder / "checkpoints", str(error)))
        return
    for state in sorted(states, reverse=True):
        step = state.parent.name.removeprefix("step-")
        if not step.isdecimal() or not inside(state, root):
            problems.append(Problem(state.parent, "is not a checkpoint of this run"))
            continue
        _add(f"{run.name} step {int(step)}", run, speakers, role, step=int(step), weights=state, lora=lora)


def _checkpoint_lora(run: RunFolder, role: str, root: Path) -> Lora:
    """The options of the adapter that trains: what the finished one says, or the one it started from, or the recipe."""
    if (run.folder / "adapters" / role / "adapter_config.json").is_file():
        return adapter_lora(run.folder / "adapters" / role)
    start = run.info["recipe"].get("policy_from")
    if not start:
        return lora_of_recipe(run.info["recipe"])
    for folder in (Path(start), root / Path(start).name, run.folder.parent / Path(start).name):
        for saved in ("policy", "sft"):
            if inside(folder, root) and (folder / "adapters" / saved / "adapter_config.json").is_file():
                return adapter_lora(folder / "adapters" / saved)
    raise Broken(f"cannot be used before the run ends: it started from {start}, which is not among these runs")


def _add(
    name: str, run: RunFolder, speakers: dict[str, Found], role: str, *, step: int | None = None, **where: Any
) -> None:
    base = run.info["base"]
    unique = name
    while unique in speakers:  # a run that is called base, or like another's checkpoint
        unique += " (run)"
    speaker = Speaker(
        unique,
        run.name,
        role,
        step,
        base=base["model"],
        revision=base.get("revision"),
        quantization=base["quantization"],
    )
    speakers[unique] = Found(speaker, role=role, base=base, **where)


def _weights(folder: Path, root: Path) -> Path:
    """The weights of an adapter folder, which lie inside `root`.

    Raises:
        Broken: they do not, or cannot be used.
    """
    if not inside(folder / "adapter_model.safetensors", root) or not inside(folder / "adapter_config.json", root):
        raise Broken("is a link that leads out of the folder of runs")
    adapter_lora(folder)
    return folder / "adapter_model.safetensors"


def _add_adapter(
    name: str, folder: Path, speakers: dict[str, Found], base: Base, identity: tuple[Any, ...] | None
) -> None:
    """An adapter from anywhere, named by the user.

    Raises:
        Broken: its name is taken, or it cannot be used.
    """
    if name in speakers:
        raise Broken(f"the name {name!r} is taken by a run; give it another one")
    run = folder.parent.parent if folder.parent.name == "adapters" else folder
    info = run_info(run) if run == folder or (run / "run.json").is_file() else None
    identified: dict[str, Any] = {}
    if info is not None:
        if reason := mismatch(RunFolder(name, folder, info), identity):
            raise Broken(reason)
        identified = info["base"]
        if run == folder:
            inner = [folder / "adapters" / role for role in ("policy", "sft")]
            folder = next((path for path in inner if path.is_dir()), inner[0])
    weights = _weights(folder, folder.resolve())
    speaker = _speaker(name, base, identity, run=name, role="adapter")
    speakers[name] = Found(speaker, weights, "adapter", base=identified)


def unknown(catalog: Catalog, name: str) -> UserError:
    """What to say of a speaker that is not in the catalog."""
    for problem in catalog.problems:
        if problem.path.name == name:
            return UserError(f"no model {name!r} here: {problem.path} {problem.reason}")
    known = ", ".join(list(catalog.speakers)[:12])
    return UserError(f"no model {name!r} here; there are: {known}; press Refresh if its run has just been written")
