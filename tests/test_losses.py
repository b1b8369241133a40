"""Bradley-Terry and PPO losses: hand-worked values, gradients, laws, and agreement with float64 loops."""

import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import agrees_in_float64_and, draw, random_masks
from torch.testing import assert_close

from lowrank_rlhf.advantages import masked_mean
from lowrank_rlhf.losses import aggregate_loss, bradley_terry_loss, centering_loss, ppo_policy_loss, ppo_value_loss


def uniform(seed, low=-1.0, high=1.0):
    return low + (high - low) * torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("margin", "loss", "gradient"),
    [
        (0.0, math.log(2), 1 / 2),
        (math.log(3), math.log(4 / 3), 1 / 4),
        (-math.log(3), math.log(4), 3 / 4),
        (1000.0, 0.0, 0.0),
        (-1000.0, 1000.0, 1.0),
    ],
)
def test_bradley_terry_and_its_gradient_by_hand(margin, loss, gradient):
    """−log σ(m): σ(0) = ½; σ(log 3) = 3/(3 + 1) = ¾; σ(−log 3) = ¼; −log σ(−1000) = 1000 to e^−1000, not inf.

    d/dm = −(1 − σ(m)), so −½, −¼, −¾, 0, −1 for the chosen score, the opposite for the rejected.
    """
    chosen, rejected = torch.tensor([margin + 2], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    value = bradley_terry_loss(chosen, rejected)
    value.sum().backward()
    assert_close([value, chosen.grad, rejected.grad], [torch.tensor([x]) for x in (loss, -gradient, gradient)])


@pytest.mark.parametrize(
    ("margin", "label_smoothing", "loss", "gradient"),
    [
        (math.log(3), 0.0, math.log(2), 1 / 2),
        (2 * math.log(3), 0.0, math.log(4), 3 / 4),
        (0.0, 0.25, 0.75 * math.log(4 / 3) + 0.25 * math.log(4), 0.0),
        (0.0, 0.5, 0.5 * math.log(4 / 3) + 0.5 * math.log(4), -1 / 4),
        (math.log(3), 0.1, math.log(2), 0.4),
    ],
)
def test_margin_and_label_smoothing_by_hand(margin, label_smoothing, loss, gradient):
    """r_chosen − r_rejected = log 3, so the lead is log 3 − margin: σ(0) = ½, σ(−log 3) = ¼, σ(log 3) = ¾.

    d/dlead = −(1 − ε)(1 − σ) + ε σ: at σ = ¾ and ε = ¼ it is −3/16 + 3/16 = 0, for one label in four is wrong and
    ¾ is the right probability; at ε = ½ it is −1/8 + 3/8. At σ = ½ and ε = 0.1 it is −0.45 + 0.05.
    """
    chosen, rejected = torch.tensor([math.log(3) + 2], requires_grad=True), torch.tensor([2.0])
    value = bradley_terry_loss(chosen, rejected, margin=torch.tensor([margin]), label_smoothing=label_smoothing)
    value.sum().backward()
    assert_close([value, chosen.grad], [torch.tensor([loss]), torch.tensor([-gradient])])


def test_centering_pulls_both_scores_by_twice_their_sum():
    """(3 − 1)² = 4; the derivative for either score is 2 · (3 − 1)."""
    chosen, rejected = torch.tensor([3.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    value = centering_loss(chosen, rejected)
    value.sum().backward()
    assert [t.item() for t in (value, chosen.grad, rejected.grad)] == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        (1.5, 2.0, -2.4, True, 0.0),
        (1.5, -2.0, 3.0, False, 3.0),
        (0.5, 2.0, -1.0, False, -1.0),
        (0.5, -2.0, 1.6, True, 0.0),
        (1.1, 2.0, -2.2, False, -2.2),
        (0.9, -2.0, 1.8, False, 1.8),
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_ppo_policy_loss_and_its_gradient_by_hand(ratio, advantage, loss, clipped, gradient):
    """ε = 0.2. A = 2 gains nothing above ρ = 1.2: −2 · 1.2; A = −2 gains nothing below ρ = 0.8: 2 · 0.8.

    Everywhere else −A ρ, also out of range on the side that made things worse. d/dlogp = −A ρ, 0 if clipped.
    """
    token_logps = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    value, flag = ppo_policy_loss(token_logps, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), clip_range=0.2)
    value.sum().backward()
    assert flag.tolist() == [[clipped]]
    assert_close([value, token_logps.grad], [torch.tensor([[loss]]), torch.tensor([[gradient]])])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.25, 2.0, -2.5, False), (1.5, 2.0, -2.56, True), (0.75, -2.0, 1.6, True), (0.75, 2.0, -1.5, False)],
)
def test_a_wider_bound_above_by_hand(ratio, advantage, loss, clipped):
    """ε = 0.2, ε_high = 0.28: ρ = 1.25 is inside now, ρ = 1.5 gives −2 · 1.28; below 1 nothing changes."""
    logps = torch.tensor([[math.log(ratio)]])
    advantages = torch.tensor([[advantage]])
    value, flag = ppo_policy_loss(logps, torch.zeros(1, 1), advantages, clip_range=0.2, clip_range_high=0.28)
    assert flag.tolist() == [[clipped]]
    assert_close(value, torch.tensor([[loss]]))


