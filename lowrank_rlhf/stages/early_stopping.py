"""Stop when held-out evaluation no longer improves, and keep the weights of its best moment."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowrank_rlhf.config import Eval
from lowrank_rlhf.errors import UserError


class Best:
    """The best held-out value so far (lower is better) and the weights that gave it.

    Args:
        parameters: what is kept, a few megabytes of adapter.
        settings: `patience` evaluations in a row without a new best end the training; None keeps and stops nothing.

    Raises:
        UserError: patience without a number of steps between evaluations.

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> best = Best([weight], Eval(steps=10, patience=1))
    >>> best.update(0.5), best.update(0.7)
    (False, True)
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Eval):
        if settings.patience is not None and settings.steps is None:
            raise UserError("eval.patience: needs eval.steps, the optimizer steps between two evaluations")
        self.parameters, self.patience = parameters, settings.patience
        self.value = float("inf")
        self.worse = 0
        self.weights: list[torch.Tensor] = []

    def update(self, value: float) -> bool:
        """Note an evaluation; True when it is time to stop."""
        if self.patience is None:
            return False
        if value < self.value:
            self.value, self.worse = value, 0
            self.weights = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self.worse += 1
        return self.worse >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back; without any evaluation the last ones stay."""
        if self.weights:
            for parameter, best in zip(self.parameters, self.weights, strict=True):
                parameter.copy_(best)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "worse": self.worse, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.worse, self.weights = state["value"], state["worse"], state["weights"]
