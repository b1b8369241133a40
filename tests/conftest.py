"""Shared by every backbone test: the random two-layer base on CPU, once in float32 and once in NF4."""

import gc

import bitsandbytes as bnb
import pytest

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base
from lowrank_rlhf.runs import Run


@pytest.fixture(params=["none", "nf4"])
def quantization(request):
    return request.param


@pytest.fixture
def backbone(quantization):
    """A fresh base without roles. On CPU also where there is a GPU, because the laws are exact there."""
    return Backbone(Base(model="tiny", quantization=quantization, device="cpu"))


@pytest.fixture
def bases_seen(monkeypatch):
    """(4-bit weights, distinct storages) alive at each logged step of any stage, wherever in the process they hang."""
    seen: set[tuple[int, int]] = set()
    log = Run.log

    def counting_log(self, step, metrics):
        gc.collect()
        weights = [o for o in gc.get_objects() if isinstance(o, bnb.nn.Params4bit) and o.device.type != "meta"]
        seen.add((len(weights), len({w.untyped_storage().data_ptr() for w in weights})))
        log(self, step, metrics)

    monkeypatch.setattr(Run, "log", counting_log)
    return seen
