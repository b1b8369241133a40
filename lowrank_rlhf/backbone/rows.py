"""Which adapter each row of a mixed batch takes."""

from typing import Any

from torch import nn

from lowrank_rlhf.errors import UserError

BASE_ROW = "__base__"  # PEFT's name for "no adapter" in a mixed batch


def name_rows(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Forward pre-hook: tell a LoRA layer which adapter each row takes."""
    rows = args[0].shape[0]
    copies, rest = divmod(rows, len(names))
    if rest or not copies:
        raise UserError(f"a mixed batch of {len(names)} roles met an input of {rows} rows")
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(copies)]}
