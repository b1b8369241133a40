"""What the tests of dpo, orpo and kto share: pairs to learn from, small recipes, and what a training may change."""

import json

import bitsandbytes as bnb
import torch

from lowrank_rlhf.loader import load_recipe

PAIRS = [
    {"prompt": f"Say {'xyz'[i % 3]}{i}", "chosen": "yes" * (1 + i % 3), "rejected": "nope" * (1 + i % 2)}
    for i in range(16)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(cls, data, *overrides):
    """Float32 on the CPU, rows of at most 40 tokens; the data are held out too."""
    settings = [
        f"data.train={data}",
        f"data.eval={data}",
        "base.quantization=none",
        "base.device=cpu",
        "data.max_rows=null",
        "data.max_prompt_tokens=32",
        "train.batch_size=8",
        "train.micro_batch_size=8",
    ]
    return load_recipe(cls, overrides=settings + list(overrides), tiny=True)


def shake(backbone, role, size=0.02):
    """Put a role where it is after some training: no B matrix is zero, so every weight has a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def snapshot(backbone):
    """Every role and the whole base, bit for bit."""
    roles = {role: [p.detach().clone() for p in backbone.parameters(role)] for role in backbone.roles}
    lora = {id(p) for role in backbone.roles for p in backbone.parameters(role)}
    base = {name: p.data.clone() for name, p in backbone.model.named_parameters() if id(p) not in lora}
    four_bit = [m.weight.data.clone() for m in backbone.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    return roles, base, four_bit


def moved(before, after):
    """The roles that are no longer the same; the base is."""
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    return {
        role
        for role in after[0]
        if any(not torch.equal(a, b) for a, b in zip(before[0][role], after[0][role], strict=True))
    }
