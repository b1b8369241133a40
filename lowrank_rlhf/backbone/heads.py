"""Scalar heads: plain fp32 linear layers outside PEFT and outside bitsandbytes."""

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """hidden (…, H) → one number (…), in fp32 whatever the trunk computes in.

    Starts at zero: scores and values are 0 before training, so a reward model's first loss is exactly log 2. No
    bias, like the score layer of transformers' sequence classifiers, so that the head can become one.

    >>> ScalarHead(4)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float()).squeeze(-1)
