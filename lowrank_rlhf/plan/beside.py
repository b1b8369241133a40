"""The measured peak of a finished run beside the predicted one."""

import dataclasses
from typing import Any

from lowrank_rlhf import processes
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import Run

GIB = 2**30


def compare_memory(recipe: Any, run: Run) -> None:
    """Print both peaks and keep them in run.json: `predicted_memory_gib`, and as `memory_error` predicted/measured − 1.

    On CUDA it is what torch allocated, on a CPU what was resident. A run that cannot be planned says why, and is none
    the worse.
    """
    if not processes.is_main():
        return
    try:
        longest = {part: figures["max"] for part, figures in run.info["data_report"]["tokens"].items()}
        predicted = predicted_gib(as_long_as_its_rows(recipe, longest), run.info["base"]["device"])
    except (UserError, RuntimeError, NotImplementedError, AttributeError, TypeError, KeyError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"memory: not predicted for this base: {reason}", flush=True)
        return
    peak = run.info["peak_memory_gib"]
    measured = peak.get("vram", peak["ram"])
    off = round(predicted / measured - 1, 3)
    run.record(predicted_memory_gib=round(predicted, 2), memory_error=off)
    print(f"memory: {comparison(measured, predicted)}", flush=True)


def comparison(measured: float, predicted: float) -> str:
    """
    >>> comparison(1.34, 1.29)
    '1.34 GiB measured at the peak, 1.29 predicted for its longest rows (-4 %)'
    """
    off = round(100 * (predicted / measured - 1))
    return f"{measured:.2f} GiB measured at the peak, {predicted:.2f} predicted for its longest rows ({off:+d} %)"


def as_long_as_its_rows(recipe: Any, longest: dict[str, int]) -> Any:
    """The recipe with limits no wider than the longest texts of its data; the answers of a rollout are not known.

    Args:
        longest: tokens of the longest prompt, and of the longest completion where the data has them.
    """
    limits = {part: getattr(recipe.data, f"max_{part}_tokens") for part in longest}
    fewer = {f"max_{part}_tokens": min(limits[part], most) for part, most in longest.items() if most}
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **fewer))


def predicted_gib(recipe: Any, device: str) -> float:
    """The predicted peak: on a CPU what will be resident, on CUDA what torch will allocate."""
    from lowrank_rlhf.plan.predict import place, predict

    kind, room, _ = place(device, None)
    plan = predict(recipe, device=kind, room=room)
    return (plan.peak if kind == "cpu" else plan.tensors) / GIB
