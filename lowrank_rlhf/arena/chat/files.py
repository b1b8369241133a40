"""The files of run directories and adapters, read without torch and checked before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Any

from lowrank_rlhf.config import Lora

MARKS = ("recipe.yaml", "metrics.jsonl", "adapters", "checkpoints")  # a folder with one of these was a run
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


class Broken(Exception):
    """A run, adapter or checkpoint cannot be used; the message is the reason, after its path."""


def inside(path: Path, root: Path) -> bool:
    """Whether a path, links and `..` followed, is `root` or under it. A loop of links is not.

    Args:
        root: resolved.
    """
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def run_info(folder: Path) -> dict[str, Any] | None:
    """A run's run.json with all that the app reads of it; None where the folder is no run.

    Raises:
        Broken: it is one, and its run.json is not there, cannot be read, or is not of this version.
    """
    path = folder / "run.json"
    if not os.path.isfile(path):  # unlike Path's, it answers for a folder that may not be read
        if any(os.path.exists(folder / mark) for mark in MARKS) and not os.path.exists(folder / WEIGHTS):
            raise Broken("has no run.json: it was killed before it began, or was not copied whole")
        return None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Broken(f"run.json cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(info, dict):
        raise Broken("run.json is not an object")
    if isinstance(info.get("recipe"), dict) and "base" not in info:
        raise Broken("has not begun to train yet")
    try:
        recipe, base = info["recipe"], info["base"]
        asked = recipe["base"]
        words = [base["model"], base["quantization"], asked["model"], asked["quantization"]]
        words.append(recipe["data"]["prompt_template"])
        optional = (base.get("revision"), base.get("template_hash"))
        readable = all(isinstance(word, str) for word in words) and all(isinstance(o, str | None) for o in optional)
    except (KeyError, TypeError, AttributeError) as error:
        raise Broken(f"run.json is not of this version: {error!r}") from error
    if not readable:
        raise Broken("run.json is not of this version: what identifies its base is no text")
    return info


def adapter_lora(folder: Path) -> Lora:
    """The options of a saved adapter whose weights file is whole.

    Raises:
        Broken: a file is missing or damaged, or this is no plain LoRA.
    """
    config = _config(folder)
    check_safetensors(folder / WEIGHTS)
    if config.get("peft_type") != "LORA":
        raise Broken(f"adapter type {config.get('peft_type')} is not supported, only LoRA is")
    if config.get("use_dora"):
        raise Broken("uses DoRA, which cannot answer in one batch with other adapters")
    try:
        return Lora(
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            target_modules=_targets(config["target_modules"]),
            rslora=bool(config.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Broken(f"{CONFIG} is not of a LoRA: {error!r}") from error


def lora_of_recipe(recipe: dict[str, Any]) -> Lora:
    """
    Raises:
        Broken: the recipe has none.
    """
    try:
        return Lora(**{**recipe["lora"], "dropout": 0.0})
    except (KeyError, TypeError) as error:
        raise Broken(f"run.json is not of this version: lora: {error!r}") from error


def check_safetensors(path: Path) -> None:
    """Its header fits its length: a copy that was cut short is noticed without reading the weights.

    Raises:
        Broken: it does not, or there is no file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(LARGEST_HEADER, size - 8):
                raise Broken(f"{path.name} is damaged or was not copied whole")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except FileNotFoundError as error:
        raise Broken(f"has no {path.name}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Broken(f"{path.name} cannot be read: {error!r}") from error
    if 8 + length + end != size:
        raise Broken(f"{path.name} is damaged or was not copied whole: {size} bytes, expected {8 + length + end}")


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Broken(f"has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise Broken(f"{CONFIG} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise Broken(f"{CONFIG} is not an object")
    return config


def _targets(value: Any) -> str | list[str]:
    return value if isinstance(value, str) else sorted(str(name) for name in value)
