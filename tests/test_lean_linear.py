"""The lean LoRA layer computes what PEFT's computes, and what the equation says."""

import contextlib

import bitsandbytes as bnb
import pytest
import torch

from lowrank_rlhf import memory
from lowrank_rlhf.backbone import Backbone, linear
from lowrank_rlhf.config import Base, Lora

# bf16 keeps 8 significant bits: one rounding is off by at most 2⁻⁹ of a number, inputs, weights and results each round
TOLERANCE = 4 * 2**-8


@pytest.fixture
def backbone():
    """A tiny base in NF4 whose roles `policy` and `value` change something, `policy` learning."""
    torch.manual_seed(0)
    backbone = Backbone(Base(model="tiny", device="cpu"))
    for role in ("policy", "value"):
        backbone.add_role(role, Lora(r=4))
        for parameter in backbone.parameters(role):
            torch.nn.init.normal_(parameter, std=0.05)
    backbone.train_only("policy")
    return backbone


def lora_layer(backbone):
    return next(m for m in backbone.model.modules() if isinstance(m, linear.LoraLinear4bit))


def relative(ours, exact):
    return float((ours.float() - exact).norm() / exact.norm())


def test_forward_and_gradients_are_those_of_the_equation(backbone):
    layer = lora_layer(backbone)
    weight = linear.dequantize(layer.base_layer, torch.float32)
    a, b, scaling = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight, layer.scaling["policy"]
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    upstream = torch.randn(2, 5, layer.out_features)
    with backbone.use("policy", train=True):
        ours = layer(x)
        found = torch.autograd.grad(ours, [x, a, b], upstream)
    exact = x @ weight.T + scaling * (x @ a.T) @ b.T
    expected = torch.autograd.grad(exact, [x, a, b], upstream)
    assert ours.dtype == torch.float32
    assert relative(ours.detach(), exact.detach()) <= TOLERANCE
    assert [relative(g, e) <= TOLERANCE for g, e in zip(found, expected, strict=True)] == [True] * 3


def test_one_token_is_the_equation_with_the_adapter_in_fp32(backbone):
    """Only the base's part is rounded, and nothing but it: against that part in 16 bit the sum is exact."""
    layer = lora_layer(backbone)
    a, b, scaling = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight, layer.scaling["policy"]
    x = torch.randn(5, 1, layer.in_features)
    with torch.no_grad(), backbone.use("policy"):
        ours, several = layer(x), layer(x.transpose(0, 1)).transpose(0, 1)
        expected = layer.base_layer(x.bfloat16()).float() + scaling * (x @ a.T) @ b.T
    assert ours.dtype == torch.float32
    assert relative(ours, expected) <= 1e-6
    assert 1e-6 < relative(several, expected) <= TOLERANCE


def test_a_small_adapter_is_not_rounded_away(backbone):
    """Against a base whose results are rounded to 2⁻⁹ of them, an adapter of 1e-5 of the base still shows."""
    layer = lora_layer(backbone)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad(), backbone.use("policy"):
        layer.lora_B["policy"].weight.mul_(1e-5)
        change = layer(x) - layer.base_layer(x)
    a, b, scaling = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight, layer.scaling["policy"]
    assert relative(change, (scaling * (x @ a.T) @ b.T).detach()) <= 0.05


def test_a_whole_model_learns_as_with_pefts_layers(backbone, monkeypatch):
    ids = torch.randint(0, 258, (3, 12))
    attention, completion = torch.ones(3, 12, dtype=torch.bool), torch.zeros(3, 12, dtype=torch.bool)
    completion[:, 5:] = True

    def gradients():
        with backbone.use("policy", train=True):
            logps, _ = backbone.token_logps(ids, attention, completion)
            return logps.detach(), torch.autograd.grad(logps.sum(), backbone.parameters("policy"))

    lean, lean_gradients = gradients()
    monkeypatch.setattr(linear, "LEAN", False)
    plain, plain_gradients = gradients()
    assert not torch.equal(lean, plain)  # another path it is
    assert relative(lean, plain) <= TOLERANCE / 4
    assert max(relative(a, b) for a, b in zip(lean_gradients, plain_gradients, strict=True)) <= 0.05


def states_of(backbone, ids, mode):
    torch.manual_seed(1)
    with mode, torch.no_grad():
        return backbone.hidden(ids, torch.ones_like(ids, dtype=torch.bool))


def two_at_once(backbone):
    """Two adapters on at once, which only PEFT can add up."""
    backbone.peft.base_model.set_adapter(["policy", "value"])
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    "way",
    [
        lambda backbone: backbone.use("sft", train=True),
        lambda backbone: backbone.use(None),
        two_at_once,
    ],
    ids=["dropout", "off", "two_at_once"],
)
def test_what_it_cannot_do_goes_pefts_way(backbone, monkeypatch, way):
    """Adapter dropout in training, no adapter at all, two for the same row: to the bit."""
    backbone.add_role("sft", Lora(r=4, dropout=0.5))
    ids = torch.randint(0, 258, (2, 6))
    lean = states_of(backbone, ids, way(backbone))
    monkeypatch.setattr(linear, "LEAN", False)
    assert torch.equal(lean, states_of(backbone, ids, way(backbone)))


