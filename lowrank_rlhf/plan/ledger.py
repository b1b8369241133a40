"""The books of memory: which storages are alive while code runs, what for, and what the most was."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# A boolean mask picks so many rows as its content says, which a fake tensor does not have
BY_MASK = {aten.index.Tensor, aten.masked_select.default}
BACK_BY_MASK = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Ledger(TorchDispatchMode):
    """Counts every tensor that an operator returns from then until its storage is gone, also those of autograd.

    What an operator takes inside of itself is not seen. Works on real tensors and, where a FakeTensorMode is on outside
    of it, on fake ones.

    Args:
        chosen: how many entries a boolean mask is taken to choose, with fake tensors; None asks the mask.

    Attributes:
        live: bytes that are alive, by label.
        peak: the same at the moment when the most was alive, since `restart`.

    >>> with Ledger() as ledger:
    ...     a = torch.zeros(250)
    ...     with ledger.label("more"):
    ...         b = a + a
    ...     del b
    >>> dict(ledger.live), ledger.peak
    ({'': 1000, 'more': 0}, Counter({'': 1000, 'more': 1000}))
    """

    def __init__(self, chosen: int | None = None):
        super().__init__()
        self.chosen = chosen
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.total = self.highest = 0
        self._label = ""
        self._known: dict[int, tuple[str, int]] = {}  # storage → label, bytes

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is allocated inside the block is for `name`."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def from_now(self, name: str) -> None:
        """What is allocated until the end of the block of `label` is for `name`."""
        self._label = name

    def relabel(self, tensor: Tensor, name: str) -> None:
        """What a tensor lies in is for `name`."""
        key = tensor.untyped_storage()._cdata
        before, size = self._known[key]
        self._known[key] = name, size
        self.live[before] -= size
        self.live[name] += size

    def restart(self) -> None:
        """The peak from here on."""
        self.peak, self.highest = Counter(self.live), self.total

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._without_content(operator, args)
        if result is None:
            result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _without_content(self, operator: Any, args: Any) -> Any:
        """What an operator gives that would have to read a fake tensor; None where it has not to."""
        if self.chosen is None:
            return None
        if operator is aten._local_scalar_dense.default:
            return 0
        if operator in BY_MASK or operator in BACK_BY_MASK:
            mask = args[1] if isinstance(args[1], Tensor) else args[1][0]
            if mask is not None and mask.dtype == torch.bool:
                if operator in BACK_BY_MASK:
                    return args[0]
                return args[0].new_empty(self.chosen, *args[0].shape[mask.dim() :])
        return None

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        label, size = self._label, storage.nbytes()
        self._known[key] = label, size
        weakref.finalize(storage, self._forget, key)
        self.live[label] += size
        self.total += size
        if self.total > self.highest:
            self.peak, self.highest = Counter(self.live), self.total

    def _forget(self, key: int) -> None:
        label, size = self._known.pop(key)
        self.live[label] -= size
        self.total -= size
