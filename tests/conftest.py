"""Shared by every backbone test: the random two-layer base on CPU, once in float32 and once in NF4."""

import pytest

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base


@pytest.fixture(params=["none", "nf4"])
def quantization(request):
    return request.param


@pytest.fixture
def backbone(quantization):
    """A fresh base without roles. On CPU also where there is a GPU, because the laws are exact there."""
    return Backbone(Base(model="tiny", quantization=quantization, device="cpu"))
