"""Runs on the tiny base with random adapters and heads, as their stages leave them, without the training."""

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base, Data, Lora, PPORecipe, RewardRecipe, SFTRecipe
from lowrank_rlhf.rewards import member_names
from lowrank_rlhf.runs import Run

RECIPES = {"reward": RewardRecipe, "sft": SFTRecipe, "policy": PPORecipe}
LIMITS = {"max_prompt_tokens": 64, "max_completion_tokens": 48}


def fill(backbone, role, scale=0.1):
    """Random weights that change outputs visibly; a fresh adapter changes nothing and a fresh head scores 0."""
    generator = torch.Generator().manual_seed(sum(map(ord, role)))
    with torch.no_grad():
        for parameter in backbone.parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def write_run(folder, role="reward", *, members=1, pooling="last", base=None, scale=0.1):
    """A finished run whose `adapters/` hold the role, or the members of a reward ensemble; returns its path."""
    base = base or Base(model="tiny", quantization="none", device="cpu")
    run = Run(RECIPES[role](run_dir=str(folder), base=base, lora=Lora(r=4), data=Data("data.jsonl", **LIMITS)))
    backbone = Backbone(base)
    for name in member_names(role, members):
        backbone.add_role(name, Lora(r=4))
        if role == "reward":
            backbone.add_head(name, pooling)
        fill(backbone, name, scale)
        run.record(base=vars(backbone.info), data_hash="0123456789abcdef")
        run.save_role(backbone, name, {"eval_accuracy": 0.75})
    run.record(final={"eval_accuracy": 0.75})
    return str(folder)
