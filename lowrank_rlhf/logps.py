"""Log-probabilities of given tokens from hidden states, without ever holding [B, T, V] logits."""

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from lowrank_rlhf.logps_cpu import Logits, TokenLogps

VOCAB_CHUNK = 4096  # columns of lm_head at a time: the tile stays in cache, twice as fast as 32768 on CPU


def chunked_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target token, the entropy of its distribution, and whether none is likelier.

    z = softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature;  logp = z_target − logsumexp z. One chunk of
    the vocabulary at a time, by trl's kernel (Triton on CUDA) or, of fp32 states on a CPU, by `logps_cpu`; sums are
    accumulated in fp32 whatever the input type.

    Args:
        hidden: the final hidden state *before* each target. Shape (N, H): flattened, because a sliced
            (B, T, H) view makes the projection a batched product with weight copies (2 s of a 15 s step on CPU).
        lm_head_weight: shape (V, H).
        targets: token ids. Shape (N,).
        fast: multiply fp32 states on a CPU by `fast_products`.

    Returns:
        logps and entropies, nats, fp32, and is_top1, bool; each of shape (N,).

    >>> logps, entropy, _ = chunked_logps(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([3]))
    >>> logps, entropy  # uniform over four tokens: −log 4, log 4
    (tensor([-1.3863]), tensor([1.3863]))
    """
    if hidden.device.type == "cpu" and hidden.dtype == lm_head_weight.dtype == torch.float32:
        logits = Logits(lm_head_weight, bias, temperature, logit_scale, logit_softcap, VOCAB_CHUNK)
        return TokenLogps.apply(hidden, targets, logits, fast)
    logps, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden,
        lm_head_weight,
        bias,
        targets,
        temperature,
        VOCAB_CHUNK,
        logit_softcap,
        logit_scale,
        ("entropy", "is_top1"),
    )
    return logps, entropy, is_top1


def masked_targets(input_ids: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where to read the hidden states that predict the completion, and which tokens they predict.

    Args:
        input_ids: shape (B, T).
        completion_mask: bool, True at completion tokens. Shape (B, T). Column 0 must be False: nothing precedes it.

    Returns:
        before_mask: bool, (B, T), True at the position *before* each completion token.
        targets: the completion tokens in row-major order. Shape (N,).

    >>> before, targets = masked_targets(torch.tensor([[5, 6, 7]]), torch.tensor([[False, True, True]]))
    >>> before.tolist(), targets.tolist()
    ([[True, True, False]], [6, 7])
    """
    return before(completion_mask), input_ids[completion_mask]


def before(completion_mask: Tensor) -> Tensor:
    """bool (B, T), True at the position *before* each completion token.

    Raises:
        ValueError: the first token is one.

    >>> before(torch.tensor([[False, True, True]])).tolist()
    [[True, True, False]]
    """
    if bool(completion_mask[:, 0].any()):
        raise ValueError("completion_mask is True in column 0: the first token has nothing before it to predict it")
    before_mask = torch.zeros_like(completion_mask)
    before_mask[:, :-1] = completion_mask[:, 1:]
    return before_mask
