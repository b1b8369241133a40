"""One at a time, first come first served: who may use the model."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.05


class Turns:
    """A lock that is given in the order in which it was asked for, and may be let go by another thread.

    Generators of a web server are closed by whatever thread drops them, which `threading.RLock` would refuse.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()  # the first of them has its turn

    @property
    def waiting(self) -> int:
        """How many there are, the one that has its turn included."""
        return len(self._waiting)

    def take(self, stop: Callable[[], bool] = lambda: False) -> threading.Event | None:
        """Wait for the turn; what `leave` takes back. None where `stop` said so while waiting."""
        turn = threading.Event()
        with self._guard:
            self._waiting.append(turn)
            if self._waiting[0] is turn:
                turn.set()
        try:
            while not turn.wait(POLL_SECONDS):
                if stop():
                    self.leave(turn)
                    return None
        except BaseException:
            self.leave(turn)
            raise
        return turn

    def leave(self, turn: threading.Event) -> None:
        with self._guard:
            self._waiting.remove(turn)
            if self._waiting:
                self._waiting[0].set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """A turn of its own for the block."""
        turn = self.take()
        assert turn is not None
        try:
            yield
        finally:
            self.leave(turn)
