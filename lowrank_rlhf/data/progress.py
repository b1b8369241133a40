"""A progress bar for what takes longer than a few seconds, and nothing for what does not."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

QUIET_SECONDS = 3.0
LINE_SECONDS = 15.0


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items; after three seconds a bar on stderr if that is a terminal, else a line every 15 seconds.

    Args:
        total: how many there are, where it is known.
    """
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
        return f"{label}  {count:,} rows  {rate:,.0f}/s"
    done = count / total
    bar = f"{'#' * int(20 * done):<20}"
    return f"{label} [{bar}] {done:4.0%}".replace("%", " %") + (
        f"  {count:,} of {total:,}  {rate:,.0f}/s  {(total - count) / rate:.0f} s left"
    )
