"""What a person sees while something takes long: a line a training step, and a bar over data."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

QUIET_SECONDS = 3.0
LINE_SECONDS = 15.0


class Progress:
    """Prints step, figures, speed and the time left.

    Args:
        name: of the stage.
        total: steps of the whole training.
        done: steps that an earlier process did.
        unit: what a step is.
    """

    def __init__(self, name: str, total: int, done: int = 0, unit: str = "step"):
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self.started = self.last = time.perf_counter()

    def step(self, step: int, tokens: int, **figures: float) -> dict[str, float]:
        """Print the line of a finished step; returns its speed, for the metrics."""
        speed, left = self.tick(step, tokens)
        shown = "".join(f"  {name} {value:.3f}" for name, value in figures.items())
        print(
            f"{self.name} {self.unit} {step:{len(str(self.total))}d}/{self.total}{shown}  "
            f"{speed['tokens_per_second']:.0f} tokens/s  {clock(left)} left",
            flush=True,
        )
        return speed

    def tick(self, step: int, tokens: int) -> tuple[dict[str, float], float]:
        """The speed of a finished step, for the metrics, and the seconds left at the mean speed so far."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        left = (now - self.started) / (step - self.done) * (self.total - step)
        return {"seconds": seconds, "tokens_per_second": tokens / seconds}, left


def clock(seconds: float) -> str:
    """
    >>> clock(59.6), clock(3661)
    ('1:00', '1:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items; after three seconds a bar on stderr if that is a terminal, else a line every 15 seconds.

    Args:
        total: how many there are, where it is known.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one shows it; torch is not asked here
        yield from items
        return
    started = time.monotonic()
    width = 0
    shown = started + QUIET_SECONDS
    terminal = sys.stderr.isatty()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now >= shown:
            line = _line(label, count, total, now - started)
            print(f"\r{line:<{width}}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
            width, shown = len(line), now + (0.2 if terminal else LINE_SECONDS)
    if terminal and width:
        print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)


def _line(label: str, count: int, total: int | None, seconds: float) -> str:
    """
    >>> _line("reading", 50, 200, 10.0)
    'reading [#####               ]  25 %  50 of 200  5/s  30 s left'
    """
    rate = count / seconds
    if total is None:
        return f"{label}  {count:,} rows  {_speed(rate)}"
    done = count / total
    bar = f"{'#' * int(20 * done):<20}"
    return f"{label} [{bar}] {done:4.0%}".replace("%", " %") + (
        f"  {count:,} of {total:,}  {_speed(rate)}  {(total - count) / rate:.0f} s left"
    )


def _speed(rate: float) -> str:
    """
    >>> _speed(1234.5), _speed(0.1)
    ('1,234/s', '10 s each')
    """
    return f"{rate:,.0f}/s" if rate >= 1 else f"{1 / rate:.0f} s each"
