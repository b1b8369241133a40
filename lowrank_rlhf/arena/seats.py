"""The seats of an app by session."""

import threading
from collections import OrderedDict

from lowrank_rlhf.arena.blind import HasModels
from lowrank_rlhf.arena.seat import Seat

MAX_SEATS = 10_000


class Seats:
    """The seats of an app by session; those not used for longest are given up when there are too many."""

    def __init__(self, arena: HasModels):
        self.arena = arena
        self._seats: OrderedDict[tuple[str, str], Seat] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: str, annotator: str) -> Seat:
        """The seat of an annotator in a session; the same session under another name is another seat.

        Raises:
            UserError: that is no name.
        """
        annotator = annotator.strip()
        with self._lock:
            seat = self._seats.pop((session, annotator), None) or Seat(self.arena, annotator)
            self._seats[session, annotator] = seat
            while len(self._seats) > MAX_SEATS:
                self._seats.popitem(last=False)
        return seat
