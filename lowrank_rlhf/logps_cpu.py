"""The log-prob kernel of a CPU: what trl's does, with the gradient's sums taken in the forward.

    ∇_h log p_t = s_t W_t − Σ_v p_v s_v W_v,        s_v = dz_v / d(h W_vᵀ)

The sum over the vocabulary needs each product once where a backward that recomputes the logits needs it twice, and is
rescaled as the maximum moves on (Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_rlhf.products import fast_products

ROWS = 1024  # states at a time, so that a tile of logits has a bound


class Logits(NamedTuple):
    """How logits z come from states: softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    scale: float
    softcap: float | None
    chunk: int

    def tiles(self, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor | float]]:
        """First token, W, z and s of each chunk of the vocabulary; shapes (v, H), (n, v), and (n, v) or none."""
        slope = self.scale / self.temperature
        for first in range(0, len(self.weight), self.chunk):
            weight = self.weight[first : first + self.chunk]
            z = hidden @ weight.T
            if self.bias is not None:
                z.add_(self.bias[first : first + self.chunk])
            if self.softcap is None:
                yield first, weight, z if slope == 1 else z.mul_(slope), slope
            else:
                capped = z.mul_(self.scale / self.softcap).tanh_()
                yield first, weight, capped * (self.softcap / self.temperature), (1 - capped * capped) * slope


class TokenLogps(torch.autograd.Function):
    """(N, H) fp32 states → logps, entropies and is_top1, shape (N,) each. The weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logits: Logits, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.logits, ctx.fast = logits, fast
        with fast_products(fast):
            parts = [
                _statistics(states, ids, logits, ctx.needs_input_grad[0])
                for states, ids in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
            ]
        logps, entropy, is_top1, log_sum, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, log_sum, entropy, gradient)
        ctx.mark_non_differentiable(is_top1)
        return logps, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        hidden, log_sum, entropy, gradient = ctx.saved_tensors
        found = torch.zeros_like(hidden) if grad_logps is None else grad_logps.unsqueeze(1) * gradient
        if grad_entropy is not None:
            total, mean = log_sum.unsqueeze(1), (log_sum - entropy).unsqueeze(1)
            with fast_products(ctx.fast):
                for rows in torch.arange(len(hidden)).split(ROWS):
                    part = _entropy_gradient(hidden[rows], total[rows], mean[rows], ctx.logits)
                    found[rows] += grad_entropy[rows].unsqueeze(1) * part
        return found, None, None, None


def _statistics(hidden: Tensor, targets: Tensor, logits: Logits, learns: bool) -> tuple[Tensor, ...]:
    """logps, entropies, is_top1 and log Σ exp z, shape (n,); ∇_h logps, shape (n, H), empty unless it `learns`."""
    top = hidden.new_full((len(hidden), 1), -torch.inf)
    total, moment, chosen, chosen_slope = (torch.zeros_like(top) for _ in range(4))
    sums = torch.zeros_like(hidden if learns else hidden[:, :0])
    for first, weight, z, slope in logits.tiles(hidden):
        before, top = top, torch.maximum(top, z.amax(dim=1, keepdim=True))
        shrink = (before - top).exp_()
        p = (z - top).exp_()
        total = total * shrink + p.sum(dim=1, keepdim=True)
        moment = moment * shrink + (p * z).sum(dim=1, keepdim=True)
        here = ((targets >= first) & (targets < first + len(weight))).unsqueeze(1)
        column = (targets - first).clamp(0, len(weight) - 1).unsqueeze(1)
        chosen = torch.where(here, z.gather(1, column), chosen)
        if learns:
            slopes = slope.gather(1, column) if isinstance(slope, Tensor) else torch.full_like(chosen, slope)
            chosen_slope = torch.where(here, slopes, chosen_slope)
            sums = (sums * shrink).addmm_(p * slope if isinstance(slope, Tensor) else p, weight)
    log_sum = top + total.log()
    if learns:
        plain = logits.scale / logits.temperature if logits.softcap is None else 1.0
        sums = chosen_slope * logits.weight[targets] - sums * (plain / total)
    found = (chosen - log_sum, log_sum - moment / total, chosen >= top, log_sum)
    return (*(each.squeeze(1) for each in found), sums)


def _entropy_gradient(hidden: Tensor, log_sum: Tensor, mean: Tensor, logits: Logits) -> Tensor:
    """∇_h H = −Σ_v p_v (z_v − Σ p z) s_v W_v, shape (n, H), from logits that are computed once more."""
    sums = torch.zeros_like(hidden)
    for _, weight, z, slope in logits.tiles(hidden):
        sums.addmm_((z - log_sum).exp_() * (mean - z) * slope, weight)
    return sums
