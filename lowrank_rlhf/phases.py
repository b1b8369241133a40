"""Where an iteration spends its time and memory: seconds, peak and tokens per second of each of its phases."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch

from lowrank_rlhf.memory import GIB, forget_vram_peak


class Phases:
    """A clock for the phases of an iteration: `with phases("generate"): …`, as often as a phase has parts.

    Seconds include the work that was queued on the GPU in the phase: it is waited for.

    >>> phases = Phases()
    >>> with phases("generate"):
    ...     pass
    >>> sorted(phases.metrics({"generate": 100}))
    ['memory/generate_gib', 'time/generate', 'tokens_per_second/generate']
    >>> phases.metrics()
    {}
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.now: str | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """
        Raises:
            RuntimeError: another phase is on; their peaks could not be told apart.
        """
        if self.now is not None:
            raise RuntimeError(f"phase {name!r} inside phase {self.now!r}")
        self.now = name
        forget_vram_peak()
        started = _clock()
        try:
            yield
        finally:
            self.now = None
            self.seconds[name] = self.seconds.get(name, 0.0) + _clock() - started
            self.peaks[name] = max(self.peaks.get(name, 0), _memory())

    def metrics(self, tokens: Mapping[str, int] | None = None) -> dict[str, float]:
        """The figures of the phases since the last call, in the order in which they first came.

        Args:
            tokens: how many a phase went through; a phase without them gets no speed.

        Returns:
            `time/NAME` in seconds, `tokens_per_second/NAME` and `memory/NAME_gib`: on CUDA the most that torch had
            allocated within the phase; on a CPU, where nobody counts peaks, what the process held at its end, resident.
        """
        figures = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        for name, count in (tokens or {}).items():
            if name in self.seconds:
                figures[f"tokens_per_second/{name}"] = count / max(self.seconds[name], 1e-9)
        figures |= {f"memory/{name}_gib": peak / GIB for name, peak in self.peaks.items()}
        self.seconds, self.peaks = {}, {}
        return figures


def _memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
