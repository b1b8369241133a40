"""Scalar heads: plain fp32 linear layers outside PEFT and outside bitsandbytes."""

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["last", "mean"]


class ScalarHead(nn.Module):
    """hidden (…, H) → one number (…), in fp32 whatever the trunk computes in.

    Starts at zero: scores and values are 0 before training, so a reward model's first loss is exactly log 2. No
    bias, like the score layer of transformers' sequence classifiers, so that the head can become one.

    Args:
        pooling: the state that a sequence's score is read from, its `last` attended one or their `mean`.

    >>> ScalarHead(4)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, hidden_size: int, pooling: Pooling = "last"):
        super().__init__()
        self.pooling: Pooling = pooling
        self.linear = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)

    def score(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """One number a sequence, whatever the padding side. (B, T, H) and bool (B, T) → (B,).

        >>> head = ScalarHead(1, "mean")
        >>> _ = nn.init.ones_(head.linear.weight)
        >>> hidden, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])
        >>> head.score(hidden, mask), ScalarHead(1).score(hidden, mask)
        (tensor([2.], grad_fn=<SqueezeBackward1>), tensor([0.], grad_fn=<SqueezeBackward1>))
        """
        mask = attention_mask.bool()
        if self.pooling == "mean":
            total = (hidden.float() * mask.unsqueeze(-1)).sum(dim=1)
            return self(total / mask.sum(dim=1, keepdim=True))
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, columns, -1).argmax(dim=1)
        return self(hidden[torch.arange(len(last), device=last.device), last])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float()).squeeze(-1)
