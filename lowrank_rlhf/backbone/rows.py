"""Which adapter each row of a mixed batch takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from lowrank_rlhf.errors import UserError

BASE_ROW = "__base__"  # PEFT's name for "no adapter" in a mixed batch


@contextmanager
def rows_named(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside the block every LoRA layer takes the i-th name's adapter for row i; no hook stays, whatever happens."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    handles = [layer.register_forward_pre_hook(partial(_name_rows, names), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name_rows(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Forward pre-hook: tell a LoRA layer which adapter each row takes."""
    rows = args[0].shape[0]
    copies, rest = divmod(rows, len(names))
    if rest or not copies:
        raise UserError(f"a mixed batch of {len(names)} roles met an input of {rows} rows")
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(copies)]}
