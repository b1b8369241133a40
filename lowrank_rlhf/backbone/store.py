"""One role to and from a folder: a standard PEFT adapter plus `head.safetensors`."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_rlhf.backbone.guard import copy_config
from lowrank_rlhf.backbone.heads import Pooling, ScalarHead
from lowrank_rlhf.backbone.roles import Backbone
from lowrank_rlhf.errors import UserError

WEIGHTS, HEAD, PROBE = "adapter_model.safetensors", "head.safetensors", "probe.json"
SCORE = "base_model.model.score.weight"  # of a sequence classifier
PROBE_TOLERANCE = (
    0.05  # of the largest score: another device rounds otherwise, another base or a damaged file is far off
)


def save_role(backbone: Backbone, role: str, folder: Path, card: str) -> None:
    """Write a role as a folder that `PeftModel.from_pretrained` loads; it appears whole, by one rename.

    Args:
        role: an existing role.
        folder: replaced if it exists.
        card: the model card, written as README.md (PEFT's own would name a local path as the base model).
    """
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    assert backbone.peft is not None
    # save_embedding_layers=False: the embeddings are the base's, and "auto" would ask the hub about them
    state = get_peft_model_state_dict(backbone.peft, adapter_name=role, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, scratch / WEIGHTS)
    config = backbone.peft.peft_config[role]
    assert isinstance(config, LoraConfig)
    saved = copy_config(config)
    saved.base_model_name_or_path = backbone.info.model
    saved.inference_mode = True
    saved.save_pretrained(str(scratch))
    if role in backbone.heads:
        head = cast(ScalarHead, backbone.heads[role])
        save_file(head.state_dict(), scratch / HEAD, metadata={"pooling": head.pooling})
        input_ids = _probe_ids(backbone)
        (scratch / PROBE).write_text(
            json.dumps({"input_ids": input_ids.tolist(), "scores": _probe_scores(backbone, role, input_ids)})
        )
    (scratch / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)


def load_role(backbone: Backbone, folder: Path, role: str, *, probe: bool = True) -> None:
    """Add the adapter of a folder as `role`, with its head where it has one; frozen until `train_only` names it.

    An adapter of a sequence classifier with one label, as trl and transformers train reward models, loads too: its
    layers have the names of the causal model's, and its `score` layer becomes the head.

    Args:
        probe: score the stored batch again; False where this is knowingly another base, as the same one in 16 bit.

    Raises:
        UserError: the folder is not a LoRA adapter, or not one for this base.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no adapter here ({WEIGHTS} is missing)")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: adapter type {config.peft_type} is not supported, only LoRA is")
    weights = load_file(folder / WEIGHTS)
    score = weights.pop(SCORE, None) if config.task_type == TaskType.SEQ_CLS else None
    if score is not None:
        config.modules_to_save = None
    backbone.add_adapter(role, config)
    assert backbone.peft is not None
    result: Any = set_peft_model_state_dict(backbone.peft, weights, adapter_name=role)
    missing = [key for key in result.missing_keys if f".{role}." in key]
    if result.unexpected_keys or missing:
        raise UserError(f"{folder}: the adapter does not fit {backbone.info.model}; was it trained on another base?")
    if score is not None:
        if score.shape[0] != 1:
            raise UserError(f"{folder}: a classifier of {score.shape[0]} labels is not a reward model; one is needed")
        backbone.add_head(role)
        backbone.heads[role].load_state_dict({"linear.weight": score.float()})
    if (folder / HEAD).is_file():
        backbone.add_head(role, saved_pooling(folder))
        backbone.heads[role].load_state_dict(load_file(folder / HEAD))
        if probe:
            _check_probe(backbone, role, folder)


def saved_pooling(folder: Path) -> Pooling:
    """How the head of a saved role reads a sequence."""
    with safe_open(folder / HEAD, framework="pt") as file:
        return cast(Pooling, (file.metadata() or {}).get("pooling", "last"))


def _check_probe(backbone: Backbone, role: str, folder: Path) -> None:
    """Score the stored batch again.

    Raises:
        UserError: the scores are not those of the day it was saved, so this is not the model it was.
    """
    if not (folder / PROBE).is_file():
        return
    probe = json.loads((folder / PROBE).read_text())
    expected = torch.tensor(probe["scores"])
    found = torch.tensor(_probe_scores(backbone, role, torch.tensor(probe["input_ids"])))
    if not torch.allclose(found, expected, rtol=0, atol=PROBE_TOLERANCE * float(expected.abs().max()) + 1e-6):
        raise UserError(
            f"{folder}: scores of the stored probe are {found.tolist()}, they were {expected.tolist()} when it was "
            "saved; the base, the adapter or the head is not what it was"
        )


def _probe_ids(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, len(backbone.tokenizer), (4, 16), generator=generator)


@torch.no_grad()
def _probe_scores(backbone: Backbone, role: str, input_ids: Tensor) -> list[float]:
    input_ids = input_ids.to(backbone.model.device)
    with backbone.use(role):
        return list(backbone.scores(role, input_ids, torch.ones_like(input_ids, dtype=torch.bool)).tolist())
