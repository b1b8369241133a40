"""Does 4-bit training compute the right thing on this machine? Single layers against their dequantised weights."""

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from lowrank_rlhf.backbone.base import _nf4, keep_autograd_on_cpu, pick_device, pick_dtype

# bf16 keeps 8 significant bits, so one rounding is off by at most 2⁻⁸. Forward and backward each round three times
# (input, weight, result): never above about 3 · 2⁻⁸, measured 0.8 · 2⁻⁸. A gradient that is lost is off by 1.
TOLERANCE = 4 * 2**-8

SHAPES = ((64, 64), (128, 256))  # in, out
ROWS = 16


@dataclass(frozen=True)
class SelfTest:
    """Relative errors ‖ours − exact‖ / ‖exact‖, the worst of all layers, in the order they were measured in.

    Attributes:
        device: where.
        forward: of a training forward.
        gradient: of its gradient with respect to the input; 1 where none arrives.
        generation: of an eval-mode forward without gradients, as in a rollout.
        forward_after: of the next training forward.
        gradient_after: of its gradient: the one that bitsandbytes' repacking for AVX512-BF16 falsifies.
    """

    device: str
    forward: float
    gradient: float
    generation: float
    forward_after: float
    gradient_after: float

    @property
    def errors(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "device"}

    @property
    def ok(self) -> bool:
        return all(error <= TOLERANCE for error in self.errors.values())  # a nan is not


def four_bit_self_test(device: str = "auto", *, keep_autograd: bool = True) -> SelfTest:
    """NF4 layers as `load_base` makes them, before and after generating.

    Args:
        device: as `base.device`.
        keep_autograd: False leaves out `keep_autograd_on_cpu`, to show what that is for.

    Raises:
        UserError: the device does not exist here.

    >>> four_bit_self_test("cpu").ok
    True
    """
    target = pick_device(device)
    measured = [_measure(n_in, n_out, target, keep_autograd) for n_in, n_out in SHAPES]
    return SelfTest(str(target), *(float(error) for error in torch.tensor(measured).amax(dim=0)))


def has_avx512bf16() -> bool:
    """How bitsandbytes decides whether a `Linear4bit` may be repacked."""
    return bool(bnb.functional.has_avx512bf16())


def _measure(n_in: int, n_out: int, device: torch.device, keep_autograd: bool) -> list[float]:
    dtype = pick_dtype(device)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    layer = _layer(torch.randn(n_out, n_in, generator=generator), dtype).to(device)
    if keep_autograd:
        keep_autograd_on_cpu(layer)
    # Before the first forward, which may repack it
    packed: Any = layer.weight
    weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()
    before = _training_errors(layer, weight, draw(ROWS, n_in), draw(ROWS, n_out))
    layer.eval()
    inputs = draw(ROWS, n_in)
    with torch.no_grad():
        generation = _relative_error(layer(inputs), inputs.float() @ weight.T)
    after = _training_errors(layer, weight, draw(ROWS, n_in), draw(ROWS, n_out))
    return [*before, generation, *after]


def _layer(weight: Tensor, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    config = _nf4(dtype)
    # Built on meta: no random numbers of the caller are used up
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=config.bnb_4bit_compute_dtype, device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
    )
    return layer


@torch.enable_grad()
def _training_errors(layer: bnb.nn.Linear4bit, weight: Tensor, inputs: Tensor, upstream: Tensor) -> list[float]:
    """Of outputs = inputs · Wᵀ and of its gradient upstream · W."""
    layer.train()
    inputs.requires_grad_()
    outputs = layer(inputs)
    # A path that autograd lost counts as the zero that an optimizer would see
    (gradient,) = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)
    exact = inputs.detach().float() @ weight.T
    return [_relative_error(outputs.detach(), exact), _relative_error(gradient, upstream.float() @ weight)]


def _relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())
