"""Attention of short sequences on a CPU is torch's, to the rounding of bf16 products."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowrank_rlhf.backbone import Backbone, attention
from lowrank_rlhf.config import Base

# bf16 keeps 8 significant bits; four products, their factors and results are rounded one after the other
TOLERANCE = 4 * 2**-8


class Layer(torch.nn.Module):
    num_key_value_groups = 3
    is_causal = True


def inputs(rows=2, tokens=7, read=0):
    """Queries of the last tokens, keys and values of all with those that were read before, and a causal mask with two
    columns of padding in the first row."""
    torch.manual_seed(0)
    query = torch.randn(rows, tokens, 6, 8).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(rows, 2, read + tokens, 8, requires_grad=True) for _ in range(2))
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((tokens, read + tokens), lowest).triu(1 + read).expand(rows, 1, -1, -1).clone()
    mask[0, :, :, :2] = lowest
    return query, key, value, mask


def relative(ours, exact):
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize(("tokens", "read"), [(7, 0), (3, 4)])
def test_outputs_and_gradients_are_torchs(tokens, read):
    query, key, value, mask = inputs(tokens=tokens, read=read)
    upstream = torch.randn(2, tokens, 6, 8)
    upstream[0, : max(0, 2 - read)] = 0  # nobody reads what padding attends to
    found = []
    for attend in (attention.attend, sdpa_attention_forward):
        out, _ = attend(Layer(), query, key, value, mask, scaling=0.3)
        found.append([out.detach(), *torch.autograd.grad(out, [query, key, value], upstream)])
    assert found[0][0].shape == (2, tokens, 6, 8)
    errors = [relative(ours, exact) for ours, exact in zip(*found, strict=True)]
    assert max(errors) <= TOLERANCE, errors


def test_what_padding_holds_reaches_nobody():
    query, key, value, mask = inputs()
    before, _ = attention.attend(Layer(), query, key, value, mask)
    with torch.no_grad():
        key[0, :, :2] = 100.0
        value[0, :, :2] = 100.0
    after, _ = attention.attend(Layer(), query, key, value, mask)
    assert torch.equal(before[0, 2:], after[0, 2:])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("case", ["long", "one token", "no mask"])
def test_the_rest_is_torchs(monkeypatch, case):
    query, key, value, mask = inputs(tokens=1 if case == "one token" else 7, read=6 if case == "one token" else 0)
    if case == "long":
        monkeypatch.setattr(attention, "MAX_WEIGHTS", 2 * 6 * 7 * 7 - 1)
    mask = None if case == "no mask" else mask
    exact, _ = sdpa_attention_forward(Layer(), query, key, value, mask)
    assert torch.equal(attention.attend(Layer(), query, key, value, mask)[0], exact)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_only_a_four_bit_base_on_a_cpu_attends_so(quantization):
    backbone = Backbone(Base(model="tiny", quantization=quantization, device="cpu"))
    attends = backbone.model.config._attn_implementation
    assert attends == (attention.NAME if quantization == "nf4" else "sdpa")


def test_log_probs_of_a_model_are_those_with_torchs_attention(monkeypatch):
    """Unpadded, padded left, and two documents packed in a row."""
    backbone = Backbone(Base(model="tiny", device="cpu"))
    ids = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    padded = mask.clone()
    padded[0, :3] = False
    positions = torch.tensor([[*range(5), *range(7)]])
    calls = [(ids, mask, None), (ids, padded, None), (ids[:1], None, positions)]

    def states():
        with torch.no_grad(), backbone.use(None):
            return [backbone.hidden(*call) for call in calls]

    torchs = []
    by_torch = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: torchs.append(1) or by_torch(*a, **k))
    ours = states()
    assert not torchs
    monkeypatch.setattr(attention, "MAX_WEIGHTS", 0)
    theirs = states()
    assert len(torchs) == 2 * len(calls)  # layers
    for found, exact, visible in zip(ours, theirs, (mask, padded, mask[:1]), strict=True):
        assert relative(found[visible], exact[visible]) <= TOLERANCE
