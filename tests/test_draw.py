"""Tokens come from the distribution they are said to come from."""

import pytest
import torch

from lowrank_rlhf.rollout import BLOCK, draw

ROWS = 200_000


def test_frequencies_are_the_probabilities():
    """χ² of 200,000 draws over three blocks of the vocabulary, some entries zero, the last block not full."""
    torch.manual_seed(0)
    probabilities = torch.rand(2 * BLOCK + 7) * (torch.rand(2 * BLOCK + 7) < 0.5)
    probabilities[-1] = 0.0
    probabilities /= probabilities.sum()
    counts = torch.zeros(len(probabilities), dtype=torch.float64)
    for rows in torch.full((ROWS,), 0).split(2000):
        drawn = draw(probabilities.expand(len(rows), -1))
        counts += torch.bincount(drawn, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * ROWS
    chi2 = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = int(possible.sum()) - 1
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_uniform_number_is_inverted_exactly(monkeypatch):
    """Every entry is drawn exactly when the number falls into its part of the line."""
    probabilities = torch.tensor([[0.25, 0.0, 0.5, *[0.0] * BLOCK, 0.25]])
    found = {}
    for number in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda *size, number=number, **kwargs: torch.full(size, number, **kwargs))
        found[number] = int(draw(probabilities))
    assert list(found.values()) == [0, 0, 2, 2, BLOCK + 3, BLOCK + 3]


def test_one_draw_a_row_whatever_the_other_rows():
    torch.manual_seed(3)
    alone = torch.cat([draw(torch.full((1, 1000), 1e-3)) for _ in range(8)])
    torch.manual_seed(3)
    assert torch.equal(draw(torch.full((8, 1000), 1e-3)), alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_distribution_is_refused(bad):
    rows = torch.full((2, 5), 0.2)
    rows[1, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        draw(rows)
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.zeros(1, 5))
