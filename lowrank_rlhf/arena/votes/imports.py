"""Votes in: another store whole, or the preferences, rankings and thumbs of a data file as somebody's votes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_rlhf.arena.votes.checks import check_comparison, check_name, check_vote
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.records import STRENGTHS, Answer, Comparison, Decoding, Kind, Message, Speaker, Vote
from lowrank_rlhf.errors import UserError

if TYPE_CHECKING:
    from lowrank_rlhf.data.examples import Example

SQLITE = b"SQLite format 3\x00"
MAX_RANKED = 9

Read = tuple[Comparison, list[Vote]]


def import_votes(store: Store, path: str | Path, annotator: str, *, left_out: list[str] | None = None) -> int:
    """Add the votes of a file, all or nothing; the same file again adds nothing.

    A store's comparisons and votes keep their ids, dates and annotators. Of a data file, every pair, ranking or single
    answer with a label becomes a vote of `annotator`, on models called as its columns `chosen_model`, `rejected_model`,
    `model` or `models` say, else chosen, rejected, liked, disliked, response 1 …; which side a pair's better answer
    is on goes by a hash, so that imports have no side bias, and they do not count as blind.

    Args:
        path: a store, or a file in one of the data formats that say what is better.
        left_out: gets a reason for each row that is fit for training but not for a vote.

    Returns:
        How many votes were new.

    Raises:
        UserError: no such file, a row that does not fit its format, or votes that contradict those that are there.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a store (.db) or a data file")
    with path.open("rb") as file:
        is_store = file.read(len(SQLITE)) == SQLITE
    if is_store:
        if path.samefile(store.path):
            raise UserError(f"{path}: this is the store itself; give another file")
        other = Store(path, create=False)
        try:
            return store.merge(other.history())
        finally:
            other.close()
    check_name(annotator)
    return store.merge(_read(path, annotator, [] if left_out is None else left_out))


def _read(path: Path, annotator: str, left_out: list[str]) -> Iterator[Read]:
    from lowrank_rlhf.data.files import read_rows
    from lowrank_rlhf.data.formats import detect_format

    format = ""
    times: Counter[str] = Counter()
    for where, row in read_rows(str(path)):
        if isinstance(row, UserError):
            raise row
        format = format or detect_format(row, where)
        digest = _digest(annotator, row)
        times[digest] += 1  # a row that is there twice is two votes
        for number, judged in enumerate(_judgements(format, row, where)):
            comparison, vote = judged.named(annotator, _digest(digest, times[digest], number))
            try:
                if judged.long:
                    raise UserError(f"{where}: an answer of several turns cannot be shown beside another")
                check_comparison(comparison)
                check_vote(vote, comparison)
            except UserError as error:
                left_out.append(f"{where}: {str(error).partition(': ')[2]}")
            else:
                yield comparison, [vote]


@dataclass(frozen=True)
class _Judgement:
    """One row's judgement, before it has an annotator and ids.

    Attributes:
        answers: model and text of each, the better one of a pair first.
        vote: its own fields of a `Vote`.
        long: whether an answer has turns of the user in it.
    """

    kind: Kind
    prompt: list[Message]
    answers: list[tuple[str, str]]
    vote: dict[str, Any]
    long: bool = False

    def named(self, annotator: str, digest: str) -> tuple[Comparison, Vote]:
        """As it was shown, and the vote; everything follows from the row, so that it comes out the same again."""
        system = self.prompt[0]["content"] if self.prompt[0]["role"] == "system" else ""
        turns = tuple(self.prompt[1:] if system else self.prompt)
        shown = [
            Answer(Speaker(name), Decoding(seed=0, system=system), turns, text, id=_digest(digest, i)[:32])
            for i, (name, text) in enumerate(self.answers)
        ]
        vote = dict(self.vote)
        if self.kind == "pair":
            first_is_better = int(digest[-1], 16) % 2 == 0
            shown = shown if first_is_better else shown[::-1]
            vote["choice"] = "a" if first_is_better else "b"
        if self.kind == "thumb":
            vote["answer"] = shown[0].id
        comparison = Comparison(tuple(shown), annotator, blind=False, id=digest[:32])
        return comparison, Vote(comparison.id, annotator, self.kind, **vote, id=_digest(digest, "vote")[:32])


def _judgements(format: str, row: dict[str, Any], where: str) -> list[_Judgement]:
    from lowrank_rlhf.data.formats import FORMATS

    if format == "ranking":
        return [_ranking(row, where)]
    parse, pairs = FORMATS[format].parse, FORMATS[format].pairs
    judged = []
    for example in pairs(row, where) if pairs else [parse(row, where)]:
        if example.chosen is not None and example.rejected is not None:
            judged.append(_pair(example))
        elif format == "unpaired":
            judged.append(_thumb(example))
        else:
            raise UserError(f"{where}: rows of format {format} do not say which answer is better; nothing was imported")
    return judged


def _pair(example: "Example") -> _Judgement:
    sides = {"chosen": example.chosen or [], "rejected": example.rejected or []}
    answers = [
        (_name(example.columns.get(f"{side}_model"), side), turns[-1]["content"]) for side, turns in sides.items()
    ]
    strength = int(example.margin) if example.margin in STRENGTHS else None
    long = any(len(turns) > 1 for turns in sides.values())
    return _Judgement("pair", example.prompt, answers, {"strength": strength}, long)


def _thumb(example: "Example") -> _Judgement:
    turns = example.chosen or example.rejected or []
    up = example.chosen is not None
    name = _name(example.columns.get("model"), "liked" if up else "disliked")
    return _Judgement("thumb", example.prompt, [(name, turns[-1]["content"])], {"up": up}, len(turns) > 1)


def _ranking(row: dict[str, Any], where: str) -> _Judgement:
    from lowrank_rlhf.data.fields import answer, sequence
    from lowrank_rlhf.data.preferences import ranked_pairs

    prompt = ranked_pairs(row, where)[0].prompt  # and every check of the format
    said = [
        answer({"responses": text}, "responses", where, prompt, empty=True)
        for text in sequence(row, "responses", where)
    ]
    given = row.get("models")
    models = given if isinstance(given, list) and len(given) == len(said) else [None] * len(said)
    names = [_name(model, f"response {i}") for i, model in enumerate(models, start=1)]
    ranks = sequence(row, "ranking", where)
    answers = [(name, turns[-1]["content"]) for name, turns in zip(names, said, strict=True)]
    ranking = tuple(rank - min(ranks) + 1 for rank in ranks)
    return _Judgement("ranking", prompt, answers, {"ranking": ranking}, any(len(turns) > 1 for turns in said))


def _name(value: Any, otherwise: str) -> str:
    return value if isinstance(value, str) and value.strip() else otherwise


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()
