"""`lowrank-rlhf plan`: its arguments, what it says, and the recipe that it writes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_rlhf.config_pipeline import RECIPES
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import as_yaml, load_recipe, recipe_values
from lowrank_rlhf.pipeline_recipes import load_pipeline
from lowrank_rlhf.quiet import quiet
from lowrank_rlhf.remote.shipment import PIPELINE, stage_of

if TYPE_CHECKING:
    from lowrank_rlhf.plan.predict import Plan

GIB = 2**30
ABOUT = (
    "Does it fit? The peak of memory of a recipe by phase and component, every row as long as its limits allow, and, "
    "where it does not fit, the cheapest changes after which it does. From the model's config alone, offline for the "
    "bases of the shipped recipes. Estimated for cards, tested on a CPU. How long a step takes is measured by `bench`."
)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe (YAML), or a pipeline's: then each of its stages")
    parser.add_argument(
        "--gpu", metavar="GB", type=float, help="for a card of 8, 12, 16, 24 … GiB (default: for this machine)"
    )
    parser.add_argument(
        "--fit", metavar="GB", type=float, help="write the recipe that fits such a card beside it: NAME_12gb.yaml"
    )
    parser.add_argument("--out", metavar="FILE", help="write it here instead")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")


def plan(args: argparse.Namespace) -> int:
    """0 where it fits or the recipe that does was written, else 1."""
    if args.out and args.fit is None:
        raise UserError("--out: says where --fit GB writes; give --fit too")
    for flag in ("gpu", "fit"):
        if (size := getattr(args, flag)) is not None and not 1 <= size <= 1024:
            raise UserError(f"--{flag}: the memory of a card in GiB, such as 12, not {size:g}")
    stage = stage_of(args.recipe)
    if stage == PIPELINE:
        if args.fit is not None:
            raise UserError("--fit: writes one stage's recipe; give that instead of a pipeline's")
        pipeline = load_pipeline(args.recipe, args.overrides, run_dir=None, everything=True, tiny=False)
        recipes = pipeline.recipes
    else:
        recipes = {stage: load_recipe(RECIPES[stage], args.recipe, args.overrides)}
    quiet()
    sizes = [size for size in (args.fit, args.gpu) if size is not None]
    return max(_plan_one(name, recipe, sizes[0] if sizes else None, args) for name, recipe in recipes.items())


def _plan_one(name: str, recipe: Any, gib: float | None, args: argparse.Namespace) -> int:
    from lowrank_rlhf.plan.fit import PRICES, changed, check, make_fit, value_of
    from lowrank_rlhf.plan.predict import place
    from lowrank_rlhf.plan.table import peak_line, table

    check(recipe)
    device, room, where = place(recipe.base.device, gib)
    planner = _remembering(device, room)
    found = planner(recipe)
    print(f"{name} of {recipe.base.model} on {where}\n\n{table(found)}\n\n{peak_line(found)}")
    if device == "cpu" and recipe.train.gradient_checkpointing:
        print("on a CPU with checkpointing more stays resident than this says: 0.6 GiB in the one run measured")
    if found.peak <= room:
        print(f"fits {where}" + ("; nothing to change, so nothing is written" if args.fit is not None else ""))
        return 0
    print(f"does not fit {where}")
    changes = make_fit(recipe, planner, room)
    if changes is None:
        print("no change of this recipe makes it fit; take a smaller base.model, or a larger card")
        return 1
    print("the cheapest changes after which it does:")
    for key, value in changes.items():
        print(f"  {key}={_plain(value)}  # was {_plain(value_of(recipe, key))}; {PRICES[key]}")
    peak = planner(changed(recipe, changes)).peak / GIB
    print(f"with {'these' if len(changes) > 1 else 'this'} the peak is {peak:.2f} GiB")
    if args.fit is None:
        return 1
    words = [f"{key}={_plain(value)}" for key, value in changes.items()]
    path = _write(args, recipe.stage, words, f"{peak:.1f} GiB")
    print(f"written to {path}")
    return 0


def _write(args: argparse.Namespace, stage: str, changes: list[str], peak: str) -> Path:
    """The recipe with its overrides and these changes, as a file.

    Raises:
        UserError: the file is there already.
    """
    source = Path(args.recipe)
    stem = source.stem if source.stem != "recipe" else stage  # of a run directory; the name is to say the stage
    path = Path(args.out) if args.out else source.with_name(f"{stem}_{args.fit:g}gb.yaml")
    values = recipe_values(source, [*args.overrides, *changes])
    head = (
        f"# lowrank-rlhf {stage} --config {path}\n# not measured; {source} for a card of {args.fit:g} GiB: "
        f"{' '.join(changes)}; peak by `plan` {peak}\n"
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(head + as_yaml(values))
    except FileExistsError as error:
        raise UserError(f"--fit: {path} is there already; remove it, or choose another with --out FILE") from error
    return path


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _remembering(device: str, room: int) -> "Callable[[Any], Plan]":
    from lowrank_rlhf.plan.predict import Plan, predict

    known: dict[str, Plan] = {}

    def planner(recipe: Any) -> Plan:
        key = as_yaml(recipe)
        if key not in known:
            known[key] = predict(recipe, device=device, room=room)
        return known[key]

    return planner
