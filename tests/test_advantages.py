"""Masked moments, token rewards, GAE, groups: hand-worked values, laws, and agreement with float64 loops."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import agrees_in_float64_and, draw, random_masks
from torch.testing import assert_close

from lowrank_rlhf.advantages import (
    all_equal,
    gae,
    group_advantages,
    leave_one_out_baseline,
    masked_mean,
    token_rewards,
    whiten,
)

LENGTHS = torch.tensor([[4], [1], [6]])  # a padded row, the shortest, a full one
MASK = torch.arange(6) < LENGTHS


def completion(seed, low=-1.0, high=1.0):
    """Float64 values uniform in [low, high) at the completion tokens of MASK, 0 elsewhere."""
    noise = torch.rand(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(MASK, low + (high - low) * noise, 0.0)


def test_masked_mean_by_hand():
    """(1 + 2 + 6) / 3 = 3: over all entries that count, not (1.5 + 6) / 2, the mean of the row means."""
    values = torch.tensor([[1.0, 2.0], [6.0, 50.0]])
    assert masked_mean(values, torch.tensor([[True, True], [True, False]])).item() == 3.0


def test_masked_mean_of_flags_is_their_fraction():
    """Clip fractions: one True in two that count."""
    flags = torch.tensor([[True, False, True]])
    assert masked_mean(flags, torch.tensor([[True, True, False]])).item() == 0.5


@pytest.mark.parametrize("function", [masked_mean, whiten], ids=lambda f: f.__name__)
def test_nothing_that_counts_gives_zero(function):
    empty = function(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(empty, torch.zeros_like(empty))


def test_masked_mean_has_no_gradient_in_the_padding():
    """d mean / d x = 1/n at each of the n = 11 counting entries, 0 elsewhere even where x is NaN."""
    values = torch.where(MASK, completion(0), math.nan).requires_grad_()
    masked_mean(values, MASK).backward()
    assert_close(values.grad, MASK / 11.0, check_dtype=False, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, [-1.0, 0.0, 1.0, 0.0]), (False, [2.0, 3.0, 4.0, 0.0])])
def test_whiten_by_hand(shift_mean, expected):
    """1, 3, 5: mean 3, variance (4 + 0 + 4) / 2 = 4, so −1, 0, 1; keeping the mean adds 3 to each."""
    values, mask = torch.tensor([[1.0, 3.0, 5.0, 99.0]]), torch.tensor([[True, True, True, False]])
    assert_close(whiten(values, mask, shift_mean=shift_mean), torch.tensor([expected]))


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, 0.0), (False, 7.0)])
def test_one_entry_has_no_variance(shift_mean, expected):
    mask = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[7.0, 99.0]]), mask, shift_mean=shift_mean).tolist() == [[expected, 0.0]]


def test_eps_is_added_to_the_variance():
    """1, 3: mean 2, variance 2; with eps = 2 they become ∓1/√4."""
    mask = torch.tensor([[True, True]])
    assert_close(whiten(torch.tensor([[1.0, 3.0]]), mask, eps=2.0), torch.tensor([[-0.5, 0.5]]))


def test_whitened_values_have_mean_0_and_variance_1():
    """eps = 1e-8 takes 1e-8/σ² off the variance, and σ² > 0.1 here."""
    whitened = whiten(completion(1), MASK)[MASK]
    assert_close(whitened.mean().item(), 0.0, rtol=0, atol=1e-12)
    assert_close(whitened.var(correction=1).item(), 1.0, rtol=0, atol=1e-7)


def test_kept_mean_survives_whitening():
    values = completion(1, low=2.0, high=9.0)
    kept = whiten(values, MASK, shift_mean=False)[MASK]
    assert_close(kept.mean(), values[MASK].mean())
    assert_close(kept.var(correction=1).item(), 1.0, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", [-3.0, 0.25, 1000.0])
def test_a_constant_shift_whitens_away(shift):
    assert_close(whiten(completion(2) + shift, MASK), whiten(completion(2), MASK), rtol=0, atol=1e-11)


def test_token_rewards_by_hand():
    """kl_coef ½. Row 0, length 2, score 3: −½·2, −½·4 + 3. Row 1, length 3, score −1: −½·(−2), 0, −½·6 − 1.

    Row 2, length 1, score 5: −½·8 + 5, first token and last at once.
    """
    kl = torch.tensor([[2.0, 4.0, 99.0], [-2.0, 0.0, 6.0], [8.0, 99.0, 99.0]])
    mask = torch.arange(3) < torch.tensor([[2], [3], [1]])
    rewards = token_rewards(torch.tensor([3.0, -1.0, 5.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-1.0, 1.0, 0.0], [1.0, 0.0, -4.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 2.0])
def test_rewards_of_a_completion_sum_to_its_penalised_score(kl_coef):
    scores, kl = torch.tensor([1.0, -2.0, 0.5]).double(), completion(3)
    assert_close(token_rewards(scores, kl, MASK, kl_coef=kl_coef).sum(1), scores - kl_coef * kl.sum(1))


def test_gae_by_hand():
    """γ = λ = ½, so γλ = ¼.

    Row 0, r = 1, 0, 1 and V = 1, 2, 4: δ = 1 + ½·2 − 1 = 1, 0 + ½·4 − 2 = 0, 1 + 0 − 4 = −3;
    A₂ = −3, A₁ = 0 − ¾, A₀ = 1 − 3/16; returns A + V = 29/16, 5/4, 1.
    Row 1, r = 0, 2 and V = 4, 1, then padding: δ = 0 + ½·1 − 4 = −7/2, 2 + 0 − 1 = 1;
    A₁ = 1, A₀ = −7/2 + ¼ = −13/4; returns 3/4, 2.
    """
    rewards, values = torch.tensor([[1.0, 0, 1], [0, 2, 99]]), torch.tensor([[1.0, 2, 4], [4, 1, 99]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[13 / 16, -3 / 4, -3], [-13 / 4, 1, 0]]
    assert returns.tolist() == [[29 / 16, 5 / 4, 1], [3 / 4, 2, 0]]


def test_undiscounted_monte_carlo_is_reward_to_go_minus_value():
    rewards, values = completion(4), completion(5)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert_close(advantages, torch.where(MASK, to_go - values, 0.0))
    assert_close(returns, torch.where(MASK, to_go, 0.0))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_monte_carlo_returns_do_not_depend_on_values(gamma):
    returns = [gae(completion(4), completion(seed), MASK, gamma=gamma, gae_lambda=1.0)[1] for seed in (5, 6)]
    assert_close(*returns)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_lambda_0_is_the_one_step_td_error(gamma):
    """`completion` is 0 past the end, so the plain shift gives the last state the value 0 that follows it."""
    rewards, values = completion(4), completion(5)
    advantages, returns = gae(rewards, values, MASK, gamma=gamma, gae_lambda=0.0)
    target = torch.where(MASK, rewards + gamma * F.pad(values[:, 1:], (0, 1)), 0.0)
    assert_close(advantages, target - values)
    assert_close(returns, target)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(
    "function",
    [
        lambda first, second, mask: (masked_mean(first, mask).expand(mask.shape),),
        lambda first, second, mask: (whiten(first, mask),),
        lambda first, second, mask: (whiten(first, mask, shift_mean=False),),
        lambda first, second, mask: (token_rewards(torch.ones(3).double(), first, mask, kl_coef=0.1),),
        lambda first, second, mask: gae(first, second, mask, gamma=0.9, gae_lambda=0.8),
    ],
    ids=["masked_mean", "whiten", "whiten_keeping_mean", "token_rewards", "gae"],
)
def test_more_padding_changes_nothing(function, garbage):
    """Three more columns, `garbage` in every padded position: the first six columns stay what they were."""
    clean = [completion(7), completion(8)]
    dirty = [F.pad(torch.where(MASK, values, garbage), (0, 3), value=garbage) for values in clean]
    for before, after in zip(function(*clean, MASK), function(*dirty, F.pad(MASK, (0, 3))), strict=True):
        assert_close(after[:, :6], before, rtol=0, atol=1e-12)


# float32, u = 6e-8: a mean of ≤ 60 values in [−1, 1] is off by ≤ 60u = 4e-6.
@agrees_in_float64_and(1e-5)
def test_masked_mean_agrees_with_float64_loops(dtype, tolerance):
    for rng, mask in random_masks(seed=1):
        values = draw(rng, mask, dtype)
        mean = masked_mean(torch.tensor(values), torch.tensor(mask))
        expected = torch.tensor(reference.masked_mean(values, mask), dtype=mean.dtype)
        assert mean.dtype == getattr(torch, dtype)
        assert_close(mean, expected, rtol=0, atol=tolerance)


# float32, u = 6e-8: x − mean is off by a few u, hence the result by a few u/σ, and σ > 0.01 with this seed.
@agrees_in_float64_and(1e-4)
def test_whiten_agrees_with_float64_loops(dtype, tolerance):
    for rng, mask in random_masks(seed=2):
        values, shift_mean, eps = draw(rng, mask, dtype), bool(rng.integers(2)), 10 ** rng.uniform(-9, 0)
        whitened = whiten(torch.tensor(values), torch.tensor(mask), shift_mean=shift_mean, eps=eps)
        expected = reference.whiten(values, mask, shift_mean, eps).astype(dtype)
        assert_close(whitened, torch.from_numpy(expected), rtol=0, atol=tolerance)


# float32, u = 6e-8: |reward| ≤ 2 after three roundings.
@agrees_in_float64_and(1e-6)
def test_token_rewards_agree_with_float64_loops(dtype, tolerance):
    for rng, mask in random_masks(seed=3):
        scores, kl, kl_coef = (
            rng.uniform(-1, 1, len(mask)).astype(dtype),
            draw(rng, mask, dtype),
            rng.uniform(),
        )
        rewards = token_rewards(torch.tensor(scores), torch.tensor(kl), torch.tensor(mask), kl_coef=kl_coef)
        expected = reference.token_rewards(scores, kl, mask, kl_coef).astype(dtype)
        assert_close(rewards, torch.from_numpy(expected), rtol=0, atol=tolerance)


# float32, u = 6e-8: |δ| ≤ 3 and |A| ≤ 12 · 3; each of ≤ 12 steps adds ≤ 3 roundings of 36u: 1300u = 8e-5.
@agrees_in_float64_and(1e-4)
def test_gae_agrees_with_float64_loops(dtype, tolerance):
    for rng, mask in random_masks(seed=4):
        rewards, values, (gamma, lam) = draw(rng, mask, dtype), draw(rng, mask, dtype), rng.uniform(size=2)
        actual = gae(*map(torch.tensor, (rewards, values, mask)), gamma=gamma, gae_lambda=lam)
        for one, other in zip(actual, reference.gae(rewards, values, mask, gamma, lam), strict=True):
            assert_close(one, torch.from_numpy(other.astype(dtype)), rtol=0, atol=tolerance)


# Groups


def test_group_advantages_by_hand():
    """Of 0, 0, 0, 4: mean 1, Σ(r − 1)² = 12, std √(12/3) = 2: −½ three times and 3/2."""
    rewards = torch.tensor([[0.0, 4.0, 0.0, 0.0]])
    assert_close(group_advantages(rewards, eps=0.0), torch.tensor([[-0.5, 1.5, -0.5, -0.5]]))
    assert_close(group_advantages(rewards, scale_by_std=False), torch.tensor([[-1.0, 3.0, -1.0, -1.0]]))


def test_leaving_one_out_by_hand():
    """Of 0, 4, 0, 0 the others' mean is 4/3, and 0 for the one that has the 4; the advantage is 4/3 of r − mean."""
    rewards = torch.tensor([[0.0, 4.0, 0.0, 0.0]])
    third = 4 / 3
    assert_close(leave_one_out_baseline(rewards), torch.tensor([[third, 0.0, third, third]]))
    assert_close(rewards - leave_one_out_baseline(rewards), group_advantages(rewards, scale_by_std=False) * 4 / 3)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_group_laws(size):
    """Sums are 0 in each group; a shift of all its rewards changes nothing; a factor changes nothing where scaled."""
    rewards = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    for scale in (True, False):
        advantages = group_advantages(rewards, scale_by_std=scale, eps=0.0)
        assert_close(advantages.sum(dim=1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
        assert_close(group_advantages(rewards + 7, scale_by_std=scale, eps=0.0), advantages)
    assert_close(group_advantages(rewards * 5, eps=0.0), group_advantages(rewards, eps=0.0))
    rloo = rewards - leave_one_out_baseline(rewards)
    assert_close(rloo.sum(dim=1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -7.7, 1e6])
def test_a_group_of_equal_rewards_gives_exactly_0(reward):
    """Also where the mean of equal numbers is not one of them in float32, as that of three times 0.1."""
    rewards = torch.full((2, 3), reward)
    rewards[1, 2] += 1
    advantages = group_advantages(rewards)
    assert all_equal(rewards).tolist() == [True, False]
    assert torch.equal(advantages[0], torch.zeros(3))
    assert bool((advantages[1] != 0).all())
