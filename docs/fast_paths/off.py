"""Any command of lowrank-rlhf with every fast path off: python docs/fast_paths/off.py ppo --config recipes/ppo.yaml …

What is left is plain PEFT layers, torch's attention and fp32 products, trl's log-prob kernel and packed weights.
"""

import sys
from contextlib import nullcontext

from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from lowrank_rlhf import logps, rollout
from lowrank_rlhf.backbone import attention, base, linear, passes
from lowrank_rlhf.cli import main


def turn_off() -> None:
    linear.LEAN = False
    attention.MAX_WEIGHTS = 0
    base.BaseInfo.fast_products = property(lambda info: False)
    passes.unpacked = lambda model: nullcontext(False)
    logps.TokenLogps = Plain
    rollout.draw = lambda probabilities: probabilities.multinomial(1).squeeze(1)


class Plain:
    """trl's kernel under the name of ours."""

    @staticmethod
    def apply(hidden: Tensor, targets: Tensor, logits: logps.Logits, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
        settings = (logits.temperature, logits.chunk, logits.softcap, logits.scale, ("entropy", "is_top1"))
        found = ChunkedLogProbFunction.apply(hidden, logits.weight, logits.bias, targets, *settings)
        return found[0], found[1], found[4]


if __name__ == "__main__":
    turn_off()
    sys.exit(main())
