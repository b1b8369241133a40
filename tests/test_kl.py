"""KL estimators: hand-worked values, laws, and agreement with float64 loops."""

import math

import pytest
import reference
import torch
from reference import agrees_in_float64_and, draw, random_masks

from lowrank_rlhf.kl import kl_per_token

ESTIMATORS = pytest.mark.parametrize("estimator", ["k1", "k3"])
POLICY, REFERENCE = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.25, 0.35]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [math.log(2), -math.log(2)]), ("k3", [math.log(2) - 1 / 2, 1 - math.log(2)])],
)
def test_kl_by_hand(estimator, expected):
    """π = ½, π_ref = ¼: r = ½, log r = −log 2, so k1 = log 2 and k3 = (½ − 1) + log 2.

    π = ¼, π_ref = ½: r = 2, log r = log 2, so k1 = −log 2 and k3 = (2 − 1) − log 2.
    """
    policy, ref = torch.tensor([[1 / 2, 1 / 4]]).log(), torch.tensor([[1 / 4, 1 / 2]]).log()
    torch.testing.assert_close(kl_per_token(policy, ref, estimator), torch.tensor([expected]))


def test_k1_is_the_default():
    policy, ref = torch.tensor([[-1.0]]), torch.tensor([[-3.0]])
    assert kl_per_token(policy, ref).item() == 2.0


@ESTIMATORS
def test_a_policy_has_no_kl_to_itself(estimator):
    token_logps = -10 * torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kl_per_token(token_logps, token_logps.clone(), estimator), torch.zeros(4, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_k3_is_never_negative(dtype):
    """(r − 1) − log r ≥ 0, also at small |log r|, where both terms round to nearly the same number."""
    sizes = torch.logspace(-12, 1, 100_000, dtype=torch.float64)
    log_ratio = torch.cat([sizes, -sizes]).unsqueeze(0).to(dtype)
    assert (kl_per_token(torch.zeros_like(log_ratio), log_ratio, "k3") >= 0).all()


@ESTIMATORS
def test_expectation_under_the_policy_is_the_exact_kl(estimator):
    """Σ π · k = Σ π log(π/π_ref): k3 adds Σ π (r − 1) = Σ π_ref − Σ π = 0."""
    exact = sum(p * math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))
    expectation = (POLICY * kl_per_token(POLICY.log(), REFERENCE.log(), estimator)).sum()
    assert expectation.item() == pytest.approx(exact, abs=1e-12)


@ESTIMATORS
def test_sample_mean_approaches_the_exact_kl(estimator):
    """Of n sampled tokens the mean is within 5 standard errors, σ/√n; σ is exact, from the three outcomes."""
    n = 100_000
    sampled = torch.multinomial(POLICY, n, replacement=True, generator=torch.Generator().manual_seed(0))
    exact = (POLICY * (POLICY / REFERENCE).log()).sum()
    outcomes = kl_per_token(POLICY.log(), REFERENCE.log(), estimator)
    sigma = (POLICY * (outcomes - exact) ** 2).sum().sqrt()
    estimates = kl_per_token(POLICY.log()[sampled], REFERENCE.log()[sampled], estimator)
    assert 0 < sigma < 1
    assert abs(estimates.mean() - exact) < 5 * sigma / n**0.5


def test_k3_varies_less_than_k1():
    k1, k3 = (kl_per_token(POLICY.log(), REFERENCE.log(), estimator) for estimator in ("k1", "k3"))
    mean = (POLICY * k1).sum()
    assert (POLICY * (k3 - mean) ** 2).sum() < (POLICY * (k1 - mean) ** 2).sum() / 5


@pytest.mark.parametrize("estimator", ["k2", "K1", ""])
def test_unknown_estimator_is_named_in_the_error(estimator):
    with pytest.raises(ValueError, match=f"'k1' or 'k3', not '{estimator}'"):
        kl_per_token(torch.zeros(1, 1), torch.zeros(1, 1), estimator)


# float32: |log r| ≤ 2 is off by ≤ 2u (u = 6e-8), e^{log r} ≤ 7.4 by ≤ 7.4 · 4u = 2e-6; 1e-5 leaves room.
@agrees_in_float64_and(1e-5)
def test_kl_agrees_with_float64_loops(dtype, tolerance):
    for rng, mask in random_masks(seed=0):
        estimator = ["k1", "k3"][rng.integers(2)]
        policy, ref = (draw(rng, mask, dtype, -2, 0) for _ in range(2))
        kl = kl_per_token(torch.tensor(policy), torch.tensor(ref), estimator)
        expected = reference.kl_per_token(policy, ref, mask, estimator)
        assert kl.dtype == getattr(torch, dtype)
        torch.testing.assert_close(kl.numpy()[mask], expected[mask].astype(dtype), rtol=0, atol=tolerance)