def test_rows_with_adapters_of_their_own_are_pefts(backbone, monkeypatch):
    """One row with each role and one with none; that they are those of separate passes is tested with the roles."""
    ids = torch.randint(0, 258, (3, 6))
    rows = ["policy", "value", None]
    lean = states_of(backbone, ids, backbone.mixed(rows))
    with monkeypatch.context() as patch:
        patch.setattr(linear, "LEAN", False)
        plain = states_of(backbone, ids, backbone.mixed(rows))
    assert torch.equal(lean[2], plain[2])
    assert not torch.equal(lean[:2], plain[:2])
    assert [relative(ours, theirs) <= 2 * TOLERANCE for ours, theirs in zip(lean[:2], plain[:2], strict=True)] == [
        True,
        True,
    ]


def test_unpacked_weights_change_no_bit_and_are_gone_afterwards(backbone):
    ids = torch.randint(0, 258, (2, 6))
    attention = torch.ones_like(ids, dtype=torch.bool)

    def states():
        with backbone.use("policy"), torch.no_grad():
            return backbone.hidden(ids, attention)

    packed = states()
    layers = [m for m in backbone.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    with backbone.unpacked() as fits:
        assert fits
        assert all(layer.unpacked.shape == (layer.out_features, layer.in_features) for layer in layers)
        with backbone.unpacked() as again:
            assert not again
        assert layers[0].unpacked is not None  # the outer block's
        assert torch.equal(states(), packed)
    assert all(layer.unpacked is None for layer in layers)


def test_weights_that_do_not_fit_stay_packed(backbone, monkeypatch):
    needed = sum(
        2 * layer.in_features * layer.out_features
        for layer in backbone.model.modules()
        if hasattr(layer, "compute_dtype")
    )
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * needed - 1)
    with backbone.unpacked() as fits:
        assert not fits
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * needed)
    with backbone.unpacked() as fits:
        assert fits


def test_the_copy_that_layers_share_is_of_this_tensor():
    x = torch.randn(3, 4)
    first = linear._cast(x, torch.bfloat16)
    assert linear._cast(x, torch.bfloat16) is first
    x.add_(1)
    assert torch.equal(linear._cast(x, torch.bfloat16), x.bfloat16())
    assert torch.equal(linear._cast(x, torch.float16), x.half())
    del x
    y = torch.randn(3, 4)
    assert torch.equal(linear._cast(y, torch.bfloat16), y.bfloat16())


@torch.inference_mode()
def test_a_tensor_without_a_version_is_copied_for_each_layer():
    x = torch.randn(3, 4)
    linear._cast(x, torch.bfloat16)
    x.add_(1)
    assert torch.equal(linear._cast(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("way", ["policy", None])
def test_blocked_weights_compute_the_same_and_unpacked_ones_are_back_afterwards(backbone, way):
    ids = torch.randint(0, 258, (2, 6))
    layers = [m for m in backbone.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    with linear.blocked(backbone.model):
        assert not any(getattr(layer, "blocked", None) is not None for layer in layers)  # nothing is unpacked
    with backbone.unpacked():
        if not linear._can_block(layers[0]):
            pytest.skip("oneDNN does not multiply in bf16 here")
        expected = states_of(backbone, ids, backbone.use(way))
        weights = [layer.unpacked for layer in layers]
        with contextlib.suppress(KeyError), linear.blocked(backbone.model):
            assert all(layer.blocked is not None and layer.unpacked is None for layer in layers)
            assert relative(states_of(backbone, ids, backbone.use(way)), expected) <= TOLERANCE
            raise KeyError
        assert all(layer.blocked is None for layer in layers)
        assert all(torch.equal(layer.unpacked, weight) for layer, weight in zip(layers, weights, strict=True))
        assert torch.equal(states_of(backbone, ids, backbone.use(way)), expected)
    assert all(layer.unpacked is None for layer in layers)


@pytest.mark.parametrize("length", [6, 1])
def test_a_settled_role_changes_no_bit_and_is_gone_afterwards(backbone, length):
    ids = torch.randint(0, 258, (2, length))
    expected = states_of(backbone, ids, backbone.use("policy"))
    bare = states_of(backbone, ids, backbone.use(None))
    assert not torch.equal(expected, bare)
    with backbone.use("policy") as model, linear.settled(model, "policy"):
        assert lora_layer(backbone).settled[1].dtype == model.dtype
        assert torch.equal(states_of(backbone, ids, backbone.use("policy")), expected)
    assert torch.equal(states_of(backbone, ids, backbone.use(None)), bare)
    assert all(m.settled is None for m in backbone.model.modules() if isinstance(m, linear.LoraLinear4bit))


def test_the_bare_base_reads_unpacked_weights_too(backbone, monkeypatch):
    """To the bit what bitsandbytes computes from the packed ones."""
    ids = torch.randint(0, 258, (2, 6))
    expected = states_of(backbone, ids, backbone.use(None))
    with backbone.unpacked(), monkeypatch.context() as patch:
        patch.setattr(linear.bnb, "matmul_4bit", None)
        assert torch.equal(states_of(backbone, ids, backbone.use(None)), expected)
