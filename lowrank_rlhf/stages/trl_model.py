"""What trl's preference trainers get in the place of models: the backbone's own log-probs, under any of its roles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.stages.run_trainer import keep_lora_precision


def no_second_model(backbone: Backbone) -> nn.Module:
    """A stand-in without weights for trl's `ref_model`, to be taken away once the trainer is built.

    Given a PEFT model and no `ref_model`, trl copies the adapter named `default` into a new one; given a plain model it
    loads the base a second time.
    """
    stand_in: Any = nn.Identity()
    stand_in.config = backbone.model.config
    return stand_in


@contextmanager
def as_it_was(backbone: Backbone) -> Iterator[None]:
    """Undo what a trl trainer does to the model it is given: LoRA weights in bf16, a forward with another signature."""
    roles, own_forward = backbone.roles, vars(backbone.model).get("forward")
    with keep_lora_precision(backbone):
        yield
    if own_forward is not None:
        backbone.model.forward = own_forward
    else:
        vars(backbone.model).pop("forward", None)
    assert backbone.roles == roles, "trl has added an adapter"


def scored_tokens(
    backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> SimpleNamespace:
    """What trl's fused lm_head says of a batch, (B, T − 1), under the role that is on; 0 outside the completions.

    trl's own scores every position where there is no Triton, this only the completions'. `mean_logits`, which trl only
    logs, is not computed.
    """
    mask = completion_mask.bool()
    found = backbone.read(input_ids, attention_mask, mask)
    logps, entropy, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x)[:, 1:] for x in found)
    return SimpleNamespace(log_probs=logps, entropy=entropy, is_top1=is_top1, mean_logits=torch.zeros_like(logps))


def saying(scored: SimpleNamespace) -> Callable[..., SimpleNamespace]:
    """A model whose forward has been done already."""
    return lambda **inputs: scored


def drop_mean_logits(metrics: dict[str, list[float]]) -> None:
    """Take trl's figures of what `scored_tokens` does not compute out of those it will log."""
    for side in ("chosen", "rejected"):
        metrics.pop(f"logits/{side}", None)


@torch.no_grad()
def sequence_logps(
    backbone: Backbone, role: str | None, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> Tensor:
    """log p of each completion under a role, nats; None is the bare base. Shape (B,)."""
    with backbone.use(role):
        return scored_tokens(backbone, input_ids, attention_mask, completion_mask).log_probs.sum(dim=1)
