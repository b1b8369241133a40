"""Demonstrations as token ids, in an Arrow file on disk rather than in lists: memory does not grow with the data."""

import array
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow

from lowrank_rlhf.data.examples import Example
from lowrank_rlhf.data.rendering import Renderer, Sequence
from lowrank_rlhf.progress import progress

SCHEMA = pyarrow.schema({"input_ids": pyarrow.list_(pyarrow.int32()), "completion_mask": pyarrow.list_(pyarrow.int8())})
BATCH_ROWS = 1000


def _counts() -> "array.array[int]":
    return array.array("I")


@dataclass
class Sizes:
    """Tokens of each row, learned (`completion`) and not (`prompt`), and how many rows a limit cut."""

    prompt: "array.array[int]" = field(default_factory=_counts)
    completion: "array.array[int]" = field(default_factory=_counts)
    cut: int = 0

    def add(self, prompt: int, completion: int, cut: bool) -> None:
        self.prompt.append(prompt)
        self.completion.append(completion)
        self.cut += cut

    @classmethod
    def of(cls, sequences: Iterable[Sequence]) -> "Sizes":
        sizes = cls()
        for sequence in sequences:
            sizes.add(len(sequence.prompt_ids), len(sequence.completion_ids), sequence.cut)
        return sizes


def tokenize_demonstrations(examples: SequenceOf[Example], renderer: Renderer) -> tuple[datasets.Dataset, Sizes]:
    """Columns `input_ids` and `completion_mask` (1 where a token is learned), and the rows' sizes.

    The file is in the temporary folder and goes with the data set.
    """
    sizes = Sizes()
    folder = tempfile.TemporaryDirectory(prefix="lowrank_rlhf-")
    path = Path(folder.name) / "tokens.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        for columns in _batches(examples, renderer, sizes):
            writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=SCHEMA))
    dataset = datasets.Dataset.from_file(str(path))
    weakref.finalize(dataset, folder.cleanup)
    return dataset, sizes


def _batches(examples: SequenceOf[Example], renderer: Renderer, sizes: Sizes) -> Iterator[dict[str, list[list[int]]]]:
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    for example in progress(examples, "tokenising", len(examples)):
        row = renderer.demonstration(example.prompt, example.chosen or [], example.where)
        ids.append(row.input_ids)
        masks.append([int(learned) for learned in row.completion_mask])
        sizes.add(len(row.input_ids) - sum(masks[-1]), sum(masks[-1]), row.cut)
        if len(ids) == BATCH_ROWS:
            yield {"input_ids": ids, "completion_mask": masks}
            ids, masks = [], []
    yield {"input_ids": ids, "completion_mask": masks}
