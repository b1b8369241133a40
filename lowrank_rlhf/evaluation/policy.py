"""Compare policies on the same prompts, the same seed and the same reward."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Rollout
from lowrank_rlhf.data import Example, Renderer
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
from lowrank_rlhf.rewards import Reward
from lowrank_rlhf.rollout import generate
from lowrank_rlhf.scoring import sequence_kl


@dataclass(frozen=True)
class PolicyReport:
    """One policy on held-out prompts. Intervals are 95 %, by prompt; KL in nats per completion."""

    name: str
    score: float
    score_low: float
    score_high: float
    kl_to_base: float
    length: float
    ended: float
    answers: list[str]
    scores: list[float]


def evaluate_policy(
    name: str,
    role: str | None,
    backbone: Backbone,
    renderer: Renderer,
    prompts: SequenceOf[Example],
    reward: Reward,
    *,
    samples: int,
    seed: int,
    micro_batch_size: int,
) -> PolicyReport:
    """Sample `samples` answers per prompt at temperature 1 and score them.

    Args:
        name: for the table.
        role: who answers; None is the bare base.
        samples: answers per prompt.
        seed: of the sampling; the same for every policy that is compared.
    """
    examples = [example for example in prompts for _ in range(samples)]
    torch.manual_seed(seed)
    sequences = generate(
        backbone,
        role,
        [renderer.prompt(e.prompt, e.where)[0] for e in examples],
        Rollout(batch_size=32),
        max_new_tokens=renderer.data.max_completion_tokens,
        stop_ids=renderer.stop_ids,
    )
    scores = reward(examples, sequences).scores
    mean, low, high = bootstrap_mean(scores, [e.prompt_key for e in examples])
    kls = sequence_kl(backbone, role, None, sequences, micro_batch_size)
    return PolicyReport(
        name=name,
        score=mean,
        score_low=low,
        score_high=high,
        kl_to_base=sum(kls) / len(kls),
        length=sum(len(s.completion_ids) for s in sequences) / len(sequences),
        ended=sum(not s.cut for s in sequences) / len(sequences),
        answers=[renderer.decode(s.completion_ids) for s in sequences],
        scores=list(scores),
    )
