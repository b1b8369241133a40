"""Does 4-bit training compute the right thing on this machine? One layer against its own dequantised weights."""

from dataclasses import dataclass

# bf16 keeps 8 significant bits, so one rounding is off by at most 2⁻⁸. Forward and backward each round three times
# (the input, the weight, the result): never above 3 · 2⁻⁸, measured 0.8 · 2⁻⁸. A lost gradient is off by 1.
TOLERANCE = 4 * 2**-8

ROWS = 16  # of every input; the layer widths are multiples of 64, one NF4 block


@dataclass(frozen=True)
class SelfTest:
    """Relative errors ‖ours − exact‖ / ‖exact‖ of one NF4 layer, in the order in which they were measured.

    Attributes:
        forward: of a training forward.
        gradient: of its gradient with respect to the input; 1 where none arrives.
        generation: of an eval-mode forward without gradients, as in a rollout.
        forward_after: of a training forward after that.
        gradient_after: of its gradient. The only one that bitsandbytes' repacking for AVX512-BF16 falsifies.
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
        return all(error <= TOLERANCE for error in self.errors.values())  # nan is not
