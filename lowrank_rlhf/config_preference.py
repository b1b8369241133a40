"""Recipes of the stages that learn from preferences or thumbs without a rollout: dpo, orpo, kto."""

from dataclasses import dataclass, field
from typing import Literal

from lowrank_rlhf.config import Data, Eval, Run, Train, ranged

# trl's names; `sft` is the mean −log p of the chosen answer's tokens, `sigmoid_norm` divides by the answers' lengths
DPOLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
Reference = Literal["auto", "base", "start"]


@dataclass(frozen=True)
class DPO:
    """`beta`: how strongly the policy is kept close to the reference (nats of reward per nat of log-ratio).

    `loss_type`: one of trl's losses or a list of them, summed with `loss_weights` (each 1 where not given).
    `label_smoothing`: the share of labels taken to be wrong, for `robust`, `exo_pair`, `aot` and `aot_unpaired`.
    `precompute_reference`: the reference's log-probs once before training rather than at every step.
    """

    beta: float = ranged(0.1, 1e-6)
    loss_type: DPOLoss | list[DPOLoss] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = ranged(0.0, 0, 0.5)
    precompute_reference: bool = False

    @property
    def losses(self) -> list[DPOLoss]:
        return self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]


@dataclass(frozen=True)
class ORPO:
    """`beta`: weight λ of the odds-ratio term beside the SFT loss."""

    beta: float = ranged(0.1, 0)


@dataclass(frozen=True)
class KTO:
    """`beta`: as in DPO. `desirable_weight`, `undesirable_weight`: of the losses of thumbs up and of thumbs down."""

    beta: float = ranged(0.1, 1e-6)
    desirable_weight: float = ranged(1.0, 0)
    undesirable_weight: float = ranged(1.0, 0)


@dataclass(frozen=True, kw_only=True)
class DPORecipe(Run):
    stage = "dpo"
    data: Data
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    policy_from: str | None = None
    reference: Reference = "auto"
    dpo: DPO = field(default_factory=DPO)


@dataclass(frozen=True, kw_only=True)
class ORPORecipe(Run):
    stage = "orpo"
    data: Data
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    policy_from: str | None = None
    orpo: ORPO = field(default_factory=ORPO)


@dataclass(frozen=True, kw_only=True)
class KTORecipe(Run):
    stage = "kto"
    data: Data
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    policy_from: str | None = None
    reference: Reference = "auto"
    kto: KTO = field(default_factory=KTO)
