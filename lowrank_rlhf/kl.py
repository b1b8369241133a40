"""Estimators of KL(policy ‖ reference) from sampled tokens, and nothing else."""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k3"]


def kl_per_token(token_logps: Tensor, reference_token_logps: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) at tokens sampled from the policy, in nats.

    With log r = log π_ref − log π: k1 = −log r, unbiased, may be negative; k3 = (r − 1) − log r, unbiased, never
    negative, lower variance. Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).

    Args:
        token_logps: log-probability of each sampled token under the policy, nats. Shape (B, T).
        reference_token_logps: the same tokens under the reference, nats. Shape (B, T).
        estimator: "k1" or "k3".

    Returns:
        Shape (B, T), nats. Positions outside the completion are whatever the inputs make them: mask afterwards.

    >>> policy, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -3.0]])
    >>> kl_per_token(policy, reference, "k1")
    tensor([[0., 1.]])
    >>> kl_per_token(policy, reference, "k3")  # e^-1 − 1 + 1
    tensor([[0.0000, 0.3679]])
    """
    log_ratio = reference_token_logps - token_logps
    if estimator == "k1":
        return token_logps - reference_token_logps
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"estimator must be 'k1' or 'k3', not {estimator!r}")
