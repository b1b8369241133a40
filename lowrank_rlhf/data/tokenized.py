"""Demonstrations and pairs as token ids, in Arrow files on disk, not in lists: memory does not grow with the data."""

import array
import itertools
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

IDS = pyarrow.list_(pyarrow.int32())
DEMONSTRATIONS = pyarrow.schema({"input_ids": IDS, "completion_mask": pyarrow.list_(pyarrow.int8())})
PAIRS = pyarrow.schema({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS})
THUMBS = pyarrow.schema({"prompt_ids": IDS, "completion_ids": IDS, "KL_completion_ids": IDS, "label": pyarrow.bool_()})
BATCH_ROWS = 1000

Row = dict[str, list[int] | bool]


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

    def rows() -> Iterator[Row]:
        for example in progress(examples, "tokenising", len(examples)):
            row = renderer.demonstration(example.prompt, example.chosen or [], example.where)
            mask = [int(learned) for learned in row.completion_mask]
            sizes.add(len(row.input_ids) - sum(mask), sum(mask), row.cut)
            yield {"input_ids": row.input_ids, "completion_mask": mask}

    return _on_disk(rows(), DEMONSTRATIONS), sizes


def tokenize_pairs(examples: SequenceOf[Example], renderer: Renderer) -> tuple[datasets.Dataset, Sizes, int]:
    """Columns `prompt_ids`, `chosen_ids` and `rejected_ids`, the sizes of both texts of each pair, and how many pairs
    are the same tokens, as a token limit makes of long ones: they teach nothing.

    The file is in the temporary folder and goes with the data set.
    """
    sizes, equal = Sizes(), 0

    def rows() -> Iterator[Row]:
        nonlocal equal
        for example in progress(examples, "tokenising", len(examples)):
            chosen, rejected = (
                renderer.sequence(example.prompt, answer or [], example.where)
                for answer in (example.chosen, example.rejected)
            )
            for sequence in (chosen, rejected):
                sizes.add(len(sequence.prompt_ids), len(sequence.completion_ids), sequence.cut)
            equal += chosen.ids == rejected.ids
            ids = (chosen.prompt_ids, chosen.completion_ids, rejected.completion_ids)
            yield dict(zip(PAIRS.names, ids, strict=True))

    return _on_disk(rows(), PAIRS), sizes, equal


def tokenize_thumbs(examples: SequenceOf[Example], renderer: Renderer) -> tuple[datasets.Dataset, Sizes]:
    """Columns `prompt_ids`, `completion_ids`, `label` and `KL_completion_ids`, and the rows' sizes.

    `KL_completion_ids` is the completion of the row before (of the last row, for the first): an answer to another
    prompt where the order is random.

    The file is in the temporary folder and goes with the data set.
    """
    sizes = Sizes()

    def tokens(example: Example) -> Sequence:
        answer = example.rejected if example.chosen is None else example.chosen
        return renderer.sequence(example.prompt, answer or [], example.where)

    def rows() -> Iterator[Row]:
        before = tokens(examples[-1]).completion_ids if len(examples) else []
        for example in progress(examples, "tokenising", len(examples)):
            row = tokens(example)
            sizes.add(len(row.prompt_ids), len(row.completion_ids), row.cut)
            values = (row.prompt_ids, row.completion_ids, before, example.chosen is not None)
            yield dict(zip(THUMBS.names, values, strict=True))
            before = row.completion_ids

    return _on_disk(rows(), THUMBS), sizes


def _on_disk(rows: Iterator[Row], schema: pyarrow.Schema) -> datasets.Dataset:
    folder = tempfile.TemporaryDirectory(prefix="lowrank_rlhf-")
    path = Path(folder.name) / "tokens.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    dataset = datasets.Dataset.from_file(str(path))
    weakref.finalize(dataset, folder.cleanup)
    return dataset