@pytest.mark.parametrize(("how", "whole"), [("token", 23 / 7), ("sequence", 2.5)])
def test_shares_of_micro_batches_add_up_to_the_mean_of_the_minibatch(how, whole):
    """Completions of 1, 2 and 4 tokens: (1 + 4 + 18) / 7 tokens, and (1 + 4/2 + 18/4) / 3 completions."""
    losses = torch.tensor([[1.0, 9.0, 9.0, 9.0], [2.0, 2.0, 9.0, 9.0], [3.0, 4.0, 5.0, 6.0]])
    mask = torch.arange(4) < torch.tensor([[1], [2], [4]])
    for cuts in ([3], [1, 2], [1, 1, 1]):
        parts = zip(losses.split(cuts), mask.split(cuts), strict=True)
        total = sum(aggregate_loss(part, counted, how, tokens=7, sequences=3) for part, counted in parts)
        assert_close(total, torch.tensor(whole))


def test_ppo_at_ratio_1_is_the_policy_gradient():
    """ρ = 1: the loss is −A, nothing is clipped; dρ/dlogp = ρ = 1 makes the gradient that of −A · logp."""
    token_logps, advantages = uniform(0, -3, 0).requires_grad_(), uniform(1)
    loss, clipped = ppo_policy_loss(token_logps, token_logps.detach(), advantages, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), token_logps)
    (expected,) = torch.autograd.grad((-advantages * token_logps).sum(), token_logps)
    assert torch.equal(loss, -advantages)
    assert not clipped.any()
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped", "gradient"),
    [
        (1.0, 0.0, 1.0, 0.32, True, 0.0),
        (-1.0, 0.0, 1.0, 2.0, False, -2.0),
        (1.0, 0.0, -1.0, 2.0, False, 2.0),
        (-1.0, 0.0, -2.0, 1.62, True, 0.0),
        (0.1, 0.0, 1.0, 0.405, False, -0.9),
        (3.0, 2.0, 3.0, 0.32, True, 0.0),
    ],
)
def test_ppo_value_loss_and_its_gradient_by_hand(value, old, target, loss, clipped, gradient):
    """ε = 0.2. V = R = 1, V_old = 0: the clip moves V to 0.2 and ½ (0.2 − 1)² = 0.32 is larger than 0.

    V = −1, R = 1: ½ · 2² beats ½ (−0.2 − 1)². V = 1, R = −1: its mirror image. V = −1, R = −2: the clip moves
    V to −0.2, ½ · 1.8² = 1.62. V = 0.1 is in range: ½ · 0.9². The last is the first with all moved by 2.
    d/dV = V − R, or 0 if clipped.
    """
    values = torch.tensor([[value]], requires_grad=True)
    actual, flag = ppo_value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), clip_range=0.2)
    actual.sum().backward()
    assert flag.tolist() == [[clipped]]
    assert_close([actual, values.grad], [torch.tensor([[loss]]), torch.tensor([[gradient]])])


