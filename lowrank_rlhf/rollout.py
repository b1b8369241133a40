"""Generate completions with one role, sampled from exactly the distribution that is scored.

The loop is our own because transformers' `generate` computes an ended row until the last of its batch has ended: here
it leaves the batch and the KV cache at once. It also reads no `generation_config`, so that nothing which a model's
authors put there (a repetition penalty, a temperature) makes samples that are not scored.
"""

import inspect
import itertools
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Rollout
from lowrank_rlhf.data.batches import chunks, pad_left
from lowrank_rlhf.data.rendering import Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import GENERATE
from lowrank_rlhf.progress import progress

BLOCK = 256  # entries of the vocabulary


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
    label: str | None = None,
    finished: Callable[[dict[int, Sequence]], None] | None = None,
) -> list[Sequence]:
    """One completion per prompt, in the order of the prompts.

    Prompts of like length share a batch of `rollout.batch_size`, the longest first: what does not fit in memory fails
    at once, and a stage generates it in smaller batches from then on. Runs in eval mode, where gradient checkpointing
    is off, with the KV cache on. The global torch RNG drives sampling; what a prompt gets also depends on the prompts
    beside it.

    Args:
        role: who answers; None is the bare base.
        prompts: token ids of each, at least one.
        stop_ids: a completion ends at the first of these, and keeps it.
        greedy: take the likeliest token, whatever `rollout` says.
        label: of a progress bar over the batches; None shows none.
        finished: called after each batch with its completions, by the place of their prompt.

    Returns:
        The completions; `cut` is True where the token limit came before a stop token.

    Raises:
        UserError: the model has no KV cache and no recurrent state that can be carried from token to token.
    """
    choose = _greedy if greedy else partial(_sample, sampling_warpers(rollout))
    sequences: dict[int, Sequence] = {}
    groups = chunks(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), rollout.batch_size)
    with backbone.generating(role) as model:
        for group in groups if label is None else progress(groups, label, len(groups)):

            def complete(piece: slice, group: list[int] = group) -> list[list[int]]:
                ids, mask = pad_left([prompts[i] for i in group[piece]], backbone.info.pad_token_id)
                return _complete(model, ids, mask, choose, max_new_tokens, stop_ids)

            pieces = backbone.most_rows.each(GENERATE, len(group), complete)
            completions = zip(group, itertools.chain(*pieces), strict=True)
            found = {i: Sequence(prompts[i], new, cut=new[-1] not in stop_ids) for i, new in completions}
            sequences |= found
            if finished is not None:
                finished(found)
    return [sequences[i] for i in range(len(prompts))]


def sampling_mismatch(rollout: Rollout) -> str | None:
    """In words, why samples are not from the distribution that is scored, and the fix; None where they are.

    Temperature is no mismatch: log-probs are computed at it.

    >>> sampling_mismatch(Rollout(temperature=0.7)) is None
    True
    """
    neutral = ({"top_p": 1} if rollout.top_p < 1 else {}) | ({"top_k": 0} if rollout.top_k > 0 else {})
    if not neutral:
        return None
    found = " and ".join(f"rollout.{name}={getattr(rollout, name)}" for name in neutral)
    fix = " ".join(f"rollout.{name}={value}" for name, value in neutral.items())
    return (
        f"with {found} the least likely tokens are never sampled, but log-probs are computed over the whole "
        "vocabulary, so KL and ratios are those of another distribution than the one sampled from; "
        f"set {fix} to sample from the one that is scored"
    )


@torch.inference_mode()  # of 3,000 small operations a token, each is cheaper than under `no_grad`
def _complete(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    choose: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    stop_ids: list[int],
) -> list[list[int]]:
    """Completions of one batch of left-padded prompts: ids and bool mask of shape (B, T).

    Args:
        choose: fp32 logits (b, V) → token ids (b,), b being the rows that have not ended.
    """
    ids, mask = ids.to(model.device), mask.to(model.device)
    width = ids.shape[1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    mask = pad(mask.long(), (0, max_new_tokens), value=1)
    state_name, state = state_argument(model), DynamicCache(config=model.config)
    completions: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))  # which completion each row of the batch is
    for read in range(width, width + max_new_tokens):
        # A purely recurrent model has no column per token that a mask could hide once the prompt is read
        masked = state_name == "past_key_values" or read == width
        output = model(
            input_ids=ids,
            attention_mask=mask[:, :read] if masked else None,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{state_name: state},
        )
        tokens = choose(output.logits[:, -1].float())
        for row, token in zip(rows, tokens.tolist(), strict=True):
            completions[row].append(token)
        going_on = [b for b, row in enumerate(rows) if completions[row][-1] not in stop_ids]
        if not going_on:
            break
        ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        if len(going_on) < len(rows):
            kept = torch.tensor(going_on, device=ids.device)
            # Not `batch_select_indices`, which forgets the recurrent half of a hybrid layer
            state.reorder_cache(kept)  # type: ignore[arg-type]
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            rows = [rows[b] for b in going_on]
    return completions


def state_argument(model: PreTrainedModel) -> str:
    """What the forward calls the state it carries from token to token: all but Mamba's kin say `past_key_values`."""
    arguments = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in arguments:
            return name
    raise UserError(f"base.model: {type(model).__name__} carries no KV cache that this version knows, to generate with")


def sampling_warpers(rollout: Rollout) -> list[LogitsProcessor]:
    """transformers' own, in its order; none where the setting is neutral."""
    warpers: list[LogitsProcessor] = []
    if rollout.temperature != 1:
        warpers.append(TemperatureLogitsWarper(rollout.temperature))
    if rollout.top_k > 0:
        warpers.append(TopKLogitsWarper(rollout.top_k))
    if rollout.top_p < 1:
        warpers.append(TopPLogitsWarper(rollout.top_p))
    return warpers


def _sample(warpers: list[LogitsProcessor], logits: Tensor) -> Tensor:
    for warp in warpers:
        logits = warp(None, logits)  # these read no ids
    return draw(logits.softmax(dim=-1))


def draw(probabilities: Tensor) -> Tensor:
    """A token of each row, by inverting its cumulative distribution: (b, V) → ids (b,).

    One uniform number a row, first to a block of the vocabulary, then within it. `torch.multinomial` draws one number
    for every entry of the vocabulary: 15 ms a token for 16 rows of 49,152 on a CPU, this takes 2.

    Raises:
        ValueError: a row is not a distribution: it holds nan, or is all zero.

    >>> draw(torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]]))
    tensor([1, 0])
    """
    blocks = pad(probabilities, (0, -probabilities.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    ends = sums.cumsum(dim=1)
    if not bool(((ends[:, -1] > 0) & ends[:, -1].isfinite()).all()):
        raise ValueError("the model's logits are not finite, so no token can be sampled")
    point = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device) * ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp(max=sums.shape[1] - 1)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=1)
    # How far into the block, in its own sum: the two sums round otherwise
    rest = 1 - (ends.gather(1, block) - point) / sums.gather(1, block)
    point = (rest.clamp(min=0) * inside[:, -1:]).minimum(inside[:, -1:].nextafter(torch.zeros_like(rest)))
    place = torch.searchsorted(inside, point, right=True)
    return (block * BLOCK + place).squeeze(1)


def _greedy(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)
