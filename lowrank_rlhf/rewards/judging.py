"""The rewards of an iteration, asked for in a worker thread while the main thread generates and computes log-probs.

Nothing goes on across an update: the scores of an iteration are there before its weights change. docs/rewards.md says
which source is asked when, and why.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from lowrank_rlhf.data import Example, Sequence
from lowrank_rlhf.rewards.scored import Overlap, Reward, Scored, column_names
from lowrank_rlhf.rewards.sources import Weighted, WeightedSum

Call = Callable[[], Scored]


class Worker:
    """One thread for all calls, which run one after the other in the order in which they came.

    A daemon, unlike those of a ThreadPoolExecutor: the process that ends does not wait for a call that hangs.
    """

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[Future[Scored], Call] | None] = SimpleQueue()
        self.thread: threading.Thread | None = None

    def __call__(self, call: Call) -> Future[Scored]:
        if self.thread is None:
            self.thread = threading.Thread(target=_work, args=(self.queue,), name="rewards", daemon=True)
            self.thread.start()
            weakref.finalize(self, self.queue.put, None)
        future: Future[Scored] = Future()
        self.queue.put((future, call))
        return future


def _work(queue: "SimpleQueue[tuple[Future[Scored], Call] | None]") -> None:
    while (item := queue.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                future.set_exception(error)
        del item, future, call  # while it waits, the worker keeps no iteration in memory


class Judging:
    """The scores of one iteration: `add` what is generated, `add_rest`, and ask for the `result`.

    The scores and their order are those of `total(examples, sequences)`.

    Args:
        examples: of all completions; those of a prompt are a group of `group_size`, one after the other.

    Attributes:
        seconds: that the calls in the worker took, once the result is there.
    """

    def __init__(self, total: WeightedSum, worker: Worker, examples: SequenceOf[Example], group_size: int = 1):
        self.total, self.worker, self.examples, self.group_size = total, worker, examples, group_size
        self.waiting: dict[int, Sequence] = {}
        self.calls: dict[str, list[tuple[SequenceOf[int], Future[Scored]]]] = {}
        self.here: dict[str, Scored] = {}
        self.seconds = 0.0

    def add(self, found: Mapping[int, Sequence]) -> None:
        """What was generated just now, by place; of groups that are complete, the scores are asked for at once.

        Raises:
            Exception: what an earlier call has raised.
        """
        for future in self._futures():
            if future.done():
                future.result()
        self.waiting |= found
        sizes = Counter(i // self.group_size for i in self.waiting)
        rows = sorted(i for i in self.waiting if sizes[i // self.group_size] == self.group_size)
        sequences = [self.waiting.pop(i) for i in rows]
        names = column_names(self.examples)  # of all, so that a call has the same columns whatever rows it is for
        examples = [self.examples[i] for i in rows]
        examples = [replace(e, columns={name: e.columns.get(name) for name in names}) for e in examples]
        for term in self._terms("generation"):
            if rows:
                self._ask(term, rows, examples, sequences)

    def add_rest(self, sequences: SequenceOf[Sequence]) -> None:
        """All are generated: ask the sources that want to see them together, and in this thread those that need it."""
        for term in self._terms("scoring"):
            self._ask(term, range(len(sequences)), self.examples, sequences)
        for term in self._terms("none"):
            self.here[term.name] = term.source(self.examples, sequences)

    def result(self) -> Scored:
        """Waits for the worker.

        Raises:
            Exception: what a call has raised.
        """
        return self.total.total(self.here | {name: _in_order(calls) for name, calls in self.calls.items()})

    def close(self) -> None:
        """Forget the calls that have not begun."""
        for future in self._futures():
            future.cancel()

    def _terms(self, overlap: Overlap) -> list[Weighted]:
        return [term for term in self.total.terms if getattr(term.source, "overlap", "none") == overlap]

    def _futures(self) -> Iterator[Future[Scored]]:
        return (future for calls in self.calls.values() for _, future in calls)

    def _ask(self, term: Weighted, rows: SequenceOf[int], *arguments: Any) -> None:
        self.calls.setdefault(term.name, []).append((rows, self.worker(partial(self._timed, term.source, *arguments))))

    def _timed(self, source: Reward, *arguments: Any) -> Scored:
        started = time.perf_counter()
        try:
            return source(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


def _in_order(calls: SequenceOf[tuple[SequenceOf[int], Future[Scored]]]) -> Scored:
    """One answer from those to several calls, each for some of the rows."""
    found = [(rows, future.result()) for rows, future in calls]
    scores = {i: score for rows, scored in found for i, score in zip(rows, scored.scores, strict=True)}
    doubts = {i: doubt for rows, scored in found for i, doubt in zip(rows, scored.disagreement, strict=True)}
    return Scored([scores[i] for i in sorted(scores)], [doubts[i] for i in sorted(doubts)])
