"""Passes without gradient over finished completions: log-probs, scores, values, in fixed micro-batches."""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.data.batches import Batch, chunks, pad_batch
from lowrank_rlhf.data.rendering import Sequence
from lowrank_rlhf.progress import progress


@torch.no_grad()
def score_sequences(
    backbone: Backbone, role: str, sequences: SequenceOf[Sequence], micro_batch_size: int, *, label: str | None = None
) -> list[float]:
    """Score of each prompt-and-completion under a role with a head, in order; forwards take those of like length.

    Args:
        label: shows how far it is under this name; None shows nothing.
    """
    scores = torch.zeros(len(sequences))
    groups = chunks(sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids)), micro_batch_size)
    with backbone.use(role):
        for group in progress(groups, label, len(groups)) if label else groups:
            batch = pad_batch([sequences[i] for i in group], backbone.info.pad_token_id).to(backbone.model.device)
            scores[group] = backbone.scores(role, batch.input_ids, batch.attention_mask).cpu()
    return list(scores.tolist())


@torch.no_grad()
def policy_logps(backbone: Backbone, role: str | None, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """token_logps and entropies (B, T) of a batch under a role; None is the bare base."""
    with backbone.use(role):
        return backbone.token_logps(
            batch.input_ids, batch.attention_mask, batch.completion_mask, temperature=temperature
        )


@torch.no_grad()
def sequence_kls(
    backbone: Backbone,
    role: str | None,
    references: SequenceOf[str | None],
    sequences: SequenceOf[Sequence],
    micro_batch_size: int,
    temperature: float = 1.0,
) -> list[list[float]]:
    """log π_role − log π_reference of each completion, nats, for each reference: the k1 estimate of KL per sequence.

    Forwards take sequences of like length; the policy and its references see the same padded tensors.

    Args:
        temperature: at which the completions were sampled; all are compared there.
    """
    kls = torch.zeros(len(references), len(sequences))
    if (names := {role, *references}) == {role}:
        return list(kls.tolist())
    for group in chunks(sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids)), micro_batch_size):
        batch = pad_batch([sequences[i] for i in group], backbone.info.pad_token_id).to(backbone.model.device)
        logps = {name: policy_logps(backbone, name, batch, temperature)[0] for name in names}
        for n, reference in enumerate(references):
            kls[n, group] = (logps[role] - logps[reference]).sum(dim=1).cpu()
    return list(kls.tolist())
