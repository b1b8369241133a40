"""One annotator at one screen: what is shown now, and the votes on it. Who answered stays here until the vote."""

import hashlib
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lowrank_rlhf.arena.blind import KEPT_BACK, HasModels, blind_comparison, nameless
from lowrank_rlhf.arena.chat.engine import Progress, Request
from lowrank_rlhf.arena.study import Item
from lowrank_rlhf.arena.votes.checks import DECIDING, check_name
from lowrank_rlhf.arena.votes.records import Answer, Choice, Comparison, Vote, new_id
from lowrank_rlhf.errors import UserError

State = Literal["empty", "asked", "answering", "shown", "voted", "finished"]


@dataclass(frozen=True)
class Details:
    """What may come with a vote: how much better (1 to 4), why, and a comment."""

    strength: int | None = None
    reasons: tuple[str, ...] = ()
    comment: str = ""


@dataclass(frozen=True)
class Revealed:
    """Who gave an answer, and what the reward model says of it, None where none has scored it."""

    name: str
    score: float | None = None


class Seat:
    """The state of one session; its methods may be called from any thread.

    Attributes:
        annotator: whose votes these are.
        state: empty, asked (a prompt that nobody answers yet), answering, shown, voted or finished.
        item: what is judged, without the names of who answers, which nothing shown may hold.
        comparison: what was shown, once its answers are complete.
        voted: the vote on it.
    """

    def __init__(self, arena: HasModels, annotator: str):
        check_name(annotator)
        self.arena, self.annotator = arena, annotator
        self.state: State = "empty"
        self.item: Item | None = None
        self.comparison: Comparison | None = None
        self.voted: Vote | None = None
        self._stopping = self._failed = False
        self._since = 0.0
        self._lock = threading.RLock()

    def next(self) -> None:
        """Go on to what is to be judged next; what is not voted on yet stays, unless its answers failed."""
        with self._lock:
            if self.state in ("asked", "answering", "shown") and not self._failed:
                self._stopping = self._stopping and self.state == "answering"
                return
            self._take(self.arena.study.next(self.annotator))

    def skip(self) -> None:
        """Put this one off and go on to the next."""
        with self._lock:
            self._idle()
            if self.item is not None and self.state in ("asked", "shown"):
                self.arena.study.skip(self.annotator, self.item)
            self._take(self.arena.study.next(self.annotator))

    def ask(self, prompt: str) -> None:
        """Have a prompt of one's own answered, instead of what is shown.

        Raises:
            UserError: it is empty, or an answer is being written.
        """
        with self._lock:
            self._idle()
            self._take(self.arena.study.free(prompt or ""))

    def regenerate(self) -> None:
        """Have the same models answer the same prompt again, before the vote; after a failure, those drawn anew.

        Raises:
            UserError: there is nothing to answer again, or it has been voted on.
        """
        with self._lock:
            self._idle()
            if self.item is None or self.state == "voted":
                raise UserError("There is nothing to answer again; go on to the next prompt.")
            if self.comparison is not None and self.comparison.repeat_of:
                return self._take(self.item)  # its answers are the point of a repeat
            draw = self.arena.study.anew if self._failed else self.arena.study.again
            self._take(draw(self.item))

    def stream(self) -> Iterator[list[Progress]]:
        """The answers so far, in the order shown, whenever they have grown; nothing where they are there already.

        Raises:
            UserError: they cannot be written; the message names no model. The prompt stays, to be answered again.
        """
        with self._lock:
            item = self.item
            if self.state != "asked" or item is None:
                return
            self.state = "answering"
        answers: list[Progress] = []
        try:
            requests = [Request(n, list(item.prompt), d) for n, d in zip(item.speakers, item.decodings, strict=True)]
            for answers in self.arena.engine.stream(requests, lambda: self._stopping):
                yield answers
            if any(answer.text for answer in answers) or not self._stopping:
                self._keep(blind_comparison(item, answers, self.annotator))
        except Exception as error:
            self._failed = True
            self.arena.study.failed(item)
            if isinstance(error, UserError):
                raise UserError(nameless(str(error), self.arena.catalog, item.speakers)) from error
            traceback.print_exc()  # on the page it could name a model
            raise UserError(KEPT_BACK) from error
        finally:
            with self._lock:
                if self.state == "answering":
                    self.state = "asked"

    def stop(self) -> None:
        """End the answers that are being written for this seat; what there is of them can be voted on."""
        self._stopping = True

    def judges(self, comparison_id: str) -> None:
        """Check what a page says that it has drawn: a key may be pressed after the seat has gone on.

        Raises:
            UserError: another comparison is judged by now, or none.
        """
        if self.comparison is None or self.comparison.id != comparison_id:
            raise UserError("Nothing was saved: these answers were about to be replaced. Look at what is shown now.")

    def vote(self, choice: Choice, details: Details = Details(), vote_id: str | None = None, of: str = "") -> Vote:
        """Choose between two answers.

        Args:
            vote_id: the same id again is the same vote; without one, it is made from the comparison's.
            of: id of the comparison, the one shown where it is left out.

        Raises:
            UserError: it is not this annotator's, does not fit, or another vote on it stands.
        """
        strength = details.strength if choice in ("a", "b") else None
        return self._decide(of, vote_id, details, kind="pair", choice=choice, strength=strength)

    def rank(
        self, ranks: Sequence[int], details: Details = Details(), vote_id: str | None = None, of: str = ""
    ) -> Vote:
        """Give every answer a rank from 1, the best; equal ranks are ties. Arguments and errors as of `vote`."""
        return self._decide(of, vote_id, details, kind="ranking", ranking=tuple(ranks))

    def thumb(self, index: int, up: bool, vote_id: str | None = None, of: str = "") -> Vote:
        """Say of one answer alone, by its place, that it is good or bad; reveals nothing.

        Raises:
            UserError: there is no such answer.
        """
        comparison = self._of(of)
        answer = _answer_at(comparison, index)
        vote = Vote(comparison.id, self.annotator, "thumb", answer=answer.id, up=up, id=vote_id or new_id())
        return self.arena.store.save_vote(vote)

    def better(self, index: int, text: str, vote_id: str | None = None, of: str = "") -> Vote:
        """Write a better answer than one of those shown; reveals nothing.

        Raises:
            UserError: there is no such answer, or the text is empty, the same, or too long.
        """
        comparison = self._of(of)
        answer, text = _answer_at(comparison, index), (text or "").encode("utf-8", "replace").decode()
        vote = Vote(comparison.id, self.annotator, "better", answer=answer.id, text=text, id=vote_id or new_id())
        return self.arena.store.save_vote(vote)

    def undo(self) -> Comparison:
        """Take the vote on what is shown back, to vote on it again.

        Returns:
            The same answers as another comparison, which is not blind: their names were seen by then.

        Raises:
            UserError: nothing was voted on yet.
        """
        with self._lock:
            if self.voted is None or self.comparison is None:
                raise UserError("There is no vote to take back.")
            self.arena.store.withdraw(self.voted.id, self.annotator)
            shown = self.comparison
            again = Comparison(shown.answers, self.annotator, blind=False)
            self._keep(again)
            return again

    def reveal(self) -> list[Revealed]:
        """Who gave the answers, in the order shown.

        Raises:
            UserError: before the vote.
        """
        with self._lock:
            if self.voted is None or self.comparison is None:
                raise UserError("Names are shown after the vote.")
            shown = self.arena.store.comparison(self.comparison.id) or self.comparison
            return [Revealed(answer.speaker.name, answer.score) for answer in shown.answers]

    def score(self) -> None:
        """Have the reward model score what was voted on, for the leaderboard and for `reveal`.

        Raises:
            UserError: it cannot; the vote is stored all the same.
        """
        reward = self.arena.reward
        with self._lock:
            comparison = self.comparison if self.voted is not None else None
        if reward is None or comparison is None or all(revealed.score is not None for revealed in self.reveal()):
            return
        scores = {
            answer.id: self.arena.engine.score(reward, answer.prompt, answer.text, answer.decoding.system)
            for answer in comparison.answers
        }
        self.arena.store.save_scores(reward, scores)

    # What changes the state

    def _take(self, item: Item | None) -> None:
        self.item, self.comparison, self.voted = item, None, None
        self._stopping = self._failed = False
        self.state = "finished" if item is None else "asked"
        if item is not None and item.comparison is not None:
            self._keep(item.comparison)

    def _keep(self, comparison: Comparison) -> None:
        """Store what is shown before anybody can vote on it."""
        self.arena.store.save_comparison(comparison)
        self.arena.study.count(comparison)
        with self._lock:
            self.item, self.comparison, self.voted = Item.shown(comparison), comparison, None
            self.state, self._since = "shown", time.monotonic()

    def _decide(self, of: str, vote_id: str | None, details: Details, **what: object) -> Vote:
        with self._lock:
            comparison = self._of(of)
            current = self.comparison is not None and self.comparison.id == comparison.id
            standing = [v for v in self.arena.store.standing(comparison.id) if v.kind in DECIDING]
            vote = Vote(
                comparison.id,
                self.annotator,
                reasons=tuple(details.reasons),
                comment=details.comment,
                milliseconds=round((time.monotonic() - self._since) * 1000) if current else 0,
                id=vote_id or _vote_id(comparison),
                **what,  # type: ignore[arg-type]
            )
            if any(earlier.id != vote.id for earlier in standing):
                raise UserError("You have voted on this comparison; take that vote back first.")
            saved = self.arena.store.save_vote(vote)
            if current:
                self.voted, self.state = saved, "voted"
            return saved

    def _of(self, comparison_id: str) -> Comparison:
        """The comparison shown, or an earlier one of this annotator.

        Raises:
            UserError: there is none, or it was shown to somebody else; both with the same words.
        """
        shown = self.comparison
        if shown is not None and comparison_id in ("", shown.id):
            return shown
        if not comparison_id:
            raise UserError("There is nothing to vote on yet; wait for the answers.")
        comparison = self.arena.store.comparison(comparison_id)
        if comparison is None or comparison.annotator != self.annotator:
            raise UserError(f"No comparison {comparison_id!r:.80} was shown to {self.annotator}.")
        return comparison

    def _idle(self) -> None:
        if self.state == "answering":
            raise UserError("An answer is being written; stop it first, or wait for it.")


def _vote_id(comparison: Comparison) -> str:
    """So that a vote that is sent twice is one vote."""
    return hashlib.sha256(f"vote on {comparison.id}".encode()).hexdigest()[:32]


def _answer_at(comparison: Comparison, index: int) -> Answer:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(comparison.answers):
        raise UserError(f"There is no answer {index!r:.20}; the first of the {len(comparison.answers)} is 0.")
    return comparison.answers[index]
