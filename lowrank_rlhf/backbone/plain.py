"""A base with one adapter as plain transformers and PEFT load them, never in 4 bit: to check exports, and to merge.

A merge goes into 16-bit weights: the values that the run's NF4 weights stand for, or the base's own. Measured on
SmolLM2-135M: a reward adapter trained on NF4 ranks the probes on the base's own weights with a Spearman correlation of
0.79 to the run, on the NF4 values with 0.999; a PPO policy is 0.36 nats a token from the run on the one, 0.0003 on the
other. Nothing is quantised again in either.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lowrank_rlhf.backbone import tiny
from lowrank_rlhf.backbone.base import pick_device, resolve_source
from lowrank_rlhf.config import Base
from lowrank_rlhf.errors import UserError


def load_adapted(
    base: Base,
    adapter: Path,
    dtype: torch.dtype,
    *,
    pad_token_id: int | None = None,
    weights: Iterable[tuple[str, Tensor]] = (),
) -> nn.Module:
    """The base in `dtype` with the adapter of a folder on it, in eval mode.

    Args:
        pad_token_id: given, a sequence classifier of one label that pools before this token; else a causal model.
        weights: (layer, weight) to put in the place of the base's own, from `dequantized`.

    Raises:
        UserError: the base is quantised by itself, or its architecture has no sequence classifier.
    """
    labels: dict[str, Any] = {} if pad_token_id is None else {"num_labels": 1, "pad_token_id": pad_token_id}
    kind: Any = AutoModelForCausalLM if pad_token_id is None else AutoModelForSequenceClassification
    with _source(base) as (source, revision):
        try:
            model = kind.from_pretrained(
                source, dtype=dtype, device_map={"": pick_device(base.device)}, **revision, **labels
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"base.model: {base.model!r} cannot be loaded in {dtype}: {reason}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"base.model: {base.model!r} is quantised by itself; export needs its 16-bit original, because a LoRA "
            "merged into quantised weights is lost"
        )
    with torch.no_grad():
        for name, weight in weights:
            cast(nn.Linear, model.get_submodule(name)).weight.copy_(weight)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def dequantized(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(layer, weight) of every 4-bit layer of a loaded base, one at a time, in fp32; nothing where none is."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed: Any = module.weight
            weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
            yield name.removesuffix(".base_layer"), weight.float()


def merge_dtype(device: str) -> torch.dtype:
    """In which type to merge: fp32 on CPU, where the result is rounded to bf16 once; bf16 elsewhere."""
    return torch.float32 if pick_device(device).type == "cpu" else torch.bfloat16


def load_whole(folder: Path, dtype: torch.dtype, device: str, *, classifier: bool) -> PreTrainedModel:
    """A model without an adapter, as `save_merged` wrote it, in eval mode."""
    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_pretrained(str(folder), dtype=dtype, device_map={"": pick_device(device)})
    return cast(PreTrainedModel, model.eval())


def save_merged(adapted: nn.Module, folder: Path, stop_ids: list[int]) -> None:
    """Merge the adapter into its base, which must not be 4-bit, and save the whole in bf16.

    The sum is computed in the type the base was loaded in and rounded once.

    Args:
        adapted: from `load_adapted`; it is used up.
        stop_ids: where a generation of the saved model ends.
    """
    merged = cast(Any, adapted).merge_and_unload().to(torch.bfloat16)
    if merged.can_generate():
        merged.generation_config.eos_token_id = stop_ids
    merged.save_pretrained(folder)


@contextmanager
def _source(base: Base) -> Iterator[tuple[str, dict[str, str]]]:
    if base.model != tiny.MODEL_ID:
        yield resolve_source(base)
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny.tiny_model().save_pretrained(folder)
        yield folder, {}
