"""Attention for short sequences on a CPU: plain products, which torch's blocked kernel takes twice as long for.

    softmax(q kᵀ / √d + mask) v        (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)

Forward multiplies by `fast_products`, backward in bf16 as the 4-bit layers beside it do. The weights are kept, so
beyond `MAX_WEIGHTS` of them torch's kernel does it, in linear memory; so it does for one token, since oneDNN keeps code
for every length that it has met, here 135 MiB in a rollout of 128 tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from lowrank_rlhf.products import fast_products

NAME = "lowrank_rlhf_short"
MAX_WEIGHTS = 2**20  # of a layer: 2 MiB to keep


def use_short_attention(model: PreTrainedModel) -> None:
    """Attend by this module where the model would by torch's kernel; other choices are left alone."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: (B, heads, T, d), of keys and values maybe fewer, additive mask → (B, T, heads, d)."""
    rows, heads, length, width = query.shape
    weights = rows * heads * length * key.shape[2]
    if attention_mask is None or dropout or length == 1 or weights > MAX_WEIGHTS:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = width**-0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Queries that share a key head are rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        rows, heads, length, width = query.shape
        q, k, v = query.reshape(rows * key.shape[1], -1, width), key.flatten(0, 1), value.flatten(0, 1)
        with fast_products():
            scores = torch.bmm(q, k.mT)
            scores.view(rows, heads, length, -1).mul_(scale).add_(mask)
            weights = scores.softmax(dim=-1)
            attended = torch.bmm(weights, v)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*(each.bfloat16() for each in (q, k, v, weights)))
        ctx.shapes, ctx.scale = (query.shape, key.shape), scale
        return attended.view(query.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        upstream = grad.reshape(q.shape).bfloat16()
        through = torch.bmm(upstream, v.mT).float()
        scores = torch._softmax_backward_data(through, weights.float(), -1, through.dtype).mul_(ctx.scale).bfloat16()
        of_query, of_key = ctx.shapes
        grads = torch.bmm(scores, k), torch.bmm(scores.mT, q), torch.bmm(weights.mT, upstream)
        shapes = (of_query, of_key, of_key)
        grad_q, grad_k, grad_v = (each.to(grad.dtype).view(shape) for each, shape in zip(grads, shapes, strict=True))
        return grad_q, grad_k, grad_v, None, None
