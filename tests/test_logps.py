"""Log-probabilities from hidden states: hand-worked values, gradients, laws, agreement with float64 loops."""

import contextlib
import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import random_masks
from torch.testing import assert_close
from trl.kernels import ChunkedLogProbFunction

from lowrank_rlhf import logps as logps_module
from lowrank_rlhf import logps_cpu
from lowrank_rlhf.logps import chunked_logps, masked_targets
from lowrank_rlhf.products import fast_products


@pytest.mark.parametrize(
    ("settings", "logp", "entropy"),
    [
        ({}, math.log(3 / 4), 3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4)),
        ({"temperature": 0.5}, math.log(9 / 10), 0.9 * math.log(10 / 9) + 0.1 * math.log(10)),
        ({"logit_scale": 2.0}, math.log(9 / 10), 0.9 * math.log(10 / 9) + 0.1 * math.log(10)),
        ({"bias": torch.tensor([0.0, math.log(3)])}, -math.log(2), math.log(2)),
        ({"logit_softcap": 1.0}, -math.log(1 + math.exp(-0.8)), None),
        ({"logit_softcap": 0.5, "logit_scale": 0.5}, -math.log(1 + math.exp(-0.4)), None),
        ({"logit_softcap": 1.0, "temperature": 0.5}, -math.log(1 + math.exp(-1.6)), None),
        ({"logit_scale": 2.0, "bias": torch.tensor([0.0, math.log(3)])}, -math.log(2), math.log(2)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_logp_by_hand(settings, logp, entropy):
    """h = 1, W = (log 3, 0): z = (log 3, 0), p = (¾, ¼).

    Temperature ½ or scale 2: z = (log 9, 0), p = (0.9, 0.1). Bias (0, log 3): z = (log 3, log 3), p = ½,
    also when the sum is scaled. Softcap 1: z₀ = tanh(log 3) = (9 − 1)/(9 + 1) = 0.8, p₀ = 1/(1 + e^−0.8).
    Softcap ½ of half the logit: ½ tanh(log 3) = 0.4. Softcap before temperature: 0.8/½ = 1.6.
    A two-token p has entropy −p₀ log p₀ − p₁ log p₁.
    """
    p = math.exp(logp)
    entropy = -p * logp - (1 - p) * math.log(1 - p) if entropy is None else entropy
    head = torch.tensor([[math.log(3)], [0.0]])
    actual = chunked_logps(torch.ones(1, 1), head, torch.tensor([0]), **settings)
    assert_close(list(actual[:2]), [torch.tensor([logp]), torch.tensor([entropy])])
    assert math.isclose(p, 0.5) or actual[2].tolist() == [p > 0.5]


def test_sums_are_accumulated_in_float32_for_bfloat16_states(monkeypatch):
    """1001 equal logits in chunks of 7: ∓log 1001 = ∓6.90876; the nearest bfloat16 is 6.90625."""
    monkeypatch.setattr(logps_module, "VOCAB_CHUNK", 7)
    hidden, head = torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(1001, 3, dtype=torch.bfloat16)
    logps, entropy, _ = chunked_logps(hidden, head, torch.tensor([0, 1000]))
    assert_close([logps, entropy], [torch.full((2,), -math.log(1001)), torch.full((2,), math.log(1001))])


SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.3},
    "softcap": {"logit_softcap": 1.5},
    "bias": {"bias": torch.linspace(-1, 1, 11)},
    "all": {"temperature": 0.7, "logit_scale": 0.3, "logit_softcap": 1.5, "bias": torch.linspace(-1, 1, 11)},
}


@pytest.mark.parametrize("vocab_chunk", [4, 32768], ids=["three_chunks", "one_chunk"])
@pytest.mark.parametrize(("logp_weight", "entropy_weight"), [(1, 0), (0, 1), (1, -0.1)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradient_is_that_of_the_plain_path(monkeypatch, settings, logp_weight, entropy_weight, vocab_chunk):
    """d/dhidden of a weighted sum of logps, of entropies, of both: float32 autograd through full logits."""
    monkeypatch.setattr(logps_module, "VOCAB_CHUNK", vocab_chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 5, generator=generator), torch.randn(11, 5, generator=generator)
    targets, weights = torch.randint(11, (6,), generator=generator), torch.randn(6, generator=generator)

    def plain_logps(hidden, head, targets, *, bias=0, temperature=1, logit_scale=1, logit_softcap=None):
        logits = logit_scale * (hidden @ head.T + bias)
        logits = logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)
        log_p = F.log_softmax(logits / temperature, dim=-1)
        return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1), None

    def gradient(function):
        trained = hidden.clone().requires_grad_()
        logps, entropy, _ = function(trained, head, targets, **settings)
        return torch.autograd.grad((weights * (logp_weight * logps + entropy_weight * entropy)).sum(), trained)[0]

    assert gradient(plain_logps).abs().max() > 0.01
    assert_close(gradient(chunked_logps), gradient(plain_logps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 1024])
