"""One role to and from a folder: a standard PEFT adapter plus `head.safetensors`."""

import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lowrank_rlhf.backbone.roles import Backbone, copy_config
from lowrank_rlhf.errors import UserError

WEIGHTS, HEAD = "adapter_model.safetensors", "head.safetensors"


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
        save_file(backbone.heads[role].state_dict(), scratch / HEAD)
    (scratch / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)


def load_role(backbone: Backbone, folder: Path, role: str) -> None:
    """Add the adapter of a folder as `role`, with its head where it has one; frozen until `train_only` names it.

    Raises:
        UserError: the folder is not a LoRA adapter, or not one for this base.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no adapter here ({WEIGHTS} is missing)")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: adapter type {config.peft_type} is not supported, only LoRA is")
    backbone.add_adapter(role, config)
    assert backbone.peft is not None
    result: Any = set_peft_model_state_dict(backbone.peft, load_file(folder / WEIGHTS), adapter_name=role)
    missing = [key for key in result.missing_keys if f".{role}." in key]
    if result.unexpected_keys or missing:
        raise UserError(f"{folder}: the adapter does not fit {backbone.info.model}; was it trained on another base?")
    if (folder / HEAD).is_file():
        backbone.add_head(role)
        backbone.heads[role].load_state_dict(load_file(folder / HEAD))
