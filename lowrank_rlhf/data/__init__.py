"""Files in; prompts, demonstrations and preferences out, as text and then as token ids."""

from lowrank_rlhf.data.batches import Batch, pad_batch
from lowrank_rlhf.data.examples import Example, Examples
from lowrank_rlhf.data.formats import read_examples
from lowrank_rlhf.data.loading import load_demonstrations, load_preferences, load_prompts, load_thumbs
from lowrank_rlhf.data.rendering import Renderer, Sequence
from lowrank_rlhf.data.report import data_report, print_report
from lowrank_rlhf.data.tokenized import Sizes, tokenize_demonstrations, tokenize_pairs, tokenize_thumbs

__all__ = [
    "Batch",
    "Example",
    "Examples",
    "Renderer",
    "Sequence",
    "Sizes",
    "data_report",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "load_thumbs",
    "pad_batch",
    "print_report",
    "read_examples",
    "tokenize_demonstrations",
    "tokenize_pairs",
    "tokenize_thumbs",
]