@pytest.mark.parametrize("vocab_chunk", [3, 32768], ids=["chunks", "one_chunk"])
def test_the_cpu_kernel_is_trls(monkeypatch, rows, vocab_chunk):
    """Logps, entropies, which is likeliest, and gradients of both; few rows at a time."""
    monkeypatch.setattr(logps_module, "VOCAB_CHUNK", vocab_chunk)
    monkeypatch.setattr(logps_cpu, "ROWS", rows)
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(6, 5, generator=generator) * 2, torch.randn(11, 5, generator=generator)
    hidden[0] = 5 * head[2]
    hidden[1] = 5 * head[7]
    targets = torch.tensor([2, 7, 0, 5, 10, 3])
    weights = torch.randn(2, 6, generator=generator)
    found = []
    for kernel in ("cpu", "trl"):
        states = hidden.clone().requires_grad_()
        if kernel == "cpu":
            logps, entropy, top = chunked_logps(states, head, targets, temperature=0.7)
        else:
            outputs = ("entropy", "is_top1")
            theirs = ChunkedLogProbFunction.apply(states, head, None, targets, 0.7, vocab_chunk, None, 1.0, outputs)
            logps, entropy, *_, top = theirs
        (gradient,) = torch.autograd.grad((weights[0] * logps + weights[1] * entropy).sum(), states)
        found.append((logps, entropy, top, gradient))
    assert found[0][2].tolist() == found[1][2].tolist()
    assert found[0][2].tolist()[:2] == [True, True]
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fast_products_round_as_bf16_at_most():
    """u = 2⁻⁹ a factor: the logits of 576 terms of the size of 1 are off by √576 · 2u at the very most."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(64, 576, generator=generator), torch.randn(1024, 576, generator=generator)
    targets = torch.arange(64)
    exact, fast = (chunked_logps(hidden, head, targets, fast=fast) for fast in (False, True))
    assert_close(fast[0], exact[0], rtol=0, atol=24 * 2**-8)
    assert not torch.equal(fast[0], exact[0])  # another product it is


def test_precision_is_put_back_whatever_happens():
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with contextlib.suppress(ZeroDivisionError), fast_products():
        assert products.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert products.fp32_precision == before
    with fast_products(False):
        assert products.fp32_precision == before


def test_masked_targets_by_hand():
    """Row 0, prompt 5: 6 and 7 are read at columns 0 and 1. Row 1, prompt 8 9 after a pad: 3 is read at 2."""
    ids = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 3]])
    before, targets = masked_targets(ids, torch.tensor([[False, True, True, False], [False, False, False, True]]))
    assert before.tolist() == [[True, True, False, False], [False, False, True, False]]
    assert targets.tolist() == [6, 7, 3]


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]])
def test_masked_targets_refuses_a_completion_without_a_prompt(rows):
    mask = torch.tensor([[False, True], [False, True]])
    mask[rows, 0] = True
    with pytest.raises(ValueError, match="True in column 0"):
        masked_targets(torch.zeros(2, 2, dtype=torch.long), mask)


@pytest.mark.parametrize("padding", [(0, 3), (3, 0), (2, 1)], ids=["right", "left", "both"])
def test_more_padding_changes_no_target_and_no_state_read(padding):
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    ids = torch.arange(8).reshape(2, 4)
    before, targets = masked_targets(ids, mask)
    padded_before, padded_targets = masked_targets(F.pad(ids, padding, value=-100), F.pad(mask, padding))
    assert torch.equal(padded_targets, targets)
    assert torch.equal(padded_before, F.pad(before, padding))


# The kernel computes h Wᵀ + b in the type of `hidden` and all else in float32, u = 6e-8. |z| ≤ 3 · ½ · ½ + ½
# here, so |logp| ≤ 2 · 1.25 + log 7 < 5: 3 roundings of 5u are below 1e-6; float32 inputs add 6 of 1.25u.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 2e-6)])
def test_completion_logps_agree_with_float64_loops(monkeypatch, dtype, tolerance):
    """From (B, T) ids and mask to logps: the state at t − 1 predicts token t, whatever the chunk width."""
    for rng, completion in random_masks(seed=7):
        mask = np.pad(completion, ((0, 0), (int(rng.integers(1, 4)), 0)))
        vocab = int(rng.integers(2, 8))
        ids = rng.integers(vocab, size=mask.shape)
        hidden, head, bias = (
            rng.uniform(-0.5, 0.5, size).astype(dtype) for size in ((*mask.shape, 3), (vocab, 3), vocab)
        )
        settings = {
            "bias": bias if rng.integers(2) else None,
            "temperature": rng.uniform(1, 2),
            "logit_scale": rng.uniform(0.1, 1),
            "logit_softcap": rng.uniform(0.1, 2) if rng.integers(2) else None,
        }
        monkeypatch.setattr(logps_module, "VOCAB_CHUNK", int(rng.integers(1, vocab + 3)))
        before, targets = masked_targets(torch.tensor(ids), torch.tensor(mask))
        tensors = {**settings, "bias": None if settings["bias"] is None else torch.tensor(bias)}
        actual = chunked_logps(torch.tensor(hidden)[before], torch.tensor(head), targets, **tensors)
        expected = [
            reference.token_logp_and_entropy(hidden[b, t - 1], head, ids[b, t], **settings)
            for b, t in reference.positions(mask)
        ]
        expected = torch.tensor(expected, dtype=torch.float32).T
        assert_close(torch.stack(actual[:2]), expected, rtol=0, atol=tolerance)
