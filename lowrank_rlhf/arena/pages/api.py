"""The voting page for programs: six named endpoints for gradio_client; all other events of the app are private.

They say no more than the page does: who wrote an answer comes with the reply to the vote. A request that was not
answered may be sent again with the same `vote_id`, also after a restart of the server; it is one vote all the same.
"""

from typing import Any, Literal, cast

import gradio as gr

from lowrank_rlhf.arena.seat import Details, Seat
from lowrank_rlhf.arena.seats import Seats
from lowrank_rlhf.arena.votes.records import Choice, Vote
from lowrank_rlhf.errors import UserError

AT_ONCE = 16  # requests that only read and write the store


def add_endpoints(seats: Seats, model: str) -> None:
    """Add /next, /vote, /rank, /thumb, /improve and /undo to the Blocks around.

    Args:
        model: concurrency_id of the events that use the base.
    """
    calls = Calls(seats)
    gr.api(calls.next, api_name="next", concurrency_id=model, concurrency_limit=1)
    for name, call in (
        ("vote", calls.vote),
        ("rank", calls.rank),
        ("thumb", calls.thumb),
        ("improve", calls.improve),
        ("undo", calls.undo),
    ):
        gr.api(call, api_name=name, concurrency_id="votes", concurrency_limit=AT_ONCE)


class Calls:
    """What the endpoints do. `annotator` is a name where nobody signs in; else that of who is signed in, or ""."""

    def __init__(self, seats: Seats):
        self.seats = seats

    def next(self, request: gr.Request, annotator: str = "") -> dict[str, Any]:
        """What is to be judged next, with its answers in the order shown; what was not voted on comes again.

        {"state": "shown", "comparison": id, "prompt": turns, "system", "answers": texts, "done", "total"}, or
        {"state": "finished"} when all is judged.
        """
        with _told():
            seat = self._seat(request, annotator)
            if seat.state != "answering":
                seat.next()
            for _ in seat.stream():
                pass
            done, total = seats_progress(seat)
            if seat.comparison is None:
                return {"state": seat.state, "done": done, "total": total}
            first = seat.comparison.answers[0]
            return {
                "state": seat.state,
                "comparison": seat.comparison.id,
                "prompt": list(first.prompt),
                "system": first.decoding.system,
                "answers": [answer.text for answer in seat.comparison.answers],
                "done": done,
                "total": total,
            }

    def vote(
        self,
        comparison: str,
        choice: str,
        request: gr.Request,
        strength: int | None = None,
        reasons: list[str] | None = None,
        comment: str = "",
        vote_id: str | None = None,
        annotator: str = "",
    ) -> dict[str, Any]:
        """Choose a, b, tie or both_bad; strength 1 to 4. The reply is {"vote": id, "models": names}."""
        with _told():
            seat, details = self._seat(request, annotator), _details(strength, reasons, comment)
            return self._reply(seat, seat.vote(cast(Choice, choice), details, vote_id, _named(comparison)))

    def rank(
        self,
        comparison: str,
        ranks: list[int],
        request: gr.Request,
        reasons: list[str] | None = None,
        comment: str = "",
        vote_id: str | None = None,
        annotator: str = "",
    ) -> dict[str, Any]:
        """Give each answer a rank, 1 is the best, equal ranks are ties. The reply is that of /vote."""
        with _told():
            seat, details = self._seat(request, annotator), _details(None, reasons, comment)
            return self._reply(seat, seat.rank(ranks, details, vote_id, _named(comparison)))

    def thumb(
        self,
        comparison: str,
        answer: int,
        up: bool,
        request: gr.Request,
        vote_id: str | None = None,
        annotator: str = "",
    ) -> dict[str, Any]:
        """Call one answer good or bad; the first is 0. The reply is {"vote": id}."""
        with _told():
            return {"vote": self._seat(request, annotator).thumb(answer, up, vote_id, _named(comparison)).id}

    def improve(
        self,
        comparison: str,
        answer: int,
        text: str,
        request: gr.Request,
        vote_id: str | None = None,
        annotator: str = "",
    ) -> dict[str, Any]:
        """Hand in a better answer than one of those shown; the first is 0. The reply is {"vote": id}."""
        with _told():
            return {"vote": self._seat(request, annotator).better(answer, text, vote_id, _named(comparison)).id}

    def undo(self, vote: str, request: gr.Request, annotator: str = "") -> dict[str, Any]:
        """Take a vote back, by its id. The reply is {"withdrawn": id}.

        Of the vote just given, the reply has "comparison" too: the same answers to vote on again, no longer blind.
        """
        with _told():
            seat = self._seat(request, annotator)
            if seat.voted is not None and seat.voted.id == vote:
                return {"withdrawn": vote, "comparison": seat.undo().id}
            self.seats.arena.store.withdraw(vote, seat.annotator)
            return {"withdrawn": vote}

    def _seat(self, request: gr.Request, annotator: str) -> Seat:
        signed_in = request.username
        if signed_in and annotator not in ("", signed_in):
            raise UserError(f"annotator: you are signed in as {signed_in}, so you vote as nobody else.")
        return self.seats.of(request.session_hash or "", signed_in or annotator)

    def _reply(self, seat: Seat, vote: Vote) -> dict[str, Any]:
        voted_on = self.seats.arena.store.comparison(vote.comparison)
        names = [answer.speaker.name for answer in voted_on.answers] if voted_on else []
        return {"vote": vote.id, "models": names}


def seats_progress(seat: Seat) -> tuple[int, int]:
    return seat.arena.study.progress(seat.annotator)


class _told:
    """What is wrong with a request becomes its reply instead of a traceback in the log."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        if isinstance(error, UserError):
            raise gr.Error(str(error), print_exception=False) from error
        return False


def _details(strength: int | None, reasons: list[str] | None, comment: str) -> Details:
    return Details(strength, tuple(reasons or ()), comment)


def _named(comparison: str) -> str:
    if not comparison:
        raise UserError("comparison: give the id that /next told.")
    return comparison
