"""Our decoding loop beside transformers' on the same layers and weights: python docs/fast_paths/decoding.py

16 prompts of 44 tokens, sampled at temperature 1 with the policy's adapter on: once all answers have 64 tokens, once
between 4 and 64. Seconds, the best of three.
"""

import time
from collections.abc import Callable, Iterator

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from lowrank_rlhf import rollout
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base, Lora, Rollout
from lowrank_rlhf.quiet import quiet

ROWS, LIMIT, STOP = 16, 64, 2
WARPERS = rollout.sampling_warpers(Rollout())


class EndsAt(LogitsProcessor):
    """Row i ends with its `lengths[i]`-th token, and not before."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.step = torch.tensor(lengths), 0

    def __call__(self, input_ids: object, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        scores[:, STOP] = torch.where(self.lengths == self.step, 1e9, -1e9)
        return scores


def ours(model: PreTrainedModel, prompts: torch.Tensor, lengths: list[int]) -> list[int]:
    left = list(lengths)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        logits[:, STOP] = -1e9
        tokens = rollout._sample(WARPERS, logits)
        left[:] = [n - 1 for n in left if n > 0]  # the rows that have not ended, in their order
        return torch.where(torch.tensor(left) == 0, STOP, tokens)

    mask = torch.ones_like(prompts, dtype=torch.bool)
    return [len(new) for new in rollout._complete(model, prompts, mask, choose, LIMIT, [STOP])]


def theirs(model: PreTrainedModel, prompts: torch.Tensor, lengths: list[int], **more: object) -> list[int]:
    ends = LogitsProcessorList([EndsAt(lengths)])
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": LIMIT, "eos_token_id": STOP, "pad_token_id": STOP}
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), logits_processor=ends, **settings, **more)
    return (out[:, prompts.shape[1] :] != STOP).sum(dim=1).add(1).tolist()


def continuous(model: PreTrainedModel, prompts: torch.Tensor, lengths: list[int]) -> list[int]:
    model.set_attn_implementation("sdpa")  # it refuses ours
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=LIMIT, eos_token_id=-1, pad_token_id=STOP)
    room = ContinuousBatchingConfig(max_batch_tokens=ROWS * prompts.shape[1], max_memory_percent=0.05)
    with model.continuous_batching_context_manager(config, continuous_batching_config=room, warmup=False) as manager:
        for ids, length in zip(prompts.tolist(), lengths, strict=True):
            manager.add_request(ids, max_new_tokens=length)
        found: Iterator = (manager.get_result() for _ in range(ROWS))
        return [len(each.generated_tokens) for each in found]


def seconds(work: Callable[[], list[int]], lengths: list[int]) -> float:
    found = []
    for _ in range(3):
        started = time.perf_counter()
        new = work()
        found.append(time.perf_counter() - started)
        assert sorted(new) == sorted(lengths), new
    return min(found)


if __name__ == "__main__":
    quiet()
    torch.manual_seed(0)
    backbone = Backbone(Base())
    backbone.add_role("policy", Lora())
    prompts = torch.randint(3, 49000, (ROWS, 44))
    every = {"64 each": [LIMIT] * ROWS, "4 to 64": [4 + 60 * row // (ROWS - 1) for row in range(ROWS)]}
    loops = {
        "ours": ours,
        "generate": theirs,
        "generate, static cache": lambda *given: theirs(*given, cache_implementation="static"),
        "continuous batching": continuous,
    }
    print(f"| | {' | '.join(every)} |\n|{'---|' * (1 + len(every))}")
    with torch.no_grad(), backbone.generating("policy") as model:
        for name, loop in loops.items():
            taken = [seconds(lambda n=n, loop=loop: loop(model, prompts, n), n) for n in every.values()]
            print(f"| {name} | {' | '.join(f'{s:.1f}' for s in taken)} |", flush=True)
