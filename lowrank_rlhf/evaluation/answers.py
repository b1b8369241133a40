"""The answers of one policy to every prompt, with their scores and their KL."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Rollout
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.rewards import Reward
from lowrank_rlhf.rollout import generate
from lowrank_rlhf.scoring import sequence_kls

MICRO_BATCH = 8


@dataclass(frozen=True)
class Answers:
    """One entry per answer in each list, prompt by prompt.

    Attributes:
        ended: False where the token limit cut.
        scores: by source: reward, gold, judge.
        kl_to_base: nats per completion.
        kl_to_reference: the same to what training kept the policy close to; None where that is the base or unknown.
    """

    texts: list[str]
    lengths: list[int]
    ended: list[bool]
    scores: dict[str, list[float]]
    kl_to_base: list[float]
    kl_to_reference: list[float] | None


def sample_answers(
    name: str,
    role: str | None,
    backbone: Backbone,
    renderer: Renderer,
    examples: SequenceOf[Example],
    *,
    seed: int,
    temperature: float,
    batch_size: int,
) -> list[Sequence]:
    """One completion per example. The same seed for every policy: what differs is the policy."""
    torch.manual_seed(seed)
    return generate(
        backbone,
        role,
        [renderer.prompt(e.prompt, e.where)[0] for e in examples],
        Rollout(batch_size=batch_size, temperature=temperature),
        max_new_tokens=renderer.data.max_completion_tokens,
        stop_ids=renderer.stop_ids,
        label=f"{name} answers, {batch_size} at a time",
    )


def measure_answers(
    role: str | None,
    reference: str | None,
    backbone: Backbone,
    renderer: Renderer,
    examples: SequenceOf[Example],
    sequences: SequenceOf[Sequence],
    sources: Mapping[str, Reward],
    *,
    temperature: float,
) -> Answers:
    """Scores and KL of finished completions.

    Args:
        reference: the role KL is measured to beside the base; None where there is no other.
        sources: what scores them, by name.
    """
    references = [None] if reference is None else [None, reference]
    kl_to_base, *others = sequence_kls(backbone, role, references, sequences, MICRO_BATCH, temperature)
    return Answers(
        texts=[renderer.decode(s.completion_ids) for s in sequences],
        lengths=[len(s.completion_ids) for s in sequences],
        ended=[not s.cut for s in sequences],
        scores={name: source(examples, sequences).scores for name, source in sources.items()},
        kl_to_base=kl_to_base,
        kl_to_reference=others[0] if others else None,
    )
