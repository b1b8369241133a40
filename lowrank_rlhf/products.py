"""Products of fp32 matrices on a CPU, left to oneDNN."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def fast_products(on: bool = True) -> Iterator[None]:
    """Inside the block oneDNN multiplies fp32 matrices on a CPU, and may round their factors to bf16 as it likes.

    It does so where a CPU has units for that (AMX); on one without, an AMD EPYC, it multiplied in fp32 and still took
    less than half of MKL's time. Sums are in fp32 on both. Small products stay as they are, other devices too.

    Args:
        on: False changes nothing.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16" if on else before
    try:
        yield
    finally:
        products.fp32_precision = before
