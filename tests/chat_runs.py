"""Small run directories as the stages leave them, with weights that change what the tiny base says."""

import dataclasses
import json

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.store import save_role
from lowrank_rlhf.checkpoints import save_state
from lowrank_rlhf.config import Base, Data, Lora

TINY = Base(model="tiny", quantization="none", device="cpu")
RECIPE = {
    "base": dataclasses.asdict(TINY) | {"device": "auto"},
    "lora": dataclasses.asdict(Lora(r=4)),
    "data": {"prompt_template": Data("").prompt_template, "max_prompt_tokens": 64, "max_completion_tokens": 32},
}


def fill(backbone, role, seed, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def write_run(folder, stage="sft", *, roles=None, seed=0, steps=(), lora=None, head=False, **facts):
    """A finished run of `stage` with random adapters of rank 4, and a checkpoint of other weights at each step."""
    backbone = Backbone(TINY)
    role = {"sft": "sft", "reward": "reward"}.get(stage, "policy")
    folder.mkdir(parents=True)
    for i, name in enumerate(roles or (role,)):
        backbone.add_role(name, lora or Lora(r=4), head=head or stage == "reward")
        fill(backbone, name, 10 * seed + i)
        save_role(backbone, name, folder / "adapters" / name, "a card")
    for step in steps:
        for name in backbone.roles:
            fill(backbone, name, 1000 * seed + step)
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        save_state(checkpoint, backbone, {})
    info = {"stage": stage, "recipe": json.loads(json.dumps(RECIPE)), "base": dataclasses.asdict(backbone.info)}
    (folder / "run.json").write_text(json.dumps(info | {"final": {}} | facts))
    return folder


def edit(folder, change):
    """Change what a run's run.json says."""
    info = json.loads((folder / "run.json").read_text())
    change(info)
    (folder / "run.json").write_text(json.dumps(info))