def test_value_loss_in_range_is_half_the_squared_error():
    """|V − V_old| < ε: ½ (V − R)², nothing clipped, gradient V − R."""
    old_values, returns = uniform(2), uniform(3)
    values = (old_values + 0.19 * uniform(4)).requires_grad_()
    loss, clipped = ppo_value_loss(values, old_values, returns, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert_close(loss, (values - returns) ** 2 / 2)
    assert not clipped.any()
    assert_close(gradient, (values - returns).detach())


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("loss", [ppo_policy_loss, ppo_value_loss], ids=lambda f: f.__name__)
def test_more_padding_changes_no_masked_mean(loss, garbage):
    """Three more columns, `garbage` in every padded position: loss, clip fraction, gradients stay put."""
    mask = torch.arange(6) < torch.tensor([[4], [1], [6]])
    clean = [torch.where(mask, uniform(seed), 0.0) for seed in (5, 6, 7)]
    dirty = [F.pad(torch.where(mask, values, garbage), (0, 3), value=garbage) for values in clean]

    def means_and_gradient(inputs, mask):
        trained = inputs[0].requires_grad_()
        losses, clipped = loss(trained, *inputs[1:], clip_range=0.2)
        mean = masked_mean(losses, mask)
        return [mean, masked_mean(clipped, mask), *torch.autograd.grad(mean, trained)]

    before, after = means_and_gradient(clean, mask), means_and_gradient(dirty, F.pad(mask, (0, 3)))
    assert 0 < before[1] < 1
    assert_close([*after[:2], after[2][:, :6][mask]], [*before[:2], before[2][mask]])


# float32, u = 6e-8, here and below: every input is ≤ 2 in size, so differences are off by ≤ 2u and their
# exponentials, ≤ 7.4, by ≤ 7.4 · 4u = 2e-6; squares of differences, ≤ 9, by ≤ 9 · 4u. With this seed no token
# is within 5e-5 of where its clip flag flips.
@agrees_in_float64_and(1e-5)
def test_bradley_terry_agrees_with_float64_loops(dtype, tolerance):
    for rng, mask in random_masks(seed=5):
        chosen, rejected = (rng.uniform(-1, 1, len(mask)).astype(dtype) for _ in range(2))
        loss = bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected))
        expected = reference.bradley_terry_loss(chosen, rejected).astype(dtype)
        assert_close(loss, torch.from_numpy(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("loss", "expected_loss", "ranges"),
    [
        (ppo_policy_loss, reference.ppo_policy_loss, [(-2, 0), (-2, 0), (-1, 1)]),
        (ppo_value_loss, reference.ppo_value_loss, [(-1, 1), (-1, 1), (-2, 2)]),
    ],
    ids=["ppo_policy_loss", "ppo_value_loss"],
)
@agrees_in_float64_and(1e-5)
def test_ppo_losses_agree_with_float64_loops(loss, expected_loss, ranges, dtype, tolerance):
    for rng, mask in random_masks(seed=6):
        inputs, clip_range = [draw(rng, mask, dtype, *ends) for ends in ranges], rng.uniform(0.01, 0.9)
        actual, clipped = loss(*map(torch.tensor, inputs), clip_range=clip_range)
        expected, expected_clipped = expected_loss(*inputs, mask, clip_range)
        assert actual.dtype == getattr(torch, dtype)
        assert_close(actual.numpy()[mask], expected[mask].astype(dtype), rtol=0, atol=tolerance)
        assert np.array_equal(clipped.numpy()[mask], expected_clipped[mask])
