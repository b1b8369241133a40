"""The phase clock: sums, peaks and speeds of each phase, with a clock and a GPU that are made up."""

import itertools
import mmap

import psutil
import pytest
import torch

from lowrank_rlhf import memory
from lowrank_rlhf import phases as module
from lowrank_rlhf.memory import GIB, highest_vram, peak_memory_gib
from lowrank_rlhf.phases import Phases


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is a second after the one before."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "_clock", lambda: float(next(ticks)))


class FakeGPU:
    """torch.cuda's counters: `use` allocates and frees again."""

    def __init__(self, monkeypatch):
        self.peak = 0
        monkeypatch.setattr(memory, "_highest_vram", 0)
        for name, value in {
            "is_available": lambda: True,
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": self.reset,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def use(self, size):
        self.peak = max(self.peak, size)

    def reset(self):
        self.peak = 0


def test_the_parts_of_a_phase_add_up(clock):
    """Two of generate and one of update, a second each; 300 tokens in 2 s."""
    phases = Phases()
    for name in ("generate", "update", "generate"):
        with phases(name):
            pass
    figures = phases.metrics({"generate": 300, "score": 5})
    assert {name: value for name, value in figures.items() if not name.startswith("memory/")} == {
        "time/generate": 2.0,
        "time/update": 1.0,
        "tokens_per_second/generate": 150.0,
    }


def test_an_iteration_starts_from_nothing(clock):
    phases = Phases()
    with phases("generate"):
        pass
    phases.metrics()
    with phases("update"):
        pass
    assert set(phases.metrics()) == {"time/update", "memory/update_gib"}


def test_on_a_cpu_memory_is_what_the_process_holds_after_the_phase():
    """A mapping of its own, as malloc may have kept as much of what earlier tests freed."""
    phases = Phases()
    with phases("generate"):
        kept = mmap.mmap(-1, 2**28)
        for _ in range(2**8):
            kept.write(bytes(2**20))
    with phases("update"):
        kept.close()
    figures = phases.metrics()
    assert figures["memory/generate_gib"] > figures["memory/update_gib"] + 0.2


def test_on_a_gpu_each_phase_has_its_own_peak(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    phases = Phases()
    gpu.use(9 * GIB)  # loading, before any phase
    for name, size in (("generate", 3), ("update", 5), ("generate", 2)):
        with phases(name):
            gpu.use(size * GIB)
    figures = phases.metrics()
    assert (figures["memory/generate_gib"], figures["memory/update_gib"]) == (3.0, 5.0)


def test_the_peak_of_the_whole_run_outlives_the_phases(monkeypatch):
    """run.json's figure: loading took the most, and the phases set torch's count back."""
    gpu = FakeGPU(monkeypatch)
    gpu.use(9 * GIB)
    with Phases()("generate"):
        gpu.use(3 * GIB)
    assert torch.cuda.max_memory_allocated() == 3 * GIB
    assert highest_vram() == 9 * GIB
    assert peak_memory_gib()["vram"] == 9.0
    gpu.use(11 * GIB)
    assert peak_memory_gib()["vram"] == 11.0


def test_a_phase_that_fails_is_counted_and_the_next_one_can_start(clock):
    phases = Phases()
    with pytest.raises(ValueError, match="inside"), phases("generate"):
        raise ValueError("inside")
    with phases("update"):
        pass
    figures = phases.metrics()
    assert (figures["time/generate"], figures["time/update"]) == (1.0, 1.0)


def test_phases_do_not_nest():
    phases = Phases()
    with phases("update"), pytest.raises(RuntimeError, match="phase 'score' inside phase 'update'"), phases("score"):
        pass


def test_a_run_counts_from_its_own_beginning(monkeypatch):
    """The second run of a process, as in a pipeline, is not told what the first one took."""
    gpu = FakeGPU(monkeypatch)
    gpu.use(9 * GIB)
    kept = torch.ones(2**28)  # 1 GiB
    before = peak_memory_gib()
    del kept
    memory.begin()
    gpu.use(2 * GIB)
    after = peak_memory_gib()
    assert after["vram"] == 2.0
    assert after["ram"] < before["ram"] - 0.9


@pytest.mark.skipif(not memory.GLIBC, reason="other allocators are not asked to keep what is freed")
def test_what_the_last_run_left_is_given_back_at_the_start_of_the_next():
    memory.keep_freed()
    left = [torch.ones(2**18) for _ in range(300)]
    left[0].keep = left  # a ring, as models are
    top = torch.ones(2**10)  # what is below it is not given back by itself
    del left
    before = psutil.Process().memory_info().rss
    memory.begin()
    assert psutil.Process().memory_info().rss <= before - 200 * 2**20
    assert top.sum() == 2**10
