"""What the tables of a vote store say, as records: comparisons with their scores, and which votes stand."""

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Speaker, Vote, as_json
from lowrank_rlhf.errors import UserError

KEY = ("annotator", "kind", "answer")  # of the votes on a comparison, the last one of each stands
SENT_AGAIN: dict[str, Any] = {"created": "", "milliseconds": 0, "supersedes": None}  # may differ in the same vote


def comparison_from(record: dict[str, Any]) -> Comparison:
    """The inverse of `as_json`, once its text is parsed."""
    return Comparison(**{**record, "answers": tuple(_answer_from(answer) for answer in record["answers"])})


def _answer_from(record: dict[str, Any]) -> Answer:
    nested = {
        "speaker": Speaker(**record["speaker"]),
        "decoding": Decoding(**record["decoding"]),
        "prompt": tuple(record["prompt"]),
        "beside": tuple(record["beside"]),
    }
    return Answer(**{**record, **nested})


def vote_from(record: dict[str, Any]) -> Vote:
    return Vote(**{**record, "ranking": tuple(record["ranking"]), "reasons": tuple(record["reasons"])})


def votes_on(connection: sqlite3.Connection, comparisons: list[str]) -> dict[str, list[Vote]]:
    marks = ", ".join("?" * len(comparisons))
    query = f"SELECT comparison, record FROM votes WHERE comparison IN ({marks}) ORDER BY created, seq"
    votes: dict[str, list[Vote]] = {comparison: [] for comparison in comparisons}
    for comparison, record in connection.execute(query, comparisons):
        votes[comparison].append(vote_from(json.loads(record)))
    return votes


def key(vote: Vote) -> tuple[str | None, ...]:
    return tuple(getattr(vote, column) for column in KEY)


def last_of_each(votes: Iterable[Vote]) -> tuple[Vote, ...]:
    """The votes that stand, in order: of each key the last one, unless it takes the one before back."""
    last: dict[tuple[str | None, ...], Vote] = {}
    for vote in votes:
        last.pop(key(vote), None)  # so that the order is that of the votes that stand
        last[key(vote)] = vote
    return tuple(vote for vote in last.values() if not vote.withdrawn)


def scored(comparison: Comparison, connection: sqlite3.Connection) -> Comparison:
    """With the scores that its answers were given later; the last reward model's, where there are several."""
    ids = [answer.id for answer in comparison.answers if answer.score is None]
    query = f"SELECT answer, score, scored_by FROM scores WHERE answer IN ({', '.join('?' * len(ids))}) ORDER BY seq"
    later = {answer: {"score": score, "scored_by": by} for answer, score, by in connection.execute(query, ids)}
    if not later:
        return comparison
    return replace(comparison, answers=tuple(replace(a, **later.get(a.id, {})) for a in comparison.answers))


def same_vote(vote: Vote, earlier: Vote) -> Vote:
    """The vote that is stored, where one of its id comes again.

    Raises:
        UserError: it is another one.
    """
    if as_json(replace(vote, **SENT_AGAIN)) != as_json(replace(earlier, **SENT_AGAIN)):
        raise UserError(f"vote {vote.id}: another vote has this id and stays as it is; give this one a new id")
    return earlier


def unscored(comparison: Comparison) -> Comparison:
    """What of a comparison is the same however often it is sent."""
    bare = tuple(replace(answer, score=None, scored_by=None) for answer in comparison.answers)
    return replace(comparison, answers=bare, created="")
