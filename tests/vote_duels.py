"""Duels and votes for the tests of the statistics."""

from dataclasses import replace

import numpy as np

from lowrank_rlhf.arena.statistics.duels import Duel
from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Judged, Speaker, Vote

EVEN = Duel(
    prompt="p",
    left="x",
    right="y",
    outcome=0.5,
    both_bad=False,
    annotator="ann",
    left_tokens=10,
    right_tokens=10,
    left_score=None,
    right_score=None,
    scored_by=None,
    strength=None,
    comparison="c",
    repeat_of=None,
    ranking=False,
    weight=1.0,
    blind=True,
    item=None,
    label="neither",
)


def duel(prompt: str, left: str, right: str, outcome: float, **others) -> Duel:
    return replace(EVEN, prompt=prompt, left=left, right=right, outcome=float(outcome), **others)


def simulated(strengths: np.ndarray, *, votes: int, prompts: int, seed: int) -> list[Duel]:
    """Votes of Bradley-Terry people on players named by their number, pairs and prompts at random."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(votes):
        i, j = random.choice(len(strengths), 2, replace=False)
        won = random.random() < 1 / (1 + np.exp(strengths[j] - strengths[i]))
        found.append(duel(f"{random.integers(prompts)}", f"{i}", f"{j}", won))
    return found


def pair(
    prompt: str,
    left: str,
    right: str,
    choice: str,
    *,
    annotator: str = "ann",
    blind: bool = True,
    repeat_of: str | None = None,
    texts: tuple[str, str] | None = None,
    tokens: tuple[int, int] = (10, 10),
    scores: tuple[float, float] | None = None,
    hashes: tuple[str, str] = ("", ""),
) -> Judged:
    """A comparison of two speakers' answers to a prompt and the vote on it."""
    turns = ({"role": "user", "content": prompt},)
    shown = texts or (f"{left} on {prompt}", f"{right} on {prompt}")
    answers = tuple(
        Answer(
            Speaker(name, run=name, adapter_hash=hashes[i]),
            Decoding(),
            turns,
            shown[i],
            tokens=tokens[i],
            score=scores[i] if scores else None,
            scored_by="rm" if scores else None,
        )
        for i, name in enumerate((left, right))
    )
    comparison = Comparison(answers, annotator, blind, repeat_of=repeat_of)
    return Judged(comparison, (Vote(comparison.id, annotator, "pair", choice=choice),))
