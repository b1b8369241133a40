"""Typed recipes and the strict loader: a YAML file plus `key.sub=value` overrides into frozen dataclasses.

Written here rather than taken from a library because the usual choice, transformers' HfArgumentParser, corrupts
nested dataclasses and checks no types, and PyYAML reads `1e-5` as a string. Unknown keys, wrong types and missing
keys are all collected and reported at once, each with its dotted name.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from lowrank_rlhf.errors import UserError

T = TypeVar("T")


def ranged(default: Any, low: float, high: float = float("inf")) -> Any:
    """A numeric field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Base:
    """The one base model. `model`: `smollm2-135m-instruct` (embedded), a hub id, a local folder, or `tiny`."""

    model: str = "smollm2-135m-instruct"
    quantization: Literal["nf4", "none"] = "nf4"
    device: str = "auto"
    revision: str | None = None


@dataclass(frozen=True)
class Lora:
    """Every role's adapter. `target_modules`: `all-linear`, or a list of module names (never lm_head)."""

    r: int = ranged(16, 1)
    alpha: float = ranged(32, 0)
    dropout: float = ranged(0.0, 0, 1)
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False


@dataclass(frozen=True)
class Data:
    """Where examples come from. Without `eval`, `eval_fraction` of the prompts of `train` are held out, by prompt.

    `columns` renames, ours: theirs. `loss_on`: SFT learns the last answer of a dialogue, or all the assistant's turns.
    """

    train: str
    eval: str | None = None
    eval_fraction: float = ranged(0.1, 0, 0.9)
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: Literal["error", "skip"] = "error"
    loss_on: Literal["last", "all"] = "last"
    prompt_template: str = "Instruction: {prompt}\nResponse: "
    max_rows: int | None = ranged(None, 2)
    max_prompt_tokens: int = ranged(256, 1)
    max_completion_tokens: int = ranged(256, 1)


@dataclass(frozen=True)
class Train:
    """Supervised training. `batch_size` sequences (or pairs) per optimizer step, `micro_batch_size` per forward."""

    epochs: float = ranged(1.0, 0)
    max_steps: int | None = ranged(None, 1)
    batch_size: int = ranged(16, 1)
    micro_batch_size: int = ranged(4, 1)
    learning_rate: float = ranged(2e-4, 0)
    warmup_ratio: float = ranged(0.05, 0, 1)
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = ranged(0.0, 0)
    max_grad_norm: float = ranged(1.0, 0)
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class PPOTrain:
    """`max_steps` counts rollout iterations, `batch_size` the prompts of each, `micro_batch_size` those per forward."""

    max_steps: int = ranged(20, 1)
    batch_size: int = ranged(16, 1)
    micro_batch_size: int = ranged(4, 1)
    learning_rate: float = ranged(1e-4, 0)
    warmup_ratio: float = ranged(0.0, 0, 1)
    lr_schedule: Literal["linear", "cosine", "constant"] = "constant"
    weight_decay: float = ranged(0.0, 0)
    max_grad_norm: float = ranged(1.0, 0)
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Eval:
    """Held-out evaluation every `steps` optimizer steps, besides step 0 and the end. None: only those two."""

    steps: int | None = ranged(None, 1)


@dataclass(frozen=True)
class RewardModel:
    """`init_from`: a run whose `sft` adapter the reward adapter starts as a copy of; None starts it at zero."""

    init_from: str | None = None


@dataclass(frozen=True)
class RewardSource:
    """A reward run and its weight in the sum of scores."""

    run: str
    weight: float = ranged(1.0, float("-inf"))


@dataclass(frozen=True)
class PPO:
    """The update. `inner_epochs` passes over each rollout batch, cut into `minibatches` optimizer steps."""

    inner_epochs: int = ranged(2, 1)
    minibatches: int = ranged(2, 1)
    clip_range: float = ranged(0.2, 0)
    value_clip_range: float = ranged(0.2, 0)
    gamma: float = ranged(1.0, 0, 1)
    gae_lambda: float = ranged(0.95, 0, 1)
    whiten: bool = True


@dataclass(frozen=True)
class Rollout:
    """Sampling. The defaults sample from exactly the distribution that is scored."""

    batch_size: int = ranged(16, 1)
    temperature: float = ranged(1.0, 1e-3)
    top_p: float = ranged(1.0, 1e-6, 1)
    top_k: int = ranged(0, 0)
    missing_eos_penalty: float = ranged(0.0, 0)


@dataclass(frozen=True)
class KL:
    """The leash: `coef` score units per nat of KL to the reference, inside the reward."""

    coef: float = ranged(0.05, 0)
    estimator: Literal["k1", "k3"] = "k1"


@dataclass(frozen=True)
class ValueModel:
    """`init: auto` copies the reward adapter and head where there is one, else starts at zero."""

    init: Literal["auto", "reward", "policy", "zero"] = "auto"
    learning_rate: float = ranged(1e-4, 0)


@dataclass(frozen=True)
class Run:
    """Keys every recipe has. Without `run_dir` the run gets an unused `runs/NAME`."""

    run_dir: str | None = None
    seed: int = ranged(0, 0)
    base: Base = field(default_factory=Base)
    lora: Lora = field(default_factory=Lora)


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(Run):
    stage = "sft"
    data: Data
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(Run):
    stage = "reward"
    data: Data
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    reward_model: RewardModel = field(default_factory=RewardModel)


@dataclass(frozen=True, kw_only=True)
class PPORecipe(Run):
    stage = "ppo"
    data: Data
    train: PPOTrain = field(default_factory=PPOTrain)
    policy_from: str | None = None
    reward_from: list[RewardSource] = field(default_factory=list)
    reward: str | None = None
    reference: Literal["auto", "base", "start"] = "auto"
    ppo: PPO = field(default_factory=PPO)
    rollout: Rollout = field(default_factory=Rollout)
    kl: KL = field(default_factory=KL)
    value_model: ValueModel = field(default_factory=ValueModel)


# Keys people bring from PEFT that cannot be honoured on a shared 4-bit base: refused by name, with the reason.
REFUSED_KEYS = {
    "lora.init_lora_weights": "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA rewrite the base weights, which every role "
    "shares; adapters here start at zero",
    "lora.use_dora": "DoRA adapters cannot share a mixed-role batch; use plain LoRA (or lora.rslora=true)",
    "lora.modules_to_save": "full copies of base modules break with several adapters; heads live outside PEFT",
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
TINY_PPO = ("rollout.batch_size=4", "ppo.minibatches=2")


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

    >>> load_recipe(SFTRecipe, overrides=["data.train=d.jsonl", "train.learning_rate=1e-5"]).train.learning_rate
    1e-05
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
    small = (*TINY, *TINY_PPO) if issubclass(cls, PPORecipe) else TINY
    for override in (*(small if tiny else ()), *overrides):
        _apply_override(values, override)
    problems: list[str] = []
    recipe = _build(cls, values, "", problems)
    if problems:
        where = f"{path}: " if path is not None else ""
        raise UserError("\n".join(where + problem for problem in problems))
    return recipe


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as another type, so that a printed recipe reads back as itself."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def as_yaml(recipe: Any) -> str:
    """The resolved recipe as YAML that `load_recipe` reads as the same recipe."""
    return str(yaml.dump(as_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


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
