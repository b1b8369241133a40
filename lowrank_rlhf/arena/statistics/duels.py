"""Votes as duels: what every statistic here is computed from."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from lowrank_rlhf.arena.votes.records import Answer, Comparison, Judged, Speaker, Vote, prompt_key

OUTCOMES = {"a": 1.0, "tie": 0.5, "both_bad": 0.5, "b": 0.0}
HASH_CHARACTERS = 8


@dataclass(frozen=True)
class Duel:
    """One person's verdict on two answers.

    Attributes:
        prompt: what intervals resample; the turns of one conversation share it.
        left, right: the players; left was shown as A, or earlier in a ranking.
        outcome: of the left one: 1 won, 0 lost, 0.5 a tie.
        both_bad: neither was good; on a leaderboard a tie.
        left_tokens, right_tokens: of the two answers.
        left_score, right_score: of the reward model `scored_by`; None where not both have a score of the same one.
        strength: how much better the winner is, 1 to 4; None where nobody said.
        comparison, repeat_of: ids; see `Comparison`.
        ranking: whether it is one of the pairs of a ranking.
        weight: 1, or 2/(K(K − 1)) for each pair of a ranking of K: one vote counts once.
        blind: whether the names were hidden.
        item: equal where people judged the same two texts, in whatever order; None where the texts are equal.
        label: first, second or neither, of the item's answers in an order that has nothing to do with who gave them.
    """

    prompt: str
    left: str
    right: str
    outcome: float
    both_bad: bool
    annotator: str
    left_tokens: int
    right_tokens: int
    left_score: float | None
    right_score: float | None
    scored_by: str | None
    strength: int | None
    comparison: str
    repeat_of: str | None
    ranking: bool
    weight: float
    blind: bool
    item: str | None
    label: str


def duels(judged: Iterable[Judged]) -> list[Duel]:
    """Every standing verdict on two answers: pair votes, and each pair of a ranking.

    A player is a speaker: the same name with other weights is another player and shows its hash. Thumbs and better
    answers compare no two speakers and are left out.
    """
    kept = list(judged)
    names = player_names(answer.speaker for one in kept for answer in one.comparison.answers)
    return [duel for one in kept for vote in one.votes for duel in _of_vote(one.comparison, vote, names)]


def thumbs(judged: Iterable[Judged]) -> dict[str, tuple[int, int]]:
    """Thumbs up and all thumbs of each player that has any."""
    kept = list(judged)
    names = player_names(answer.speaker for one in kept for answer in one.comparison.answers)
    up: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one in kept:
        speakers = {answer.id: names[_identity(answer.speaker)] for answer in one.comparison.answers}
        for vote in one.votes:
            if vote.kind == "thumb" and vote.answer in speakers:
                total[speakers[vote.answer]] += 1
                up[speakers[vote.answer]] += bool(vote.up)
    return {name: (up[name], count) for name, count in total.items()}


def player_names(speakers: Iterable[Speaker]) -> dict[tuple[str, ...], str]:
    """What to call each speaker in a table: its name, with the hash of its weights where names collide.

    >>> speakers = [Speaker("ppo", adapter_hash="aa"), Speaker("ppo", adapter_hash="bb"), Speaker("base")]
    >>> list(player_names(speakers).values())
    ['ppo (aa)', 'ppo (bb)', 'base']
    """
    found = {_identity(speaker): speaker for speaker in speakers}
    times = Counter(speaker.name for speaker in found.values())
    names: dict[tuple[str, ...], str] = {}
    for identity, speaker in found.items():
        name = speaker.name
        if times[name] > 1:
            name = f"{name} ({speaker.adapter_hash[:HASH_CHARACTERS] or speaker.base or 'no hash'})"
        taken = sum(other == name or other.startswith(f"{name} #") for other in names.values())
        names[identity] = f"{name} #{taken + 1}" if taken else name
    return names


def _identity(speaker: Speaker) -> tuple[str, ...]:
    return (speaker.name, speaker.adapter_hash, speaker.base, speaker.revision or "", speaker.quantization)


def _of_vote(comparison: Comparison, vote: Vote, names: dict[tuple[str, ...], str]) -> Iterator[Duel]:
    answers = comparison.answers
    if vote.kind == "pair" and vote.choice is not None and len(answers) == 2:
        yield _duel(comparison, vote, names, (0, 1), OUTCOMES[vote.choice], 1.0)
    elif vote.kind == "ranking" and 2 <= len(answers) == len(vote.ranking):
        weight = 2 / (len(answers) * (len(answers) - 1))
        for i, j in combinations(range(len(answers)), 2):
            gap = vote.ranking[j] - vote.ranking[i]  # rank 1 is best
            yield _duel(comparison, vote, names, (i, j), 0.5 + 0.5 * ((gap > 0) - (gap < 0)), weight)


def _duel(
    comparison: Comparison,
    vote: Vote,
    names: dict[tuple[str, ...], str],
    places: tuple[int, int],
    outcome: float,
    weight: float,
) -> Duel:
    left, right = (comparison.answers[place] for place in places)
    scored = left.scored_by == right.scored_by and left.score is not None and right.score is not None
    ours, theirs = _fingerprint(left), _fingerprint(right)
    first, second = ("first", "second") if ours < theirs else ("second", "first")
    return Duel(
        prompt=opening(left),
        left=names[_identity(left.speaker)],
        right=names[_identity(right.speaker)],
        outcome=outcome,
        both_bad=vote.choice == "both_bad",
        annotator=vote.annotator,
        left_tokens=left.tokens,
        right_tokens=right.tokens,
        left_score=left.score if scored else None,
        right_score=right.score if scored else None,
        scored_by=left.scored_by if scored else None,
        strength=vote.strength,
        comparison=comparison.id,
        repeat_of=comparison.repeat_of,
        ranking=vote.kind == "ranking",
        weight=weight,
        blind=comparison.blind,
        item=None if ours == theirs else min(ours, theirs) + max(ours, theirs),
        label={1.0: first, 0.5: "neither", 0.0: second}[outcome],
    )


def opening(answer: Answer) -> str:
    """The key of the conversation up to its first user's turn, so that its later turns fall into the same cluster."""
    until = next((i for i, turn in enumerate(answer.prompt) if turn["role"] == "user"), len(answer.prompt) - 1)
    return prompt_key(answer.prompt[: until + 1])


def _fingerprint(answer: Answer) -> str:
    said = json.dumps([answer.prompt, answer.text], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]
