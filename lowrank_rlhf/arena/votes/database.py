"""The vote store: one SQLite file that is only added to, safe under threads, processes and kills."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lowrank_rlhf.arena.votes.checks import check_comparison, check_place, check_score, check_vote, sent_again
from lowrank_rlhf.arena.votes.reading import (
    KEY,
    comparison_from,
    key,
    last_of_each,
    same_vote,
    scored,
    unscored,
    vote_from,
    votes_on,
)
from lowrank_rlhf.arena.votes.records import Comparison, Judged, Vote, as_json, now
from lowrank_rlhf.arena.votes.schema import connect, identity, open_store, told
from lowrank_rlhf.errors import UserError

T = TypeVar("T")

CHUNK = 200  # comparisons in memory at a time


class Store:
    """Comparisons and votes in one file; what a call has stored outlives whatever happens next.

    Any number of threads may share a store, and any number of processes may have one on the same file; one writes at
    a time and the others wait. Nothing is changed or deleted: a vote is taken back by a later one.

    Attributes:
        path: of the file.

    Args:
        path: made, with its folder, where there is none.
        create: False refuses a file that does not exist.

    Raises:
        UserError: it is not a store, or a newer version's, or cannot be written; here and in every method.
    """

    def __init__(self, path: str | Path, *, create: bool = True):
        self.path = Path(path)
        self._connection = open_store(self.path, create=create)
        self._file = identity(self.path)
        self._lock = threading.RLock()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def save_comparison(self, comparison: Comparison) -> None:
        """Store what was shown to an annotator, before the vote on it; the same again is nothing.

        Raises:
            UserError: it is not well formed, other content has its id, or it repeats what is not this annotator's.
        """
        check_comparison(comparison)
        with self._transaction():
            self._add_comparison(comparison)

    def save_vote(self, vote: Vote) -> Vote:
        """Store a vote; it supersedes the standing one of the same annotator, comparison, kind and answer.

        The same vote id again changes nothing, so that a client may repeat a request whose answer it did not get.
        A blind comparison whose vote was taken back takes no choice and no ranking again: its names were shown.

        Returns:
            The vote as stored, with `supersedes`.

        Raises:
            UserError: there is no such comparison, it was shown to somebody else, the vote does not fit it or the votes
                before it, its id is another vote's, or it was stored and stands no more.
        """
        if vote.withdrawn:
            raise UserError(f"vote {vote.id}: a vote is taken back with withdraw()")
        with self._transaction():
            earlier = self._vote(vote.id)
            before = self._votes(vote.comparison)
            if earlier is not None:
                return sent_again(vote, earlier, before)
            comparison = self._comparison(vote.comparison)
            if comparison is None:
                raise UserError(f"vote {vote.id}: there is no comparison {vote.comparison!r:.80}")
            check_vote(vote, comparison)
            check_place(vote, comparison, before)
            last = [earlier for earlier in before if key(earlier) == key(vote)][-1:]
            created = max([vote.created, *(earlier.created for earlier in last)])  # whatever the clock was set to
            standing = next((earlier.id for earlier in last if not earlier.withdrawn), None)
            return self._add_vote(replace(vote, supersedes=standing, created=created))

    def withdraw(self, vote_id: str, annotator: str) -> Vote:
        """Take a standing vote back; doing it twice is doing it once.

        Returns:
            The record that withdraws it.

        Raises:
            UserError: there is no such vote, it is somebody else's, or a later vote has superseded it.
        """
        with self._transaction():
            vote = self._vote(vote_id)
            if vote is None or vote.annotator != annotator or vote.withdrawn:
                raise UserError(f"vote {vote_id!r:.80}: {annotator} has no such vote to take back")
            last = [later for later in self._votes(vote.comparison) if key(later) == key(vote)][-1]
            if last.withdrawn and last.supersedes == vote_id:
                return last
            if last.id != vote_id:
                raise UserError(f"vote {vote_id}: it stands no more, a later one has taken its place")
            back = Vote(vote.comparison, annotator, vote.kind, answer=vote.answer, supersedes=vote_id, withdrawn=True)
            return self._add_vote(replace(back, created=max(back.created, vote.created)))

    def save_scores(self, scored_by: str, scores: Mapping[str, float]) -> None:
        """Store a reward model's scores of answers, as after a blind vote; an answer is read with them from then on.

        Args:
            scored_by: the reward model's run; the first score it gave an answer stays.
            scores: by answer id.

        Raises:
            UserError: a score is not a finite number.
        """
        for answer, score in scores.items():
            check_score(score, f"answer {answer}")
        with self._transaction():
            self._add_scores([(answer, scored_by, float(score)) for answer, score in scores.items()])

    def merge(self, history: Iterable[tuple[Comparison, list[Vote]]]) -> int:
        """Store what another store holds, all or nothing, ids and dates as they are; what is here already stays.

        Args:
            history: as `history()` of that store gives it.

        Returns:
            How many votes were new.

        Raises:
            UserError: a comparison or a vote here has the same id and other content.
        """
        added = 0
        with self._transaction():
            for comparison, votes in history:
                check_comparison(comparison)
                self._add_comparison(comparison)
                given = [(a.id, a.scored_by or "", a.score) for a in comparison.answers if a.score is not None]
                self._add_scores(given)
                for vote in votes:
                    earlier = self._vote(vote.id)
                    if earlier is not None:
                        same_vote(vote, earlier)
                        continue
                    if not vote.withdrawn:
                        check_vote(vote, comparison)
                    self._add_vote(vote)
                    added += 1
        return added

    def comparison(self, comparison_id: str) -> Comparison | None:
        return self._reading(lambda: self._comparison(comparison_id))

    def vote(self, vote_id: str) -> Vote | None:
        return self._reading(lambda: self._vote(vote_id))

    def standing(self, comparison_id: str) -> tuple[Vote, ...]:
        """The votes on a comparison that are neither superseded nor withdrawn, in the order in which they came."""
        return self._reading(lambda: last_of_each(self._votes(comparison_id)))

    def comparisons_of(self, annotator: str) -> list[Comparison]:
        """All that was shown to an annotator, voted on or not, in that order."""

        def read() -> list[Comparison]:
            rows = self._connection.execute(
                "SELECT record FROM comparisons WHERE annotator = ? ORDER BY seq", (annotator,)
            ).fetchall()
            return [scored(comparison_from(json.loads(text)), self._connection) for (text,) in rows]

        return self._reading(read)

    def judged(self, kind: str | None = None, annotator: str | None = None) -> Iterator[Judged]:
        """Comparisons with votes that stand, in order of creation, as the store is when the first is asked for.

        Args:
            kind: only votes of this kind, and comparisons that have one.
            annotator: only those shown to this one.
        """
        for comparison, votes in self.history(annotator):
            standing = tuple(vote for vote in last_of_each(votes) if kind in (None, vote.kind))
            if standing:
                yield Judged(comparison, standing)

    def history(self, annotator: str | None = None) -> Iterator[tuple[Comparison, list[Vote]]]:
        """Every comparison with every vote on it, superseded and withdrawn ones too; one snapshot, in order."""
        with told(self.path), closing(connect(self.path)) as connection:
            connection.execute("BEGIN")
            after = -1
            where = "seq > ?" if annotator is None else "seq > ? AND annotator = ?"
            while True:
                values = (after,) if annotator is None else (after, annotator)
                query = f"SELECT seq, id, record FROM comparisons WHERE {where} ORDER BY seq LIMIT {CHUNK}"
                rows = connection.execute(query, values).fetchall()
                if not rows:
                    return
                after = rows[-1][0]
                votes = votes_on(connection, [row[1] for row in rows])
                for _, comparison_id, text in rows:
                    yield scored(comparison_from(json.loads(text)), connection), votes[comparison_id]

    def counts(self) -> dict[str, int]:
        """How much there is: comparisons, standing votes by kind, and votes that stand no more."""

        def read() -> dict[str, int]:
            def one(query: str) -> int:
                return int(self._connection.execute(query).fetchone()[0])

            same = " AND ".join(f"later.{column} IS votes.{column}" for column in ("comparison", *KEY))
            after = "(later.created, later.seq) > (votes.created, votes.seq)"
            gone = f"EXISTS (SELECT 1 FROM votes AS later WHERE {same} AND {after})"
            standing = f"SELECT count(*) FROM votes WHERE NOT withdrawn AND NOT {gone}"
            kinds = {kind: one(f"{standing} AND kind = '{kind}'") for kind in ("pair", "ranking", "thumb", "better")}
            return {
                "comparisons": one("SELECT count(*) FROM comparisons"),
                "repeats": one("SELECT count(*) FROM comparisons WHERE repeat_of IS NOT NULL"),
                "annotators": one("SELECT count(DISTINCT annotator) FROM votes"),
                "votes": sum(kinds.values()),
                **kinds,
                "superseded": one(f"SELECT count(*) FROM votes WHERE NOT withdrawn AND {gone}"),
                "withdrawn": one("SELECT count(*) FROM votes WHERE withdrawn"),
            }

        return self._reading(read)

    # Inside a transaction

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, told(self.path):
            if identity(self.path) != self._file:  # what is written to a deleted file is gone with this program
                raise UserError(
                    f"{self.path}: was moved, deleted or replaced while it was open; nothing was stored, "
                    "put it back or start again"
                )
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:  # commits, or rolls back when the body raises
                yield self._connection

    def _reading(self, read: Callable[[], T]) -> T:
        with self._lock, told(self.path):
            return read()

    def _comparison(self, comparison_id: str) -> Comparison | None:
        row = self._connection.execute("SELECT record FROM comparisons WHERE id = ?", (comparison_id,)).fetchone()
        return scored(comparison_from(json.loads(row[0])), self._connection) if row else None

    def _vote(self, vote_id: str) -> Vote | None:
        row = self._connection.execute("SELECT record FROM votes WHERE id = ?", (vote_id,)).fetchone()
        return vote_from(json.loads(row[0])) if row else None

    def _votes(self, comparison_id: str) -> list[Vote]:
        return votes_on(self._connection, [comparison_id])[comparison_id]

    def _add_comparison(self, comparison: Comparison) -> None:
        earlier = self._comparison(comparison.id)
        if earlier is not None:
            if as_json(unscored(earlier)) != as_json(unscored(comparison)):
                raise UserError(f"comparison {comparison.id}: another comparison has this id; give it a new one")
            return
        if comparison.repeat_of is not None:
            repeated = self._comparison(comparison.repeat_of)
            if repeated is None or repeated.annotator != comparison.annotator:
                raise UserError(f"comparison {comparison.id}: repeat_of: {comparison.annotator} has seen no such one")
        self._connection.execute(
            "INSERT INTO comparisons (id, annotator, repeat_of, created, record) VALUES (?, ?, ?, ?, ?)",
            (comparison.id, comparison.annotator, comparison.repeat_of, comparison.created, as_json(comparison)),
        )

    def _add_vote(self, vote: Vote) -> Vote:
        columns = ("id", "comparison", *KEY, "supersedes", "withdrawn", "created")
        self._connection.execute(
            f"INSERT INTO votes ({', '.join(columns)}, record) VALUES ({', '.join('?' * (len(columns) + 1))})",
            [*(getattr(vote, column) for column in columns), as_json(vote)],
        )
        return vote

    def _add_scores(self, rows: list[tuple[str, str, float]]) -> None:
        self._connection.executemany(
            "INSERT INTO scores (answer, scored_by, score, created) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (answer, scored_by) DO NOTHING",
            [(*row, now()) for row in rows],
        )
