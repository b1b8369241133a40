"""The rewards of a recipe: reward adapters on the shared base and whatever scores texts, as one weighted sum."""

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import OnPolicyRecipe, RewardSource
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards.functions import reward_function, short_name
from lowrank_rlhf.rewards.scored import Reward, Scored
from lowrank_rlhf.runs import load_run_role, read_run
from lowrank_rlhf.scoring import score_sequences

Combine = Literal["mean", "min", "mean_minus_std"]
REWARD = "reward"  # the first member of a run's ensemble, and where it has no others the only one


class AdapterReward:
    """The frozen reward roles of one run on the shared base: one, or the members of an ensemble.

    Args:
        roles: of the members.
        source: how their scores are combined.
    """

    def __init__(self, backbone: Backbone, roles: SequenceOf[str], source: RewardSource, micro_batch_size: int):
        self.backbone, self.roles, self.source, self.micro_batch_size = backbone, roles, source, micro_batch_size

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> Scored:
        members = self.members(sequences)
        scores = combine(members, self.source.combine, self.source.std_coef)
        return Scored(scores.tolist(), members.std(dim=0, correction=0).tolist())

    def members(self, sequences: SequenceOf[Sequence], *, show: bool = False) -> Tensor:
        """The score of each sequence by each member. Shape (members, B).

        Args:
            show: a progress bar for each member.
        """
        passes = [
            score_sequences(
                self.backbone,
                role,
                sequences,
                self.micro_batch_size,
                label=f"scoring, batches of {role}" if show else None,
            )
            for role in self.roles
        ]
        return torch.tensor(passes, dtype=torch.float64)


def reward_source(run: str, combine: Combine = "mean", std_coef: float = 1.0) -> RewardSource:
    """What the flags --combine and --std-coef say of a run's ensemble.

    Raises:
        UserError: a coefficient that is out of bounds, or that this way to combine does not use.
    """
    if not 0 <= std_coef < math.inf:
        raise UserError(f"--std-coef: must be at least 0, got {std_coef}")
    if std_coef != 1 and combine != "mean_minus_std":
        raise UserError(f"--std-coef: only --combine mean_minus_std uses it, here it is {combine}")
    return RewardSource(run, combine=combine, std_coef=std_coef)


def combine(members: Tensor, how: str, std_coef: float) -> Tensor:
    """Scores of an ensemble, (members, B) → (B,): its `mean`, its `min`, or `mean_minus_std`.

    Mean − c·std is the uncertainty-weighted objective of Coste et al. 2023, arXiv:2310.02743, with the standard
    deviation instead of the variance; their worst-case objective is the minimum.

    >>> combine(torch.tensor([[1.0], [3.0]]), "mean_minus_std", std_coef=0.5)  # mean 2, deviation 1
    tensor([1.5000])
    """
    if how == "min":
        return members.min(dim=0).values
    mean = members.mean(dim=0)
    return mean if how == "mean" else mean - std_coef * members.std(dim=0, correction=0)


class Weighted(NamedTuple):
    """A source of a sum. `name` stands in metrics."""

    name: str
    source: Reward
    weight: float = 1.0


class WeightedSum:
    """Several sources, each times its weight; their disagreements add up in the same way.

    Args:
        terms: names that several have are made unique: sft, sft-2.
    """

    def __init__(self, terms: SequenceOf[Weighted]):
        names = unique_names([term.name for term in terms])
        self.terms = [term._replace(name=name) for term, name in zip(terms, names, strict=True)]

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> Scored:
        return self.total({term.name: term.source(examples, sequences) for term in self.terms})

    def total(self, scored: Mapping[str, Scored]) -> Scored:
        """
        Args:
            scored: what each term's source said, by the term's name.
        """
        columns = [[term.weight * score for score in scored[term.name].scores] for term in self.terms]
        spreads = [[abs(term.weight) * value for value in scored[term.name].disagreement] for term in self.terms]
        scores, disagreement = ([sum(values) for values in zip(*rows, strict=True)] for rows in (columns, spreads))
        parts = {term.name: scored[term.name].scores for term in self.terms} if len(self.terms) > 1 else {}
        return Scored(scores, disagreement, parts)


def unique_names(names: SequenceOf[str]) -> list[str]:
    """
    >>> unique_names(["reward", "fn", "reward", "reward-2"])
    ['reward', 'fn', 'reward-2', 'reward-2-2']
    """
    unique: list[str] = []
    for name in names:
        tries = (name if i == 1 else f"{name}-{i}" for i in itertools.count(1))
        unique.append(next(candidate for candidate in tries if candidate not in unique))
    return unique


def load_rewards(
    recipe: OnPolicyRecipe, backbone: Backbone, renderer: Renderer, prompts: SequenceOf[Example] = ()
) -> WeightedSum:
    """The recipe's rewards; the adapters of `reward_from` become the roles `reward`, `reward-2`, …

    Args:
        prompts: what will be asked; a reward that cannot score one of these rows is refused now.

    Raises:
        UserError: there is none, or one cannot be used.
    """
    terms: list[Weighted] = []
    for i, source in enumerate(recipe.reward_from, start=1):
        role = REWARD if i == 1 else f"{REWARD}-{i}"
        roles = load_members(backbone, source.run, role, key=f"reward_from[{i - 1}].run")
        reward = AdapterReward(backbone, roles, source, recipe.train.micro_batch_size)
        terms.append(Weighted(Path(source.run).resolve().name, reward, source.weight))
    if recipe.reward:
        function = reward_function(recipe.reward, renderer)
        if prompts:
            function.check(prompts)
        terms.append(Weighted(short_name(recipe.reward), function))
    if not terms:
        raise UserError(
            f"reward_from or reward: {recipe.stage.upper()} needs a reward run, a module:function, a verifier or a "
            "reward server; the recipe has none"
        )
    return WeightedSum(terms)


def member_names(role: str, members: int) -> list[str]:
    """
    >>> member_names("reward", 3)
    ['reward', 'reward_2', 'reward_3']
    """
    return [role, *(f"{role}_{i}" for i in range(2, members + 1))]


def saved_members(run_dir: str | Path) -> list[str]:
    """The names under which a reward run keeps its adapter, or those of its ensemble."""
    return member_names(REWARD, sum(1 for _ in Path(run_dir, "adapters").glob(f"{REWARD}_*")) + 1)


def members_line(backbone: Backbone, roles: SequenceOf[str]) -> str:
    """In words, what the members of an ensemble (or the one reward role) add to the base."""
    each = max(backbone.megabytes(role) for role in roles)
    total = sum(backbone.megabytes(role) for role in roles)
    count = f"{len(roles)} member{'s' if len(roles) > 1 else ''}"
    return f"{count}, {each:.2f} MB of adapter and head each, {total:.2f} MB in all"


def load_members(backbone: Backbone, run_dir: str | Path, role: str, *, key: str) -> list[str]:
    """Add the reward adapters of a run as `role`, `role_2`, …; returns these names.

    Raises:
        UserError: no such run, one of another base, or not a reward run; names `key`.
    """
    read_run(Path(run_dir), key)
    members = saved_members(run_dir)
    roles = member_names(role, len(members))
    for saved, name in zip(members, roles, strict=True):
        load_run_role(backbone, run_dir, saved, name, key=key)
        if name not in backbone.heads:
            raise UserError(f"{key}: {run_dir} has no head.safetensors; is it a reward run?")
    return roles
