"""One to four columns that answer the same prompts side by side, turn after turn."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lowrank_rlhf.arena.chat.engine import Progress, Request
from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Message
from lowrank_rlhf.errors import UserError

MAX_COLUMNS = 4
BUSY = "an answer is still being written: stop it first, or wait for it"
VOTED = (
    "the vote on these answers has shown who they are of, so it can be neither changed nor taken back: send the next "
    "prompt"
)
Scorer = Callable[[str, list[Message], str, str], float]


class Voices(Protocol):
    """What answers: the engine."""

    def stream(self, requests: Sequence[Request], stop: Callable[[], bool]) -> Iterator[list[Progress]]: ...


@dataclass
class Column:
    """Who answers on one side, how, and the turns so far (user and assistant by turns, no system prompt)."""

    speaker: str = ""
    decoding: Decoding = field(default_factory=Decoding)
    messages: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """The latest turn: what every column was asked and what came; one entry per column, in their order."""

    requests: tuple[Request, ...]
    answers: tuple[Progress, ...]


class Conversation:
    """Columns, their turns, and what the latest turn measured; nothing in it refuses to be copied or pickled.

    A turn is kept once it has ended or was stopped with some text; an error, a stop before any text and an iterator
    closed early leave the conversation as it was.

    Attributes:
        columns: in the order in which they are shown.
        order: of each shown column, the place of its settings: shuffled in a blind conversation.
        blind: whether the names are hidden until the vote.
        revealed: whether they have been shown since.
        closed: whether the vote that showed them was on the latest turn, so that no other one on it would be blind.
        latest: the last turn, None before the first and after `undo`, `clear` and `adopt`.
        scores: of the latest turn's answers, in the columns' order; () where no reward model scored them.
        busy: from `begin` until the answers are there, or a `stop` before anybody was asked.
        asking: the prompt that `begin` was called with.
    """

    def __init__(self) -> None:
        self.columns: list[Column] = [Column()]
        self.order: list[int] = [0]
        self.blind = self.revealed = self.closed = False
        self.latest: Turn | None = None
        self.scores: tuple[float, ...] = ()
        self.scored_by: str | None = None
        self.busy = self._running = self._stopping = False
        self.asking = ""
        self._attempt, self._shown = 0, 0.0
        self._comparisons: dict[str, Comparison] = {}  # by annotator

    def settle(self, settings: Sequence[tuple[str, Decoding]], blind: bool = False, *, seed: int | None = None) -> None:
        """Say who answers next and how.

        A column's turns stay with its settings. A blind conversation is shuffled when it starts; it starts anew once
        its names were revealed, and with another number of columns.

        Args:
            settings: speaker and decoding of each column, 1 to 4.
            seed: of the shuffle, for tests.

        Raises:
            UserError: none or too many columns, or answers are being written.
        """
        self._idle()
        if not 1 <= len(settings) <= MAX_COLUMNS:
            raise UserError(f"a conversation has 1 to {MAX_COLUMNS} columns, this has {len(settings)}")
        if blind != self.blind or (blind and (self.revealed or len(settings) != len(self.columns))):
            self.clear()
        if not self.turns:
            places = range(len(settings))
            self.order = random.Random(seed).sample(places, len(places)) if blind else list(places)
            self.columns = [Column() for _ in settings]
        self.blind = blind
        kept = [
            (place, column) for place, column in zip(self.order, self.columns, strict=True) if place < len(settings)
        ]
        kept += [(place, Column()) for place in range(len(kept), len(settings))]
        if len(kept) != len(self.columns):
            self._forget()
        self.order = [place for place, _ in kept]
        self.columns = [column for _, column in kept]
        for place, column in kept:
            column.speaker, column.decoding = settings[place]

    @property
    def hidden(self) -> bool:
        """Whether names and scores are not to be shown now."""
        return self.blind and not self.revealed

    @property
    def names(self) -> list[str]:
        """Who spoke last in each column, or speaks now; settings chosen since then count from the next turn on."""
        if self.latest is None or self.busy:
            return [column.speaker for column in self.columns]
        return [request.speaker for request in self.latest.requests]

    def reveal(self) -> None:
        """Show who answered, if that is hidden; the next `settle` starts a new conversation if it is to be blind."""
        if self.hidden:
            self.revealed = self.closed = True

    @property
    def turns(self) -> int:
        """Of the column that has most; those added later have fewer."""
        return max(len(column.messages) // 2 for column in self.columns)

    def begin(self, asking: str = "") -> None:
        """Claim the conversation for one `say` or `regenerate`, so that a stop asked while it waits is heard.

        Args:
            asking: the prompt, kept for whoever calls `say` when the model is free.

        Raises:
            UserError: it is claimed already.
        """
        self._idle()
        self.busy, self._stopping, self.asking = True, False, asking

    def stop(self) -> None:
        """End the answers that are being written, of this conversation only; what there is of them is kept.

        Where nobody has been asked since `begin`, the conversation is free at once: what was to ask may never come.
        """
        self._stopping, self.busy = self.busy, self._running

    def say(self, prompt: str, engine: Voices) -> Iterator[list[Progress]]:
        """All columns answer `prompt` at once.

        Yields:
            the answers so far, one per column, whenever they have grown.

        Raises:
            UserError: an empty prompt, or what the engine refuses; the conversation stays as it was.
        """
        text = prompt.encode("utf-8", "replace").decode()  # half of a surrogate pair can be neither sent nor stored
        if not text.strip():
            self.busy = False
            raise UserError("the prompt is empty: write what they are to answer")
        yield from self._ask([[*column.messages, _said("user", text)] for column in self.columns], engine, attempt=0)

    def regenerate(self, engine: Voices) -> Iterator[list[Progress]]:
        """Answer the latest prompt again, with each seed one higher than the last time.

        Raises:
            UserError: there is no turn yet, or what the engine refuses; the conversation stays as it was.
        """
        asked = [column.messages[:-1] for column in self.columns]
        if not all(asked):
            self.busy = False
            raise UserError("there is nothing to answer again in every column: send a prompt first")
        yield from self._ask(asked, engine, attempt=self._attempt + 1)

    def undo(self) -> str:
        """Take the latest turn back from every column and return its prompt, "" where there is none."""
        self._idle()
        prompts = [column.messages[-2]["content"] for column in self.columns if column.messages]
        for column in self.columns:
            del column.messages[-2:]
        self._forget()
        return prompts[0] if prompts else ""

    def clear(self) -> None:
        """Forget all turns; who answers stays."""
        self._idle()
        for column in self.columns:
            column.messages = []
        self.revealed = False
        self._forget()

    def adopt(self, index: int) -> None:
        """Go on in all columns from the turns of one, so that they answer the same prompt next."""
        self._idle()
        for column in self.columns:
            column.messages = list(self.columns[index].messages)
        self._forget()

    def score(self, scored_by: str, scorer: Scorer) -> None:
        """Have a reward model score the latest answers.

        Args:
            scored_by: the name of its run.
            scorer: (run, turns, answer, system prompt) → a score; the engine's `score`.

        Raises:
            UserError: what the scorer refuses, or a score that is no finite number; the scores there were stay.
        """
        if self.latest is not None:
            scores = tuple(
                scorer(scored_by, request.messages, answer.text, request.decoding.system)
                for request, answer in zip(self.latest.requests, self.latest.answers, strict=True)
            )
            if not all(map(math.isfinite, scores)):
                raise UserError(f"{scored_by}: its scores are {scores}; expected finite numbers, so look at that run")
            self.scores, self.scored_by = scores, scored_by

    def comparison(self, annotator: str) -> Comparison:
        """The latest turn as the record to vote on; an annotator's is the same one until the turn changes.

        Raises:
            UserError: no turn yet, its answers are still being written, or a blind vote on it has shown the names.
        """
        self._idle()
        if self.latest is None:
            raise UserError("there is nothing to vote on yet: send a prompt first")
        if self.closed:
            raise UserError(VOTED)
        if annotator not in self._comparisons:
            turn = self.latest
            beside = tuple(answer.speaker.name for answer in turn.answers)
            scores = self.scores or (None,) * len(beside)
            answers = tuple(map(_answer, turn.requests, turn.answers, scores))
            answers = tuple(replace(answer, scored_by=self.scored_by, beside=beside) for answer in answers)
            self._comparisons[annotator] = Comparison(answers, annotator, self.hidden)
        return self._comparisons[annotator]

    def since_shown(self) -> int:
        """Milliseconds since the latest answers were complete."""
        return round((time.monotonic() - self._shown) * 1000)

    def _ask(self, asked: list[list[Message]], engine: Voices, attempt: int) -> Iterator[list[Progress]]:
        requests = tuple(
            Request(column.speaker, messages, replace(column.decoding, seed=column.decoding.seed + attempt))
            for column, messages in zip(self.columns, asked, strict=True)
        )
        self.busy = self._running = True
        answers: list[Progress] = []
        try:
            for answers in engine.stream(requests, lambda: self._stopping):
                yield answers
            if not (self._stopping and not any(answer.text for answer in answers)):
                self._keep(Turn(requests, tuple(answers)), attempt)
        finally:
            self.busy = self._running = self._stopping = False

    def _keep(self, turn: Turn, attempt: int) -> None:
        for column, request, answer in zip(self.columns, turn.requests, turn.answers, strict=True):
            column.messages = [*request.messages, _said("assistant", answer.text)]
        self._forget()
        self.latest, self._attempt, self._shown = turn, attempt, time.monotonic()

    def _forget(self) -> None:
        self.latest, self.scores, self.scored_by, self._attempt = None, (), None, 0
        self._comparisons, self.closed = {}, False

    def _idle(self) -> None:
        if self.busy:
            raise UserError(BUSY)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _answer(request: Request, progress: Progress, score: float | None) -> Answer:
    return Answer(
        speaker=progress.speaker,
        decoding=request.decoding,
        prompt=tuple(request.messages),
        text=progress.text,
        tokens=progress.tokens,
        ended=progress.ended,
        milliseconds=progress.milliseconds,
        first_token_milliseconds=progress.first_token_milliseconds,
        score=score,
    )
