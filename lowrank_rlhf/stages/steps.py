"""Optimizer steps on a rollout batch: passes over its minibatches, and what is done when a step is not to be taken."""

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

import torch
from torch import nn

from lowrank_rlhf.config import PPOTrain
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.stages.experience import Experience, Metrics
from lowrank_rlhf.stages.optim import optimizer_and_schedule

E = TypeVar("E", bound=Experience)

MAX_NONFINITE = 3  # steps in a row: one is bad luck of a batch, three are a run that has diverged


class Steps:
    """The optimizers of the roles that learn, each with its schedule.

    Args:
        stage: stands in front of what is printed.
        learning_rates: of roles that have their own; the others take the recipe's.
        target_kl_stop: nats per token; the update ends before the step of a minibatch that is further away.
    """

    def __init__(
        self,
        stage: str,
        train: PPOTrain,
        parameters: dict[str, list[nn.Parameter]],
        *,
        learning_rates: dict[str, float] | None = None,
        target_kl_stop: float | None = None,
    ):
        self.stage, self.max_grad_norm, self.target_kl_stop = stage, train.max_grad_norm, target_kl_stop
        rates = learning_rates or {}
        self.optimizers = {
            role: optimizer_and_schedule(learned, train, train.max_steps, rates.get(role))
            for role, learned in parameters.items()
        }
        self.nonfinite = 0  # steps in a row

    def passes(
        self, experiences: SequenceOf[E], count: int, order: torch.Generator, learn: Callable[[list[E]], Metrics]
    ) -> Metrics:
        """`count` passes over the batch in minibatches, each in a new order; means of what the steps report.

        Args:
            learn: takes a minibatch, accumulates gradients and steps, unless `stops` says not to.
        """
        minibatches: dict[int, list[E]] = {}
        for e in experiences:
            minibatches.setdefault(e.minibatch, []).append(e)
        parts = list(minibatches.values())
        rows: list[Metrics] = []
        for _ in range(count):
            for i in torch.randperm(len(parts), generator=order).tolist():
                rows.append(learn(parts[i]))
                if rows[-1]["policy/stopped"]:
                    break
            if rows[-1]["policy/stopped"]:
                break
        for _, schedule in self.optimizers.values():
            schedule.step()
        taken = {
            "policy/minibatches": float(len(rows) - rows[-1]["policy/stopped"]),  # the last was not learned from
            "policy/stopped": rows[-1]["policy/stopped"],
            "policy/skipped": sum(row.pop("policy/skipped") for row in rows),
        }
        return finite_means(rows) | taken | {"lr": float(self.optimizers["policy"][1].get_last_lr()[0])}

    def stops(self, row: Metrics) -> bool:
        """Whether the policy is too far from the one that sampled; its gradients are then thrown away."""
        limit = self.target_kl_stop
        stopped = limit is not None and row["policy/approxkl_avg"] > limit
        row |= {"policy/stopped": float(stopped), "policy/skipped": 0.0}
        if stopped:
            for optimizer, _ in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
        return stopped

    def step(self, role: str) -> float:
        """Clip and step, or leave the weights as they are where the gradient is not finite; returns its norm."""
        optimizer, _ = self.optimizers[role]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if math.isfinite(norm):
            optimizer.step()
        else:
            print(f"{self.stage}: the gradient of {role} is not finite, this step is left out", flush=True)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def count_skipped(self, row: Metrics) -> None:
        """
        Raises:
            UserError: three steps in a row had no finite gradient.
        """
        skipped = not all(math.isfinite(row[f"{role}/grad_norm"]) for role in self.optimizers)
        row["policy/skipped"] = float(skipped)
        self.nonfinite = self.nonfinite + 1 if skipped else 0
        if self.nonfinite == MAX_NONFINITE:
            also = " or value_model.learning_rate" if "value" in self.optimizers else ""
            raise UserError(
                f"train.learning_rate: {MAX_NONFINITE} steps in a row had no finite gradient, the run has diverged; "
                f"its last checkpoint is intact: lower train.learning_rate{also}, start again"
            )

    def state_dict(self) -> dict[str, int]:
        """Beside the optimizers, which a checkpoint holds."""
        return {"nonfinite": self.nonfinite}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.nonfinite = state["nonfinite"]


def finite_means(rows: list[Metrics]) -> Metrics:
    """The mean of each metric over the rows where it is there and finite; left out where it never is.

    >>> finite_means([{"a": 1.0, "b": math.nan}, {"a": 3.0}])
    {'a': 2.0}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row and math.isfinite(row[name])] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}
