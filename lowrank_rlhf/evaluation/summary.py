"""From answers to figures: each with a 95 % interval by prompt, and its paired difference to the other policy's."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_rlhf.evaluation import texts
from lowrank_rlhf.evaluation.answers import Answers
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
from lowrank_rlhf.evaluation.judges import Judged
from lowrank_rlhf.evaluation.winrate import length_controlled_win_rate

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class PolicyReport:
    """One policy's figures.

    Attributes:
        against: the name of the policy that it is compared with.
        metrics: value, low and high of each figure; what was not measured is not there.
        differences: the same of the figure minus that of `against`, on the same prompts.
        judged: how many comparisons were read and which were not; empty without a judge.
    """

    name: str
    run: str | None
    against: str
    metrics: dict[str, Interval]
    differences: dict[str, Interval]
    judged: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All policies on the same prompts.

    Attributes:
        facts: what was asked of whom: base, prompts, samples, seed, temperature, sources, judge.
        notes: what a reader has to know.
    """

    facts: dict[str, Any]
    policies: list[PolicyReport]
    notes: list[str]


def per_answer(answers: Answers, prompts: Sequence[Hashable], samples: int) -> dict[str, list[float]]:
    """Every figure that is a mean over answers, as its value for each answer.

    Args:
        prompts: of each answer.
        samples: answers per prompt; of one, self-BLEU compares the answers to all prompts.
    """
    values = {name: scores for name, scores in answers.scores.items() if name != "judge"}
    values["kl_to_base"] = answers.kl_to_base
    if answers.kl_to_reference is not None:
        values["kl_to_reference"] = answers.kl_to_reference
    return values | {
        "length": [float(length) for length in answers.lengths],
        "ended": [float(ended) for ended in answers.ended],
        "self_bleu": texts.self_bleu(answers.texts, prompts if samples > 1 else [0] * len(prompts)),
        "repetition": [texts.repetition(text) for text in answers.texts],
        "refusals": [float(texts.is_refusal(text)) for text in answers.texts],
        "safety_violations": [100.0 * texts.is_violation(text) for text in answers.texts],
    }


def summarise(
    answers: Answers, others: Answers, prompts: Sequence[Hashable], samples: int, seed: int
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Figures of one policy, and their paired differences to another's.

    Both policies answered the same prompts equally often, so the interval of a difference of means resamples prompts
    of the answer-by-answer differences: what is hard about a prompt for both drops out.
    """
    ours, theirs = per_answer(answers, prompts, samples), per_answer(others, prompts, samples)
    metrics = {name: bootstrap_mean(values, prompts, seed=seed) for name, values in ours.items()}
    differences = {
        name: bootstrap_mean(np.subtract(values, theirs[name]).tolist(), prompts, seed=seed)
        for name, values in ours.items()
        if name in theirs and name != "kl_to_reference"  # two different references
    }
    for n in (1, 2):
        value, without = texts.distinct(answers.texts, prompts, n)
        other, other_without = texts.distinct(others.texts, prompts, n)
        metrics[f"distinct_{n}"] = texts.jackknife(value, without)
        differences[f"distinct_{n}"] = texts.jackknife(value - other, without - other_without)
    return metrics, differences


def summarise_wins(
    judged: Judged, answers: Answers, others: Answers, prompts: Sequence[Hashable], seed: int
) -> tuple[dict[str, Interval], dict[str, Any]]:
    """Win rates over the comparisons that were read, and how many those are."""
    read = [i for i, preference in enumerate(judged.preferences) if preference is not None]
    facts: dict[str, Any] = {"comparisons": len(judged.preferences), "read": len(read)}
    if judged.first_rate is not None:
        facts["first_rate"] = judged.first_rate
    facts["unreadable"] = [{"answer": i, "said": said} for i, said in judged.unreadable]
    if not read:
        return {}, facts
    preferences = [value for value in judged.preferences if value is not None]
    clusters = [prompts[i] for i in read]
    gaps = [answers.lengths[i] - others.lengths[i] for i in read]
    return {
        "win_rate": bootstrap_mean(preferences, clusters, seed=seed),
        "length_controlled_win_rate": length_controlled_win_rate(preferences, gaps, clusters, seed=seed),
    }, facts
