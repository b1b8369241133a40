"""Who answers: the bare base, the runs, whom they are judged against, and the references that KL is measured to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_rlhf.adapters import ANSWERING, answering_role
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base, Data
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import load_run_role, read_run

Key = tuple[str, str]  # the resolved folder of a run, and which of its adapters
BASE: Key = ("", "")


@dataclass
class Policy:
    """The bare base or one adapter of one run.

    Attributes:
        name: in tables.
        role: on the backbone; None is the bare base.
        saved: the adapter's name in the run.
        answers: whether it answers, or only is another policy's reference.
        start: what its training started from.
        reference: what its training kept it close to; None where that cannot be loaded any more.
    """

    name: str
    role: str | None = None
    run: str | None = None
    saved: str | None = None
    answers: bool = True
    start: Key = BASE
    reference: Key | None = BASE


@dataclass
class Roster:
    """Every policy of an evaluation, the base first.

    Attributes:
        against: base, start, or the key of a run.
        recipes: of the runs that answer, for their base and their limits.
        notes: what the reader of a report has to know.
    """

    against: str | Key = "base"
    policies: dict[Key, Policy] = field(default_factory=lambda: {BASE: Policy("base")})
    recipes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def answering(self) -> dict[Key, Policy]:
        return {key: policy for key, policy in self.policies.items() if policy.answers}

    def opponent(self, policy: Policy) -> Key:
        if isinstance(self.against, tuple):
            return self.against
        return policy.start if self.against == "start" else BASE

    @property
    def against_name(self) -> str:
        return self.policies[self.against].name if isinstance(self.against, tuple) else self.against

    def base(self) -> Base:
        """The base of the first run; `load` refuses the runs of another."""
        return Base(**{**self.recipes[0]["base"], "device": "auto"})

    def data(self, prompts: str, max_new_tokens: int | None) -> Data:
        """How prompts are rendered; where the runs have different limits, the highest."""
        templates = {recipe["data"]["prompt_template"] for recipe in self.recipes}
        if len(templates) > 1:
            raise UserError(f"RUN: the runs were trained with different data.prompt_template: {sorted(templates)}")
        longest = {
            key: max(recipe["data"][key] for recipe in self.recipes)
            for key in ("max_prompt_tokens", "max_completion_tokens")
        }
        if max_new_tokens is not None:
            longest["max_completion_tokens"] = max_new_tokens
        return Data(prompts, prompt_template=templates.pop(), **longest)

    def load(self, backbone: Backbone) -> None:
        """Put every adapter on the one base.

        Raises:
            UserError: a run was trained on another base.
        """
        for policy in self.policies.values():
            if policy.role is not None:
                assert policy.run is not None
                assert policy.saved is not None
                load_run_role(backbone, policy.run, policy.saved, policy.role, key="RUN")

    def add(self, run: str, *, key: str = "RUN", answers: bool = True) -> Key:
        """The adapter of a run that answers: its policy, else its sft.

        Raises:
            UserError: no such run, or it has neither; names `key`.
        """
        info = read_run(Path(run), key)
        found = answering_role(run)
        if found is None:
            raise UserError(f"{key}: {run}/adapters has no {' or '.join(ANSWERING)}, so this run cannot answer")
        identity = (str(Path(run).resolve()), found)
        if identity not in self.policies:
            folder = Path(run).resolve()
            taken = {policy.name for policy in self.policies.values()}
            name = str(folder) if folder.name in taken else folder.name
            policy = Policy(name, f"run-{len(self.policies)}", run, found, answers=False)
            self.policies[identity] = policy
            if found == "policy":
                self._trace(policy, info)
        if answers and not self.policies[identity].answers:
            self.policies[identity].answers = True
            self.recipes.append(checked_recipe(run, info))
        return identity

    def _trace(self, policy: Policy, info: dict[str, Any]) -> None:
        """What the run started from and what it stayed close to. A run that has moved leaves a note."""
        start = info.get("recipe", {}).get("policy_from")
        if start is None:
            return
        if answering_role(start) is None:
            policy.reference = None if info.get("reference") == "start" else BASE
            policy.start = (start, "")
            self.notes.append(f"{policy.name}: {start}, which it started from, is not there; no KL to that reference")
            return
        policy.start = self.add(start, answers=False)
        policy.reference = policy.start if info.get("reference") == "start" else BASE


def read_roster(runs: Sequence[str], against: str = "base") -> Roster:
    """The base, these runs, and whom they are judged against: base, start or a run.

    Raises:
        UserError: one of them is not a run with a policy or sft adapter.
    """
    roster = Roster()
    for run in dict.fromkeys(runs):
        roster.add(run)
    roster.against = against if against in ("base", "start") else roster.add(against, key="--against")
    if against == "start":
        for policy in list(roster.answering.values()):
            if policy.start != BASE:
                roster.add(policy.start[0], key=f"--against start: {policy.name} started from it")
    return roster


def checked_recipe(run: str, info: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run's recipe that an evaluation reads."""
    keys = ("prompt_template", "max_prompt_tokens", "max_completion_tokens")
    try:
        recipe = info["recipe"]
        return {"base": dict(recipe["base"]), "data": {key: recipe["data"][key] for key in keys}}
    except (KeyError, TypeError) as error:
        raise UserError(f"{run}/run.json: not a run of this version: {error!r}") from error
