"""A LoRA layer on a 4-bit weight, leaner than PEFT's: the same sum, less copied, less kept for backward.

    y = x Wᵀ + s (x Aᵀ) Bᵀ        (Hu et al. 2021, arXiv:2106.09685, eq. 3; W is NF4, dequantised when it is used)

All products are in the base's 16-bit type, as PEFT's are under bf16 autocast; without, PEFT multiplies the adapter's
part in fp32, as is done here for a token at a time. Both parts are added in the type of x, so that a small adapter is
not rounded away beside the base.
Backward keeps x in 16 bits, and x Aᵀ. `LEAN` off is PEFT's own path, which it is tested against.
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
from transformers import PreTrainedModel

from lowrank_rlhf import memory

LEAN = True
BLOCKED_FOR = 16  # rows of a product
Factors = tuple[Tensor, Tensor, float]  # A, B and s


def use_lean_layers(model: nn.Module) -> None:
    """Give every LoRA layer on a 4-bit weight of `model` the forward of this module."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLinear4bit)]
    for layer in layers:
        if not hasattr(layer, "peft_forward"):
            layer.peft_forward = layer.forward
            layer.settled = None
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
    if LEAN and layer.settled is not None and x.shape[-2] == 1 and adapter_names is None and not args and not kwargs:
        return _with_bias(_one_token(x, *layer.settled), layer.settled[0])
    base, roles = layer.base_layer, _roles(layer, adapter_names)
    if LEAN and layer.disable_adapters and not torch.is_grad_enabled() and not args and not kwargs:
        return _with_bias(base_product(base, _cast(x, base.compute_dtype)).to(x.dtype), base)
    if not LEAN or args or kwargs or not roles:
        if adapter_names is not None:
            kwargs["adapter_names"] = adapter_names
        return layer.peft_forward(x, *args, **kwargs)
    if adapter_names is not None:
        y = _mixed(x, base, adapter_names, {role: _factors(layer, role) for role in roles})
    elif torch.is_grad_enabled():
        y = _LoraLinear.apply(x, base, *_factors(layer, roles[0]))
    elif x.shape[-2] == 1:
        y = _one_token(x, base, *_factors(layer, roles[0]))
    else:
        y = _sum(x, base, *_factors(layer, roles[0]))[0]
    return _with_bias(y, base)


def _with_bias(y: Tensor, base: Any) -> Tensor:
    bias = base.bias
    return y if bias is None else y + bias.to(y.dtype)


def _roles(layer: Any, adapter_names: list[str] | None) -> list[str]:
    """The adapters that are applied here, one to a row; none where it takes PEFT's own forward to apply them."""
    if layer.disable_adapters or (adapter_names is None and len(layer.active_adapters) > 1):
        return []
    names = layer.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
    roles = [name for name in names if name in layer.lora_A]
    plain = all(
        role not in layer.lora_variant
        and not layer.lora_bias.get(role)
        and (isinstance(layer.lora_dropout[role], nn.Identity) or not layer.training)
        for role in roles
    )
    return roles if plain else []


def _factors(layer: Any, role: str) -> Factors:
    if layer.settled is not None:
        return layer.settled[1:]
    return layer.lora_A[role].weight, layer.lora_B[role].weight, layer.scaling[role]


@contextmanager
def settled(model: PreTrainedModel, role: str | None) -> Iterator[None]:
    """Inside the block no weight changes and this role, which is on, stays on: no layer asks again which one it is, 8 %
    of a token's time on a CPU, and A and B are in the model's type."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLinear4bit)]
    for layer in layers:
        if role is not None and _roles(layer, None) == [role]:
            a, b, scaling = _factors(layer, role)
            layer.settled = (layer.base_layer, a.detach().to(model.dtype), b.detach().to(model.dtype), scaling)
    try:
        yield
    finally:
        for layer in layers:
            layer.settled = None


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
        rows = upstream.flatten(0, -2)
        through = (rows @ b.to(cast.dtype)).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = upstream @ base_weight(ctx.base, cast.dtype)
            grad_x.view(-1, grad_x.shape[-1]).addmm_(through, a.to(cast.dtype))
            grad_x = grad_x.to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_a = (through.T @ cast.flatten(0, -2)).to(a.dtype)
        if ctx.needs_input_grad[3]:
            grad_b = (rows.T @ inner).to(b.dtype).mul_(ctx.scaling)
        return grad_x, None, grad_a, grad_b, None


def _sum(x: Tensor, base: Any, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """x Wᵀ + s (x Aᵀ) Bᵀ, x in the compute type, and x Aᵀ with one row a token."""
    cast = _cast(x, base.compute_dtype)
    inner = cast.flatten(0, -2) @ a.to(cast.dtype).T
    y = base_product(base, cast).to(x.dtype)
    y.view(-1, y.shape[-1]).add_(inner @ b.to(cast.dtype).T, alpha=scaling)
    return y, cast, inner


def _one_token(x: Tensor, base: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The same sum where x is (rows, 1, size), without a gradient. The adapter's part is in the type of x: products as
    small as these are faster in fp32 on a CPU, and nothing is cast."""
    y = base_product(base, _cast(x, base.compute_dtype)).to(x.dtype)
    y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2) @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scaling)
    return y


@torch.no_grad()
def _mixed(x: Tensor, base: Any, names: list[str], adapters: dict[str, Factors]) -> Tensor:
    """The same sum, row i with the i-th name's adapter, or with none where that is not among them; no gradient."""
    cast = _cast(x, base.compute_dtype)
    y = base_product(base, cast).to(x.dtype)
    read = x if x.shape[-2] == 1 else cast  # as without a mix
    for role, (a, b, scaling) in adapters.items():
        rows = [i for i, name in enumerate(names) if name == role]
        change = (read[rows].flatten(0, -2) @ a.to(read.dtype).T) @ b.to(read.dtype).T
        y[rows] = y[rows].add_(change.view(len(rows), *y.shape[1:]), alpha=scaling)
    return y


_last: tuple[Any, int, Tensor] | None = None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; the layers that read one tensor, as q, k and v do, share one copy."""
    global _last
    if x.dtype == dtype:
        return x
    if x.is_inference():  # has no version by which a change in place would be noticed
        return x.to(dtype)
    last = _last  # another thread may write it
    if last is not None and last[0]() is x and last[1] == x._version and last[2].dtype == dtype:
        return last[2]
    cast = x.to(dtype)
    _last = (weakref.ref(x), x._version, cast)
    return cast


def base_product(base: Any, x: Tensor) -> Tensor:
    """x Wᵀ in the type of x, by bitsandbytes unless the weight is at hand."""
    blocked = getattr(base, "blocked", None)
    if blocked is not None:
        return torch.ops.mkldnn._linear_pointwise.default(x, blocked, None, "none", [], "")
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


@contextmanager
def blocked(model: nn.Module) -> Iterator[None]:
    """Inside the block unpacked weights lie in oneDNN's blocks instead, where there is oneDNN: for no gradient.

    A token of 16 rows takes a tenth less time. The sums may be rounded otherwise, in bf16.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) and _can_block(m)]
    for layer in layers:
        layer.blocked = torch.ops.mkldnn._reorder_linear_weight(layer.unpacked, BLOCKED_FOR)
        layer.unpacked = None
    try:
        yield
    finally:
        for layer in layers:
            layer.blocked, layer.unpacked = None, dequantize(layer, layer.compute_dtype)


def _can_block(layer: Any) -> bool:
    weight = getattr(layer, "unpacked", None)
    if weight is None or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
