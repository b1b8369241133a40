"""Generate completions with one role, sampled from exactly the distribution that is scored."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Rollout
from lowrank_rlhf.data.batches import chunks, pad_left
from lowrank_rlhf.data.rendering import Sequence


@torch.no_grad()
def generate(
    backbone: Backbone,
    role: str | None,
    prompts: SequenceOf[list[int]],
    rollout: Rollout,
    *,
    max_new_tokens: int,
    stop_ids: list[int],
    greedy: bool = False,
) -> list[Sequence]:
    """One completion per prompt.

    Runs in eval mode, where gradient checkpointing is off and the KV cache on. The global torch RNG drives sampling.

    Args:
        role: who answers; None is the bare base.
        prompts: token ids of each.
        stop_ids: a completion ends at the first of these, and keeps it.

    Returns:
        The completions; `cut` is True where the token limit came before a stop token.
    """
    device = backbone.model.device
    sequences: list[Sequence] = []
    with backbone.use(role) as model:
        generate_with: Any = model.generate
        for group in chunks(range(len(prompts)), rollout.batch_size):
            input_ids, attention_mask = pad_left([prompts[i] for i in group], backbone.info.pad_token_id)
            sampling = {"do_sample": False} if greedy else _sampling(rollout)
            output = generate_with(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.long().to(device),
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=backbone.info.pad_token_id,
                use_cache=True,
                **sampling,
            )
            new_tokens = output[:, input_ids.shape[1] :].tolist()
            sequences += [_cut_at_stop(prompts[i], ids, stop_ids) for i, ids in zip(group, new_tokens, strict=True)]
    return sequences


def _sampling(rollout: Rollout) -> dict[str, float | bool]:
    return {
        "do_sample": True,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
    }


def _cut_at_stop(prompt: list[int], ids: list[int], stop_ids: list[int]) -> Sequence:
    for i, token in enumerate(ids):
        if token in stop_ids:
            return Sequence(prompt, ids[: i + 1])
    return Sequence(prompt, ids, cut=True)
