"""The strict loader: a YAML file plus `key.sub=value` overrides into the frozen dataclasses of `config`.

Written here rather than taken from a library because the usual choice, transformers' HfArgumentParser, corrupts
nested dataclasses and checks no types, and PyYAML reads `1e-5` as a string. Unknown keys, wrong types and missing
keys are all collected and reported at once, each with its dotted name.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.errors import UserError

T = TypeVar("T")

# Keys people bring from PEFT that cannot be honoured on a shared 4-bit base, and from trl: refused by name, with the
# reason.
REFUSED_KEYS = {
    "lora.init_lora_weights": "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA rewrite the base weights, which every role "
    "shares; adapters here start at zero",
    "lora.use_dora": "DoRA adapters cannot share a mixed-role batch; use plain LoRA (or lora.rslora=true)",
    "lora.modules_to_save": "full copies of base modules break with several adapters; heads live outside PEFT",
    **{
        f"grpo.{theirs}": f"that is trl's name; here it is {ours}"
        for theirs, ours in {
            "num_generations": "grpo.group_size",
            "num_iterations": "grpo.inner_epochs",
            "beta": "kl.coef",
            "epsilon": "grpo.clip_range",
            "epsilon_high": "grpo.clip_range_high",
            "scale_rewards": "grpo.scale_by_std",
            "loss_type": "grpo.loss_aggregation",
        }.items()
    },
    "reference_model": "the reference is never a second model; choose reference: auto, base or start",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5` as a float and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: {key.value}: the key stands here twice; keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)
# The float pattern above also matches plain integers; an integer stays an integer because it is resolved first.
_Loader.yaml_implicit_resolvers = {
    first: sorted(pairs, key=lambda pair: pair[0] != "tag:yaml.org,2002:int")
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, source: str) -> Any:
    """YAML text to plain values.

    Raises:
        UserError: not YAML, or a key written twice; names `source` and the line.

    >>> parse_yaml("learning_rate: 1e-5", "demo")
    {'learning_rate': 1e-05}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also an integer of 5000 digits, or [[[[…
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = str(getattr(error, "problem", error)).partition("\n")[0]
        raise UserError(f"{where}: not valid YAML: {problem}") from error
    except UserError as error:
        raise UserError(f"{source}, {error}") from error


# The smoke-test form of any recipe: the random two-layer model, a few rows, two steps, short texts.
TINY = (
    "base.model=tiny",
    "base.revision=",
    "lora.r=4",
    "data.max_rows=12",
    "data.max_prompt_tokens=48",
    "data.max_completion_tokens=16",
    "train.max_steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=2",
)
TINY_STAGE = {
    PPORecipe: ("rollout.batch_size=4", "ppo.minibatches=2"),
    GRPORecipe: ("rollout.batch_size=4", "grpo.minibatches=2", "grpo.group_size=2"),
}


def load_recipe(
    cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = (), *, tiny: bool = False
) -> T:
    """A recipe file and command-line overrides into a checked, frozen dataclass.

    Args:
        cls: one of the recipe classes of this module.
        path: a YAML file; None starts from the defaults.
        overrides: `key.sub=value` strings; values are read as YAML.
        tiny: the smoke-test form, which the overrides may still change.

    Raises:
        UserError: every unknown, missing or ill-typed key at once, one per line, by its dotted name.

    >>> from lowrank_rlhf.config import SFTRecipe
    >>> load_recipe(SFTRecipe, overrides=["data.train=d.jsonl", "train.learning_rate=1e-5"]).train.learning_rate
    1e-05
    """
    small = (*TINY, *TINY_STAGE.get(cls, ())) if tiny else ()
    values = recipe_values(path, (*small, *overrides))
    problems: list[str] = []
    recipe = _build(cls, values, "", problems)
    if problems:
        where = f"{path}: " if path is not None else ""
        raise UserError("\n".join(where + problem for problem in problems))
    return recipe


def recipe_values(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What a recipe file says, with overrides, unchecked.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    values: Any = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: the recipe cannot be read: {error}") from error
        values = parse_yaml(text, str(path))
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise UserError(f"{path}: a recipe is a mapping of keys to values, this is a {_name(values)}")
    for override in overrides:
        _apply_override(values, override)
    return dict(values)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as another type, so that a printed recipe reads back as itself."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
# Unquoted, YAML reads the character next line (U+0085) as a line feed
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None),
)


def as_yaml(recipe: Any) -> str:
    """The resolved recipe, or the values `as_dict` gives, as YAML that `load_recipe` reads as the same recipe."""
    values = recipe if isinstance(recipe, dict) else as_dict(recipe)
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def as_dict(recipe: Any) -> dict[str, Any]:
    """The resolved recipe as plain values, for run.json and `--dry-run`."""
    return dataclasses.asdict(recipe)


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted or not all(dotted.split(".")):
        raise UserError(f"{override!r}: an override is written key.sub=value, for example train.max_steps=10")
    *parents, last = dotted.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{dotted}: {parent} is a single value here, not a group of keys")
        node = child
    node[last] = parse_yaml(text, override) if text else None


def _build(cls: type[T], values: Mapping[str, Any], prefix: str, problems: list[str]) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    problems.extend(_unknown(f"{prefix}{key}", key, fields) for key in values if key not in fields)
    built: dict[str, Any] = {}
    for name, spec in fields.items():
        dotted = prefix + name
        if name in values:
            built[name] = _check(values[name], hints[name], dotted, problems)
            _check_range(built[name], spec, dotted, problems)
        elif dataclasses.is_dataclass(hints[name]) and spec.default_factory is MISSING:
            built[name] = _build(hints[name], {}, dotted + ".", problems)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            problems.append(f"{dotted}: missing; the recipe must set it")
            built[name] = None
    return cls(**built)


def _unknown(dotted: str, key: str, fields: Mapping[str, Any]) -> str:
    if dotted in REFUSED_KEYS:
        return f"{dotted}: refused: {REFUSED_KEYS[dotted]}"
    close = difflib.get_close_matches(str(key), fields, n=1)
    parent = dotted[: len(dotted) - len(str(key))]
    hint = f"did you mean {parent}{close[0]}?" if close else f"known keys here: {', '.join(fields)}"
    return f"{dotted}: unknown key; {hint}"


def _check(value: Any, hint: Any, dotted: str, problems: list[str]) -> Any:
    """`value` as the annotated type, or a problem and the value unchanged."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            attempt: list[str] = []
            checked = _check(value, option, dotted, attempt)
            if not attempt:
                return checked
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_check(item, args[0], f"{dotted}[{i}]", problems) for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {
                _check(k, args[0], dotted, problems): _check(v, args[1], f"{dotted}.{k}", problems)
                for k, v in value.items()
            }
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, dotted + ".", problems)  # type: ignore[arg-type]
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    problems.append(f"{dotted}: expected {_describe(hint)}, got {_name(value)} {value!r:.60}")
    return value


def _check_range(value: Any, spec: "dataclasses.Field[Any]", dotted: str, problems: list[str]) -> None:
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    if low is None or high is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not low <= value <= high:  # also catches nan
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        if low == float("-inf"):
            bounds = "a number"
        problems.append(f"{dotted}: must be {bounds}, got {value!r}")
    elif abs(value) == float("inf"):
        problems.append(f"{dotted}: must be finite")


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list of {_describe(args[0])}"
    if origin is dict:
        return f"a group of keys, each with {_describe(args[1])}"
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words[hint]


def _name(value: Any) -> str:
    words = {dict: "group", list: "list", str: "text", int: "number", float: "number", bool: "truth value"}
    return words.get(type(value), "null" if value is None else type(value).__name__)
