"""All fast paths of a CPU together against all plain ones; each by itself is tested beside what it is part of."""

import torch

from docs.fast_paths.off import turn_off
from lowrank_rlhf import logps, rollout
from lowrank_rlhf.backbone import Backbone, attention, base, linear, passes
from lowrank_rlhf.config import Base, Lora

TURNED_OFF = [
    (linear, "LEAN"),
    (attention, "MAX_WEIGHTS"),
    (base.BaseInfo, "fast_products"),
    (passes, "unpacked"),
    (logps, "TokenLogps"),
    (rollout, "draw"),
]
TOLERANCE = 0.02  # bf16 keeps 8 significant bits, and two layers add up what they round


def relative(ours, exact):
    return float((ours - exact).norm() / exact.norm())


def log_probs_and_gradients():
    torch.manual_seed(0)
    backbone = Backbone(Base(model="tiny", device="cpu"))
    backbone.add_role("policy", Lora(r=4))
    for parameter in backbone.parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.05)
    backbone.train_only("policy")
    ids = torch.randint(0, 258, (3, 24))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :6] = False
    completion = mask.clone()
    completion[:, :10] = False
    weights = torch.randn(2, int(completion.sum()))
    with backbone.unpacked(), backbone.use("policy", train=True):
        found, entropy, _ = backbone.read(ids, mask, completion)
        gradients = torch.autograd.grad((torch.stack([found, entropy]) * weights).sum(), backbone.parameters("policy"))
    return [found.detach(), entropy.detach(), *gradients]


def test_they_learn_the_same_from_the_same(monkeypatch):
    fast = log_probs_and_gradients()
    for owner, name in TURNED_OFF:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is put back
    turn_off()
    plain = log_probs_and_gradients()
    errors = [relative(ours, exact) for ours, exact in zip(fast, plain, strict=True)]
    assert max(errors[:2]) <= TOLERANCE
    assert max(errors[2:]) <= 5 * TOLERANCE
    assert not torch.equal(fast[0], plain[0])
    assert rollout.draw(torch.eye(3)).tolist() == [0, 1, 2]
