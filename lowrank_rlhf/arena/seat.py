"""One annotator at one browser: what is shown to them now, and what they may do with it.

Until the vote nothing that leaves a seat names a model: identities stay in the comparison, on the server.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.chat.engine import Progress, Request
from lowrank_rlhf.arena.study import Task
from lowrank_rlhf.arena.votes.checks import check_name
from lowrank_rlhf.arena.votes.records import Answer, Comparison, Message, Vote, new_id, prompt_key
from lowrank_rlhf.errors import UserError

BUSY = "answers are still being written: stop them first, or wait"
MAX_SEATS = 10_000


@dataclass(frozen=True)
class Shown:
    """What an annotator sees of a comparison: no more than this is sent before the vote.

    Attributes:
        comparison: its id, "" while the answers are being written.
        texts: of the answers, in the order of the sides.
        ids: of the answers, which a thumb or a better answer names.
    """

    prompt: tuple[Message, ...]
    system: str
    texts: tuple[str, ...]
    comparison: str = ""
    ids: tuple[str, ...] = ()


class Seat:
    """
    Attributes:
        annotator: whose votes these are.
        current: the comparison that is shown, with all that is hidden; None while answers are being written.
        last: the newest vote given here that can be taken back.
    """

    def __init__(self, arena: Arena, annotator: str):
        check_name(annotator)
        self.arena, self.annotator = arena, annotator
        self.current: Comparison | None = None
        self.last: Vote | None = None
        self.skipped: list[str] = []
        self._writing = threading.Lock()
        self._stopping = False
        self._since = 0.0

    # What is shown

    def next(self, samples: int = 2) -> Iterator[Shown] | None:
        """The next prompt of the queue with its answers growing; None when every prompt is judged.

        Raises:
            UserError: answers are still being written, or nobody can answer.
        """
        if self.arena.study.keys and self.current is not None and self.current.prompt and self._voted() is None:
            self.skipped.append(prompt_key(self.current.prompt))  # whatever is passed over comes again at the end
        task = self.arena.study.next(self.annotator, samples, self.skipped)
        return None if task is None else self._show(task)

    def ask(self, prompt: str, samples: int = 2) -> Iterator[Shown]:
        """Answers to a prompt of the annotator's own.

        Raises:
            UserError: it is empty, or as `next`.
        """
        text = prompt.encode("utf-8", "replace").decode().strip()
        if not text:
            raise UserError("the prompt is empty: write what is to be answered")
        return self._show(self.arena.study.task(({"role": "user", "content": text},), samples))

    def again(self) -> Iterator[Shown]:
        """Other answers of the same models to the same prompt, sides drawn anew.

        Raises:
            UserError: nothing is shown, or it has been voted on.
        """
        if self.current is None:
            raise UserError("there is nothing to answer again yet: take a prompt first")
        if self._voted() is not None:
            raise UserError("this has been voted on: take the vote back first, or go on")
        return self._show(self.arena.study.again(self.current))

    def stop(self) -> None:
        """End the answers that are being written here; what there is of them is judged."""
        self._stopping = self._writing.locked()

    def shown(self) -> Shown | None:
        """What is on the screen."""
        if self.current is None:
            return None
        answers = self.current.answers
        return Shown(
            answers[0].prompt,
            answers[0].decoding.system,
            tuple(answer.text for answer in answers),
            self.current.id,
            tuple(answer.id for answer in answers),
        )

    # What is said of it

    def vote(
        self, kind: str, *, comparison: str = "", vote_id: str = "", answer: int | None = None, **said: Any
    ) -> Vote:
        """Store a judgement; the same `vote_id` again, as after a broken connection, is the same vote.

        Args:
            kind: pair, ranking, thumb or better.
            comparison: its id, where it is not the one on the screen.
            answer: which side a thumb or a better answer is about, from 0.
            said: fields of `Vote`.

        Raises:
            UserError: nothing is shown, it is another annotator's, or the vote does not fit it.
        """
        judged = self.current
        if comparison and (judged is None or judged.id != comparison):
            judged = self.arena.store.comparison(comparison)
            if judged is None or judged.annotator != self.annotator:
                raise UserError(f"comparison: {self.annotator} was shown no {comparison!r:.80}")
        if judged is None:
            raise UserError("there is nothing to vote on yet: take a prompt first, and wait for its answers")
        self.arena.store.save_comparison(judged)  # one that was revealed by a vote taken back is a new one
        if answer is not None:
            if not 0 <= answer < len(judged.answers):
                raise UserError(f"answer: expected 0 to {len(judged.answers) - 1}, got {answer}")
            said["answer"] = judged.answers[answer].id
        vote = Vote(
            judged.id,
            self.annotator,
            kind,  # type: ignore[arg-type]  # the store checks it
            id=vote_id or new_id(),
            milliseconds=self._milliseconds(judged),
            **said,
        )
        self.last = self.arena.store.save_vote(vote)
        return self.last

    def undo(self) -> Vote:
        """Take the newest vote back; where it had revealed names, a new vote on the same answers is not blind.

        Raises:
            UserError: no vote was given at this seat, or it does not stand any more.
        """
        if self.last is None:
            raise UserError("there is no vote to take back here")
        judged = self.arena.store.comparison(self.last.comparison)
        back = self.arena.store.withdraw(self.last.id, self.annotator)
        if judged is not None and self.last.kind in ("pair", "ranking"):
            self.current, self._since = replace(judged, id=new_id(), blind=False), time.monotonic()
        self.last = None
        return back

    def names(self) -> tuple[str, ...] | None:
        """Who was who, once the comparison on the screen has been voted on; None before."""
        if self.current is None or self._voted() is None:
            return None
        return tuple(answer.speaker.name for answer in self.current.answers)

    def scores(self) -> tuple[float, ...] | None:
        """What the app's reward model says of the answers, None without one; waits for the model.

        Raises:
            UserError: before the vote, or it cannot score them.
        """
        reward = self.arena.reward
        if reward is None or self.current is None:
            return None
        if self._voted() is None:
            raise UserError("scores are shown after the vote")
        current = self.current
        found = {
            a.id: self.arena.engine.score(reward, a.prompt, a.text, a.decoding.system) if a.score is None else a.score
            for a in current.answers
        }
        self.arena.store.save_scores(reward, found)
        answers = tuple(replace(a, score=found[a.id], scored_by=reward) for a in current.answers)
        if self.current is current:
            self.current = replace(current, answers=answers)
        return tuple(found.values())

    # Internals

    def _voted(self) -> Vote | None:
        """The vote that stands on what is on the screen."""
        assert self.current is not None
        standing = self.arena.store.standing(self.current.id)
        return next((vote for vote in standing if vote.kind in ("pair", "ranking")), None)

    def _milliseconds(self, judged: Comparison) -> int:
        if judged is self.current:
            return round((time.monotonic() - self._since) * 1000)
        created = datetime.fromisoformat(judged.created)
        return max(0, round((datetime.now(UTC) - created).total_seconds() * 1000))

    def _show(self, task: Task) -> Iterator[Shown]:
        # Claimed by the generator itself: one that is never started must not leave the seat busy
        if not self._writing.acquire(blocking=False):
            raise UserError(BUSY)
        try:
            self.current, self._stopping = None, False
            if task.shown is not None:
                comparison = task.shown
            else:
                answers: list[Progress] = []
                system = task.decodings[0].system
                for answers in self._stream(task):
                    yield Shown(task.prompt, system, tuple(answer.text for answer in answers))
                if not any(answer.tokens for answer in answers):
                    return  # stopped before anything was said
                comparison = Comparison(self._records(task, answers), self.annotator, blind=True)
                self.arena.study.count(comparison)
            self.arena.store.save_comparison(comparison)
            self.current, self._since = comparison, time.monotonic()
        finally:
            self._writing.release()
        shown = self.shown()
        assert shown is not None
        yield shown

    def _stream(self, task: Task) -> Iterator[list[Progress]]:
        requests = [
            Request(speaker, list(task.prompt), decoding)
            for speaker, decoding in zip(task.speakers, task.decodings, strict=True)
        ]
        try:
            yield from self.arena.engine.stream(requests, lambda: self._stopping)
        except UserError as error:
            raise UserError(self._unnamed(str(error))) from error

    def _records(self, task: Task, answers: Sequence[Progress]) -> tuple[Answer, ...]:
        return tuple(
            Answer(
                self.arena.engine.speaker(speaker),
                decoding,
                task.prompt,
                answer.text,
                answer.tokens,
                answer.ended,
                answer.milliseconds,
                answer.first_token_milliseconds,
                beside=task.speakers,
            )
            for speaker, decoding, answer in zip(task.speakers, task.decodings, answers, strict=True)
        )

    def _unnamed(self, problem: str) -> str:
        """An error's words, unless they say who was to answer: the annotator still votes on that."""
        catalog = self.arena.catalog
        names = (
            {found.speaker.run for found in catalog.speakers.values()} | set(catalog.speakers) - {"base"} | {"adapter"}
        )
        if not any(name and name in problem for name in names):
            return problem
        print(f"voting: {problem}", flush=True)
        return "one of the models cannot answer; the app's terminal says why. Go on with the next prompt"


class Seats:
    """The seats by browser session; the ones not used for longest are given up, their votes are in the store."""

    def __init__(self, arena: Arena):
        self.arena = arena
        self._seats: OrderedDict[str, Seat] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: str, annotator: str) -> Seat:
        """The seat of a session; another name in the same browser is another seat.

        Raises:
            UserError: no name.
        """
        annotator = annotator.strip()
        with self._lock:
            seat = self._seats.get(session)
            if seat is None or seat.annotator != annotator:
                seat = self._seats[session] = Seat(self.arena, annotator)
            self._seats.move_to_end(session)
            while len(self._seats) > MAX_SEATS:
                self._seats.popitem(last=False)
            return seat

    def leave(self, session: str) -> None:
        """The browser is closed: nothing is written for it any more."""
        with self._lock:
            seat = self._seats.pop(session, None)
        if seat is not None:
            seat.stop()
