"""Calibration: hand-worked ECE, Brier and NLL, bins, and a temperature that is found again."""

import math

import numpy as np
import pytest

from lowrank_rlhf.evaluation.calibration import (
    Bin,
    TemperatureScaling,
    confidence,
    expected_calibration_error,
    fit_of,
    fit_temperature,
    is_judged,
    nll,
    reliability,
    scale_temperature,
)

LOG3 = math.log(3)


def test_nll_brier_and_ece_by_hand():
    """σ(log 3) = ¾. Of four such pairs three are right: NLL −¾ log ¾ − ¼ log ¼, Brier (3·1/16 + 9/16)/4, ECE 0."""
    found = fit_of([LOG3, LOG3, LOG3, -LOG3], [1, 1, 1, 1])
    assert found.nll == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found.brier == pytest.approx((3 / 16 + 9 / 16) / 4)
    assert found.ece == pytest.approx(0.0)


def test_ece_of_two_bins_by_hand():
    """(2/3)|½ − ¾| + (1/3)|1 − 0.9| = 1/5."""
    assert expected_calibration_error([Bin(5, 2.0, 0.75, 0.5), Bin(5, 1.0, 0.9, 1.0)]) == pytest.approx(0.2)


def test_the_order_within_a_pair_does_not_enter_the_confidence():
    margins = np.array([0.3, -2.0, 50.0])
    assert confidence(margins).tolist() == confidence(-margins).tolist()
    assert (confidence(margins) >= 0.5).all()


def test_huge_margins_stay_finite():
    assert nll([1e4, -1e4]).tolist() == [0.0, 1e4]
    assert fit_of([1e4, -1e4], [1, 1]).brier == 0.5


@pytest.mark.parametrize(("pairs", "bins"), [(1, 1), (39, 1), (40, 2), (199, 9), (200, 10), (5000, 10)])
def test_bins_hold_equally_many_pairs(pairs, bins):
    found = reliability(np.random.default_rng(0).normal(size=pairs), np.ones(pairs))
    assert len(found) == bins
    assert sum(b.pairs for b in found) == pairs
    assert max(b.pairs for b in found) - min(b.pairs for b in found) <= 1
    assert [b.confidence for b in found] == sorted(b.confidence for b in found)


def test_the_temperature_by_hand():
    """Three right and one wrong, all with |m| = 2: σ(2/T) = ¾, so T = 2 / log 3; weights do the same."""
    assert fit_temperature([2, 2, 2, -2], [1, 1, 1, 1]) == pytest.approx(2 / LOG3)
    assert fit_temperature([2, -2], [3, 1]) == pytest.approx(2 / LOG3)


def test_the_temperature_scales_with_the_scores():
    margins = np.random.default_rng(0).normal(0.5, 1, size=100)
    assert fit_temperature(1e-6 * margins, np.ones(100)) == pytest.approx(1e-6 * fit_temperature(margins, np.ones(100)))


def test_no_temperature_is_best_where_there_is_none():
    assert fit_temperature([1, 2, 0], [1, 1, 1]) is None  # all right: T → 0
    assert fit_temperature([1, -2], [1, 1]) is None  # worse than chance: T → ∞
    assert fit_temperature([0, 0], [1, 1]) is None


def simulated(pairs: int, temperature: float) -> np.ndarray:
    """Margins `temperature` times too large: the higher-scored answer is right with probability σ(|m| / T)."""
    rng = np.random.default_rng(1)
    log_odds = np.abs(rng.normal(0, 1.5, size=pairs))
    return temperature * np.where(rng.random(pairs) < 1 / (1 + np.exp(-log_odds)), log_odds, -log_odds)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found_and_the_other_half_is_calibrated(temperature):
    margins = simulated(20_000, temperature)
    judged = np.array([is_judged(f"prompt {i}") for i in range(20_000)])
    found = scale_temperature(margins, np.ones(20_000), judged)
    assert isinstance(found, TemperatureScaling)
    # Its standard deviation over draws is 1.3 % here
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.fitted_pairs + found.judged_pairs == 20_000
    assert found.after.ece < 0.02
    if temperature != 1:
        assert found.after.ece < 0.5 * found.before.ece
        assert found.after.nll < found.before.nll
        assert found.after.brier < found.before.brier


def test_halves_are_about_equal_also_within_what_a_recipe_holds_out():
    from lowrank_rlhf.data.loading import is_held_out

    held_out = [key for key in map(str, range(5000)) if is_held_out(key, 0.1)]
    assert 0.4 < np.mean([is_judged(key) for key in held_out]) < 0.6


@pytest.mark.parametrize(
    ("margins", "judged", "words"),
    [
        ([1, -1], [True, True], "one half"),
        ([1], [False], "one half"),
        ([1, 2], [False, True], "is right"),
        ([-1, 2], [False, True], "no better than chance"),
        ([0, 2], [False, True], "no better than chance"),
    ],
)
def test_why_there_is_no_temperature_is_said(margins, judged, words):
    assert words in scale_temperature(margins, np.ones(len(margins)), judged)
