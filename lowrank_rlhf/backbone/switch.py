"""Which adapter is on: PEFT's own flags, set on layers that were found once.

PEFT's `set_adapter` walks every module of the model and flips `requires_grad` of every adapter, here some eighty times
in a PPO step: a second of one core, in which the other waits.
"""

from typing import cast

from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


class Switch:
    """The LoRA layers of a model and all its modules, as they are when this is made."""

    def __init__(self, model: nn.Module, peft: PeftModel | None):
        self.peft = peft
        self.modules = list(model.modules())
        self.layers = [module for module in self.modules if isinstance(module, LoraLayer)]

    def select(self, role: str | None) -> None:
        """This adapter alone is on, None: none is. What learns stays as it is."""
        if self.peft is not None and role is not None:
            self.peft.active_adapter = role
            assert isinstance(self.peft.base_model, LoraModel)
            self.peft.base_model.active_adapter = role
        for layer in self.layers:
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = [role]

    def train(self, train: bool) -> None:
        """`model.train(train)`. Past nn.Module's `__setattr__`, which takes 6 ms for 3,700 modules, 44 times a step."""
        for module in self.modules:
            vars(module)["training"] = train

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The LoRA weights of a role, A before B, layer by layer."""
        factors = [factor for layer in self.layers for factor in (layer.lora_A, layer.lora_B) if role in factor]
        return [cast(nn.Parameter, factor[role].weight) for factor in factors]
