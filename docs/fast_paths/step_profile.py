"""Where the time of a PPO step goes, with the fast paths on and off: python docs/fast_paths/step_profile.py

Milliseconds of one thread, as a Markdown table: learning from a micro-batch of 4 × 88 tokens (forward and backward of
the policy), scoring one (forward), and one more token of 16 answers.
"""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from off import turn_off  # beside this file
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from lowrank_rlhf import rollout
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.quiet import quiet

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm"),
    "torch's attention": ("_scaled_dot_product",),
    "dequantising": ("bitsandbytes::",),
    "drawing": ("aten::multinomial", "aten::searchsorted", "aten::cumsum", "aten::exponential_"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::clone", "aten::empty", "aten::fill_"),
}
REST = "elementwise and the rest"


def measure() -> dict[str, dict[str, float]]:
    """Work → group → milliseconds."""
    torch.manual_seed(0)
    backbone = Backbone(Base())
    backbone.add_role("policy", Lora())
    backbone.train_only("policy")
    ids = torch.randint(0, 49000, (4, 88))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :10] = False  # padding
    completion = mask.clone()
    completion[:, :40] = False

    def learn() -> None:
        with backbone.use("policy", train=True):
            backbone.read(ids, mask, completion)[0].sum().backward()

    def score() -> None:
        with torch.no_grad(), backbone.use("policy"):
            backbone.read(ids, mask, completion)

    with backbone.unpacked(), torch.no_grad(), backbone.use("policy") as model:
        cache = DynamicCache(config=model.config)
        prompts = torch.randint(0, 49000, (16, 44))
        model(input_ids=prompts, use_cache=True, logits_to_keep=1, past_key_values=cache)

        def token() -> None:
            state = {"use_cache": True, "past_key_values": cache, "logits_to_keep": 1}
            with torch.no_grad(), backbone.use("policy") as model:
                rollout.draw(model(input_ids=prompts[:, -1:], **state).logits[:, -1].softmax(dim=-1))

    with backbone.unpacked():
        return {"learn": split(learn), "score": split(score), "token": split(token)}


def split(work: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of its groups, in all the CPU time of the best of five, the groups' shares a profile's."""
    best = min(cpu_seconds(work) for _ in range(5))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    shares: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        names = (group for group, parts in GROUPS.items() if any(part in event.key for part in parts))
        shares[next(names, REST)] += event.self_cpu_time_total
    return {name: 1e3 * best * share / sum(shares.values()) for name, share in shares.items()}


def cpu_seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    fast = measure()
    turn_off()
    plain = measure()
    works = list(fast)
    print(f"| | {' | '.join(f'{w}, off | {w}, on' for w in works)} |\n|{'---|' * (1 + 2 * len(works))}")
    for group in (*GROUPS, REST):
        cells = [f"{found[work].get(group, 0):.0f}" for work in works for found in (plain, fast)]
        print(f"| {group} | {' | '.join(cells)} |")
    totals = [f"{sum(found[work].values()):.0f}" for work in works for found in (plain, fast)]
    print(f"| in all | {' | '.join(totals)} |")
