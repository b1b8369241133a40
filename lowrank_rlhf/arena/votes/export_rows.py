"""Votes as rows of training data, in TRL's conversational form: pairs, rankings, single answers, demonstrations."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lowrank_rlhf.arena.votes.records import Answer, Comparison, Judged, Message, Vote, prompt_key

KINDS = ("preference", "ranking", "unpaired", "demonstrations", "prompts")
HUMAN = "human"  # whose name a better answer has where models have theirs
UNSAID_STRENGTH = 1.0  # margin of a vote without a strength: the least

# Why a vote gives no row, in the words of the data card
TIE = "ties: neither is better"
TWO_PROMPTS = "the answers are to different prompts"
TWO_SYSTEMS = "the answers had different system prompts"
SAME_TEXT = "the answers are the same text"
REPEAT = "shown again to measure consistency; the first time is in"
NOT_BLIND = "not blind: names were shown"


@dataclass(frozen=True)
class Row:
    """One line of a file.

    Attributes:
        kind: of `KINDS`, the file.
        group: what the split goes by, the prompt's first question: all turns of a conversation are on one side.
        value: the line.
    """

    kind: str
    group: str
    value: dict[str, Any]


@dataclass
class Rows:
    """Rows out of judged comparisons, and what was left out of them.

    Args:
        blind_only: leave out votes that were given with the names in sight.
        names: annotators under their own names, not a1, a2 …
    """

    blind_only: bool = False
    names: bool = False
    votes: int = 0  # that gave rows
    blind: int = 0  # of these
    left_out: Counter[str] = field(default_factory=Counter)
    annotators: dict[str, str] = field(default_factory=dict)  # name → name in the files
    models: Counter[str] = field(default_factory=Counter)  # answers judged, by model
    strengths: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    dates: list[str] = field(default_factory=list)  # of the first and the last vote
    _first_time: set[tuple[str, str]] = field(default_factory=set)

    def of(self, judged: Judged) -> Iterator[Row]:
        """The rows of one comparison; a repeat is left out where its first time gave a vote of the same kind."""
        comparison = judged.comparison
        rows = [row for vote in judged.votes for row in self._of_vote(comparison, vote)]
        if not rows:
            return
        self.models.update(answer.speaker.name for answer in comparison.answers)
        yield from rows
        asked = {str(answer_prompt(answer)): answer for answer in comparison.answers}
        for answer in asked.values():
            yield Row("prompts", group_of(answer), {"prompt": answer_prompt(answer), "prompt_key": key_of(answer)})

    def _of_vote(self, comparison: Comparison, vote: Vote) -> list[Row]:
        if self.blind_only and not comparison.blind:
            self.left_out[NOT_BLIND] += 1
            return []
        if comparison.repeat_of is not None and (comparison.repeat_of, vote.kind) in self._first_time:
            self.left_out[REPEAT] += 1
            return []
        makers = {"pair": _pair, "ranking": _ranking, "thumb": _thumb, "better": _better}
        made = makers[vote.kind](comparison, vote)
        self._first_time.add((comparison.id, vote.kind))
        if isinstance(made, str):
            self.left_out[made] += 1
            return []
        self.votes += 1
        self.blind += comparison.blind
        self.strengths.update([vote.strength] if vote.strength else [])
        self.reasons.update(vote.reasons)
        self.dates = [min([*self.dates, vote.created]), max([*self.dates, vote.created])]
        name = self.annotators.setdefault(vote.annotator, f"a{len(self.annotators) + 1}")
        who = vote.annotator if self.names else name
        return [
            Row(kind, group_of(answer), {"prompt": answer_prompt(answer), **value, **_source(answer, who)})
            for kind, answer, value in made
        ]


Made = list[tuple[str, Answer, dict[str, Any]]]  # kind, an answer to the row's prompt, the row's own columns


def answer_prompt(answer: Answer) -> list[Message]:
    """What the model was given: the system prompt, where there was one, and the turns."""
    system = [{"role": "system", "content": answer.decoding.system}] if answer.decoding.system else []
    return [*system, *answer.prompt]


def key_of(answer: Answer) -> str:
    return prompt_key(answer.prompt)


def group_of(answer: Answer) -> str:
    """The first question of a conversation, whatever the system prompt."""
    first = next(i for i, turn in enumerate(answer.prompt) if turn["role"] == "user")
    return prompt_key(answer.prompt[first : first + 1])


def said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _source(answer: Answer, who: str) -> dict[str, str]:
    return {"prompt_key": key_of(answer), "annotator": who}


def _apart(comparison: Comparison) -> str | None:
    """Why its answers cannot be compared as training data, None where they can."""
    if comparison.prompt is None:
        return TWO_PROMPTS
    return TWO_SYSTEMS if len({answer.decoding.system for answer in comparison.answers}) > 1 else None


def _better_than(answer: Answer, better: str, worse: str, margin: float, names: tuple[str, str]) -> Made:
    value = {"chosen": said(better), "rejected": said(worse), "margin": margin}
    return [("preference", answer, {**value, "chosen_model": names[0], "rejected_model": names[1]})]


def _one(answer: Answer, up: bool) -> tuple[str, Answer, dict[str, Any]]:
    return "unpaired", answer, {"completion": said(answer.text), "label": up, "model": answer.speaker.name}


def _pair(comparison: Comparison, vote: Vote) -> Made | str:
    if vote.choice == "both_bad":
        distinct = {(str(answer_prompt(answer)), answer.text): answer for answer in comparison.answers}
        return [_one(answer, False) for answer in distinct.values()]
    if vote.choice == "tie":
        return TIE
    apart = _apart(comparison)
    if apart:
        return apart
    better, worse = comparison.answers if vote.choice == "a" else comparison.answers[::-1]
    if better.text == worse.text:
        return SAME_TEXT
    margin = float(vote.strength or UNSAID_STRENGTH)
    return _better_than(better, better.text, worse.text, margin, (better.speaker.name, worse.speaker.name))


def _ranking(comparison: Comparison, vote: Vote) -> Made | str:
    apart = _apart(comparison)
    if apart:
        return apart
    if len(set(vote.ranking)) == 1:
        return TIE
    answers = comparison.answers
    if len({(answer.text, rank) for answer, rank in zip(answers, vote.ranking, strict=True)}) > len(
        {answer.text for answer in answers}
    ):
        return SAME_TEXT  # with different ranks
    dense = sorted(set(vote.ranking))  # without gaps, as the data layer wants them
    value = {
        "responses": [said(answer.text) for answer in answers],
        "ranking": [dense.index(rank) + 1 for rank in vote.ranking],
        "models": [answer.speaker.name for answer in answers],
    }
    return [("ranking", answers[0], value)]


def _thumb(comparison: Comparison, vote: Vote) -> Made | str:
    return [_one(_about(comparison, vote), bool(vote.up))]


def _better(comparison: Comparison, vote: Vote) -> Made | str:
    shown, text = _about(comparison, vote), vote.text or ""
    demonstration = ("demonstrations", shown, {"completion": said(text), "model": HUMAN})
    return [demonstration, *_better_than(shown, text, shown.text, UNSAID_STRENGTH, (HUMAN, shown.speaker.name))]


def _about(comparison: Comparison, vote: Vote) -> Answer:
    return next(answer for answer in comparison.answers if answer.id == vote.answer)
