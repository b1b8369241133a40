"""A LoRA layer on a 4-bit weight, leaner than PEFT's: the same sum to the bit, less copied, less kept for backward.

    y = x Wᵀ + s (x Aᵀ) Bᵀ        (Hu et al. 2021, arXiv:2106.09685, eq. 3; W is NF4, dequantised when it is used)

Forward does PEFT's operations but for the copies between them, so roles give plain PEFT's logits. Backward keeps x in
the base's 16-bit type and x Aᵀ, and multiplies in that type, where PEFT's multiplies the adapter's part in fp32. `LEAN`
off is PEFT's own path, which it is tested against.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from lowrank_rlhf import memory

LEAN = True


def use_lean_layers(model: nn.Module) -> None:
    """Give every LoRA layer on a 4-bit weight of `model` the forward of this module."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLinear4bit)]
    for layer in layers:
        if not hasattr(layer, "peft_forward"):
            layer.peft_forward = layer.forward
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not LEAN or args or kwargs or layer.disable_adapters or not _is_plain(layer):
        return layer.peft_forward(x, *args, **kwargs)
    role, base = layer.active_adapters[0], layer.base_layer
    a, b, scaling = layer.lora_A[role].weight, layer.lora_B[role].weight, layer.scaling[role]
    y = _LoraLinear.apply(x, base, a, b, scaling) if torch.is_grad_enabled() else _sum(x, base, a, b, scaling)[0]
    return y if base.bias is None else y + base.bias.to(y.dtype)


def _is_plain(layer: Any) -> bool:
    """One LoRA, without dropout, bias or variant."""
    if len(layer.active_adapters) != 1:
        return False
    role = layer.active_adapters[0]
    return (
        role in layer.lora_A
        and role not in layer.lora_variant
        and not layer.lora_bias.get(role)
        and (isinstance(layer.lora_dropout[role], nn.Identity) or not layer.training)
    )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        y, cast, inner = _sum(x, base, a, b, scaling)
        ctx.base, ctx.scaling, ctx.dtype = base, scaling, x.dtype
        ctx.save_for_backward(cast, inner, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        cast, inner, a, b = ctx.saved_tensors
        upstream = _cast(grad, cast.dtype)
        through = linear(upstream, b.T.to(cast.dtype)).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _add_product(
                (upstream @ base_weight(ctx.base, cast.dtype)).to(ctx.dtype), through.to(ctx.dtype), a
            )
        if ctx.needs_input_grad[2]:
            grad_a = (through.flatten(0, -2).T @ cast.flatten(0, -2)).to(a.dtype)
        if ctx.needs_input_grad[3]:
            inner = inner.flatten(0, -2).to(cast.dtype)
            grad_b = (upstream.flatten(0, -2).T @ inner).to(b.dtype).mul_(ctx.scaling)
        return grad_x, None, grad_a, grad_b, None


def _sum(x: Tensor, base: Any, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """x Wᵀ + s (x Aᵀ) Bᵀ, x in the compute type, and x Aᵀ."""
    cast = _cast(x, base.compute_dtype)
    inner = linear(x.to(a.dtype), a)
    y = base_product(base, cast).to(x.dtype)
    return y.add_(linear(inner, b).mul_(scaling).to(x.dtype)), cast, inner


def _add_product(y: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """y + scaling · left · right, in the place of y: where y is fp32, so is the sum."""
    y.view(-1, y.shape[-1]).addmm_(left.flatten(0, -2), right.to(y.dtype), alpha=scaling)
    return y


_last: tuple[Any, int, Tensor] | None = None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; the layers that read one tensor, as q, k and v do, share one copy."""
    global _last
    if x.dtype == dtype:
        return x
    last = _last  # another thread may write it
    if last is not None and last[0]() is x and last[1] == x._version and last[2].dtype == dtype:
        return last[2]
    cast = x.to(dtype)
    _last = (weakref.ref(x), x._version, cast)
    return cast


def base_product(base: Any, x: Tensor) -> Tensor:
    """x Wᵀ in the type of x, by bitsandbytes unless the weight is at hand."""
    weight = getattr(base, "unpacked", None)
    if weight is not None:
        return linear(x, weight)
    return bnb.matmul_4bit(x, base.weight, quant_state=base.weight.quant_state)


def base_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """W, dequantised."""
    weight = getattr(base, "unpacked", None)
    return dequantize(base, dtype) if weight is None else weight


def dequantize(base: Any, dtype: torch.dtype) -> Tensor:
    """The values that a 4-bit weight stands for, rounded once."""
    state = base.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        base.weight.data, absmax.float(), state.blocksize, state.quant_type, list(state.shape), dtype
    )


@contextmanager
def unpacked(model: nn.Module) -> Iterator[bool]:
    """Inside the block every 4-bit weight is there in its compute type too, where that takes at most half of what is
    free: a token at a time, dequantising costs more than the products. Bit by bit the same weights.

    Yields:
        whether it is.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    layers = [layer for layer in layers if getattr(layer, "unpacked", None) is None]  # an outer block's stay
    needed = sum(2 * layer.in_features * layer.out_features for layer in layers)
    fits = bool(layers) and needed <= memory.free_bytes(layers[0].weight.device) // 2
    for layer in layers if fits else ():
        layer.unpacked = dequantize(layer, layer.compute_dtype)
    try:
        yield fits
    finally:
        for layer in layers:
            layer.unpacked = None
