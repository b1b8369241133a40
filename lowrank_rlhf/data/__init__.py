"""Files in; prompts, demonstrations and preferences out, as text and then as token ids."""

from lowrank_rlhf.data.batches import Batch, pad_batch
from lowrank_rlhf.data.examples import Example, Examples
from lowrank_rlhf.data.formats import read_examples
from lowrank_rlhf.data.loading import load_demonstrations, load_preferences, load_prompts
from lowrank_rlhf.data.rendering import Renderer, Sequence

__all__ = [
    "Batch",
    "Example",
    "Examples",
    "Renderer",
    "Sequence",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "pad_batch",
    "read_examples",
]
