"""What several test modules start from: the random two-layer base on CPU, and servers and an sshd on this machine."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: two workers of one thread each, not of all cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import bitsandbytes as bnb
import pytest

from lowrank_rlhf import http_json
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base
from lowrank_rlhf.runs import Run
from tests.loopback import Loopback, laptop

# Of the slow tests these go first, so that no core is left with one of them when the others are done
LONGEST = ("test_real_data.py", "test_memory.py", "test_resume.py", "test_remote_jobs.py")


def pytest_collection_modifyitems(items):
    def rank(item):
        return LONGEST.index(item.path.name) if item.get_closest_marker("slow") and item.path.name in LONGEST else 9

    items.sort(key=rank)


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


@pytest.fixture(scope="module")
def new_machine(tmp_path_factory):
    """A machine to log in to, on which nothing is installed."""
    with Loopback(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture(scope="module")
def machine(new_machine):
    """The same as `remote up` leaves it."""
    new_machine.ready(new_machine.folder)
    return new_machine


@pytest.fixture(scope="module")
def here(machine):
    return laptop(machine.folder / "laptop")


@pytest.fixture
def alive(machine):
    """Jobs that only live, and the folder they work in."""
    with machine.living() as work:
        yield work


@pytest.fixture
def local_servers(monkeypatch):
    """Requests reach this machine's servers whatever its proxy, are repeated at once and carry no token of its user."""
    monkeypatch.setattr(http_json, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    for token in ("LOWRANK_RLHF_REWARD_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(token, raising=False)
