"""The one shape every row becomes, and a store that keeps many of them on disk."""

import array
import json
import pickle
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

Messages = list[dict[str, str]]

SPOOL_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Example:
    """One row, or one pair of a ranked row.

    Attributes:
        where: file and row, for error messages.
        prompt: the turns before the answer.
        chosen: the demonstration or the better answer; the turns that answer the prompt.
        rejected: the worse answer.
        columns: the row's other columns, for reward functions.
        weight: 1 / number of pairs of a ranked row, so that each of its prompts counts once.
        margin: by how much the better answer is better, where the row says it.
    """

    where: str
    prompt: Messages
    chosen: Messages | None = None
    rejected: Messages | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    margin: float | None = None

    @property
    def prompt_key(self) -> str:
        """Two rows with the same key have the same prompt: they never stand on both sides of a split."""
        return json.dumps(self.prompt, ensure_ascii=False, sort_keys=True)


@dataclass
class Reading:
    """What reading one source met: the format, how many rows, and which were skipped and why (the first few)."""

    source: str
    format: str = ""
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)


class Examples(Sequence[Example]):
    """A read-only list of examples whose texts are in a temporary file, so that memory holds 8 bytes a row.

    Up to 32 MiB stay in memory. The file has no name and is gone when the process ends, however it ends.

    >>> rows = Examples([Example("row 1", [{"role": "user", "content": "Hi"}])])
    >>> len(rows), rows[0].where
    (1, 'row 1')
    """

    def __init__(self, examples: Iterable[Example] = (), reading: Reading | None = None):
        self.reading = reading or Reading("")
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - lives as long as this
        self._lock = threading.Lock()
        self._offsets = array.array("Q")
        for example in examples:
            self._offsets.append(self._file.tell())
            pickle.dump(example, self._file, protocol=pickle.HIGHEST_PROTOCOL)

    def subset(self, indices: Iterable[int]) -> "Examples":
        """Some of these, in the given order, over the same file."""
        part = object.__new__(Examples)
        part.reading, part._file, part._lock = self.reading, self._file, self._lock
        part._offsets = array.array("Q", (self._offsets[i] for i in indices))
        return part

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        offset = self._offsets[index]
        with self._lock:  # one file position for every subset and thread
            self._file.seek(offset)
            example: Example = pickle.load(self._file)
        return example
