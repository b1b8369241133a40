"""What an exported model says of the probes, beside what its run says: scores of rewards, logits of policies."""

from collections.abc import Sequence as SequenceOf
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lowrank_rlhf.data import Sequence
from lowrank_rlhf.data.batches import chunks
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.evaluation.correlation import spearman

BATCH = 8
MAX_DIFFERENCE = 1e-3  # in fp32, of scores or logits, times the largest where that is above 1
MIN_SPEARMAN = 0.99
MAX_KL = 0.02  # nats a token, of rounding a merged policy to 16 bit


@torch.no_grad()
def classifier_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: SequenceOf[Sequence],
    side: Literal["left", "right"] = "right",
) -> list[float]:
    """What a sequence classifier says of texts that the tokenizer pads."""
    scores: list[float] = []
    for group in chunks(range(len(sequences)), BATCH):
        ids: Any = {"input_ids": [sequences[i].ids for i in group]}
        batch = tokenizer.pad(ids, padding_side=side, return_tensors="pt")
        device = next(model.parameters()).device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        scores += model(**inputs, use_cache=False).logits[:, 0].float().tolist()
    return scores


@torch.no_grad()
def text_logits(model: nn.Module, sequences: SequenceOf[Sequence]) -> list[Tensor]:
    """Logits at every token of each text, on the CPU. Shapes (T, V)."""
    device = next(model.parameters()).device
    ids = [torch.tensor([s.ids], device=device) for s in sequences]
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in ids]


def compare_scores(ours: SequenceOf[float], theirs: SequenceOf[float]) -> dict[str, float]:
    """The largest difference, and Spearman's correlation; 1 where the scores are the same, also if all are equal.

    >>> compare_scores([0.0, 1.0, 2.0], [0.0, 0.5, 4.0])
    {'max_difference': 2.0, 'spearman': 1.0}
    """
    correlation = 1.0 if list(ours) == list(theirs) else spearman(ours, theirs)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return {"max_difference": largest, "spearman": 0.0 if correlation is None else correlation}


def compare_logits(ours: SequenceOf[Tensor], theirs: SequenceOf[Tensor]) -> dict[str, float]:
    """The largest difference of a logit, and KL(ours ‖ theirs) in nats, the mean over tokens. Both (T, V) per text.

    >>> compare_logits([torch.zeros(1, 2)], [torch.tensor([[0.0, 1.0986123]])])["kl"]  # log(2/√3) of (½, ½), (¼, ¾)
    0.1438...
    """
    largest = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    kl, tokens = 0.0, 0
    for a, b in zip(ours, theirs, strict=True):
        p, q = a.log_softmax(dim=-1), b.log_softmax(dim=-1)
        kl += float((p.exp() * (p - q)).sum())
        tokens += len(a)
    return {"max_difference": largest, "kl": kl / tokens}


def require(name: str, found: dict[str, float], *, scale: float | None = None) -> None:
    """Refuse an export that is not its run.

    Args:
        name: what was compared, for the message.
        found: from one of the comparisons.
        scale: the largest score or logit, where both sides compute in fp32; None where they are in 16 bit.

    Raises:
        UserError: says the figure and the limit.
    """
    limits = {"spearman": (MIN_SPEARMAN, "at least"), "kl": (MAX_KL, "at most")}
    if scale is not None:
        limits = {"max_difference": (MAX_DIFFERENCE * max(1.0, scale), "at most")}
    for key, (limit, bound) in limits.items():
        if key in found and not (found[key] >= limit if bound == "at least" else found[key] <= limit):
            raise UserError(
                f"export: {name}: {key} is {found[key]:.4g} on the probes, it must be {bound} {limit:.4g}; nothing "
                "was written. Export without --merge, or score and sample with the run itself"
            )
