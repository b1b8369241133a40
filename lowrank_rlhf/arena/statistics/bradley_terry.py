"""The Bradley–Terry model: strengths from who beat whom, also where somebody never lost or two groups never met."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

VIRTUAL_DRAW = 0.5
NEWTON_STEPS = 100
LONGEST_STEP = 1.0
TAIL = 0.025


def fit(wins: Floats, groups: NDArray[np.intp]) -> Floats:
    """Maximum-likelihood strengths of the Bradley–Terry model, for many tables of wins at once.

    P(i beats j) = σ(θ_i − θ_j), a tie half a win each; Bradley and Terry 1952, doi:10.2307/2334029. Newton's method on
    the concave log-likelihood finds the maximum that Hunter's MM iteration climbs to (2004, doi:10.1214/aos/1079120141)
    in fewer steps. A maximum exists only where everybody has lost to everybody else, if through others (Ford 1957).
    One virtual draw of weight 0.5 between every two players of a group keeps it finite where somebody is undefeated.

    Args:
        wins: of the row's player against the column's, weighted, ties half. Shape (R, P, P).
        groups: of each player; nothing is assumed between groups, each has mean 0. Shape (P,).

    Returns:
        θ, log-odds. Shape (R, P).

    >>> wins = np.array([[[0.0, 2.75], [0.75, 0.0]]])  # with the virtual draw 3 : 1
    >>> fit(wins, np.array([0, 0])).round(4).tolist()  # ± log(3)/2
    [[0.5493, -0.5493]]
    """
    together = (groups[:, None] == groups[None, :]) & ~np.eye(len(groups), dtype=bool)
    won = np.where(together, wins + VIRTUAL_DRAW / 2, 0.0)
    met = won + won.swapaxes(1, 2)
    total = won.sum(axis=2)
    same = (groups[:, None] == groups[None, :]).astype(np.float64)
    theta = np.zeros(total.shape)
    for _ in range(NEWTON_STEPS):
        expected = probabilities(theta)
        gradient = total - (met * expected).sum(axis=2)
        information = met * expected * (1 - expected)
        # The likelihood does not change when a group shifts as a whole: `same` makes the matrix invertible there
        hessian = same - information
        diagonal = np.arange(len(groups))
        hessian[:, diagonal, diagonal] += information.sum(axis=2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # Bounded: far from the maximum the curvature vanishes and a full step would overshoot
        longest = np.abs(step).max(axis=1, keepdims=True)
        theta += step * np.minimum(1.0, LONGEST_STEP / np.maximum(longest, 1e-300))
        if longest.max() < 1e-9:
            break
    return theta - (theta @ same) / same.sum(axis=0)


def probabilities(theta: Floats) -> Floats:
    """σ(θ_i − θ_j). Shape (…, P) in, (…, P, P) out.

    >>> probabilities(np.array([np.log(3.0), 0.0]))[0, 1].round(4)
    np.float64(0.75)
    """
    return np.asarray(0.5 * (1 + np.tanh((theta[..., :, None] - theta[..., None, :]) / 2)))


def groups_of(wins: Floats) -> NDArray[np.intp]:
    """The number of each player's group: who is connected by comparisons, if through others. Shape (P, P) in, (P,) out.

    >>> groups_of(np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])).tolist()
    [0, 0, 0, 1]
    """
    reached = reaches((wins + wins.T) > 0)
    first = reached.argmax(axis=1)
    return np.unique(first, return_inverse=True)[1]


def reaches(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which player is reached from which along edges, each from itself too. Shape (P, P)."""
    reached = edges | np.eye(len(edges), dtype=bool)
    while True:
        further = (reached.astype(np.float64) @ reached.astype(np.float64)) > 0
        if (further == reached).all():
            return reached
        reached = further


def never_lost(wins: Floats) -> list[NDArray[np.bool_]]:
    """The smallest sets of players that beat some outside and took not even half a point's loss; (P,) masks.

    One undefeated player is such a set; so are two that beat each other now and then, and everybody else always.
    Their distance to the rest has no upper end.

    >>> [found.tolist() for found in never_lost(np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))]
    [[True, False, False]]
    """
    reached = reaches(wins > 0)
    sets = []
    for i in range(len(wins)):
        members = reached[i] & reached[:, i]
        beaten_by = reached[:, i] & ~members
        if members.argmax() == i and not beaten_by.any() and (wins[members][:, ~members] > 0).any():
            sets.append(members)
    return sets


def lowest_plausible(theta: Floats, wins: Floats, members: NDArray[np.bool_]) -> float:
    """How far down a set that never lost may be shifted until its record is as unlikely as 2.5 %.

    The δ with Π σ(θ_i + δ − θ_j)^w_ij = 0.025 over the members' wins outside: the exact one-sided bound of a record
    without a loss (Clopper and Pearson 1934), the others' strengths taken as known. A bootstrap says nothing there:
    every resample is without a loss too.

    Args:
        theta: shape (P,).
        wins: independent ones, so at most one per prompt. Shape (P, P).

    Returns:
        δ, at most 0.

    >>> even = np.zeros(2)
    >>> shift = lowest_plausible(even, np.array([[0.0, 5.0], [0.0, 0.0]]), np.array([True, False]))
    >>> round((1 / (1 + np.exp(-shift))) ** 5, 6)
    np.float64(0.025)
    """
    gaps = (theta[:, None] - theta[None, :])[members][:, ~members]
    weights = wins[members][:, ~members]

    def log_probability(shift: float) -> float:
        return -float((weights * np.logaddexp(0.0, -(gaps + shift))).sum())

    low, high = -100.0, 0.0
    if log_probability(high) < np.log(TAIL):  # the fit itself is shrunk below the bound
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if log_probability(middle) < np.log(TAIL) else (low, middle)
    return high
