"""What a forward of the base gives under the role that is on: states, log-probs, scores, values."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_rlhf.backbone.base import BaseInfo, logit_transform
from lowrank_rlhf.backbone.heads import ScalarHead
from lowrank_rlhf.backbone.linear import unpacked
from lowrank_rlhf.logps import before, chunked_logps, masked_targets
from lowrank_rlhf.out_of_memory import LEARN, SCORE, MostRows

T = TypeVar("T")
Outputs = tuple[Tensor, ...]


class Passes:
    """The passes of a Backbone. Gradient flows to whatever learns; no pass ever holds (B, T, V) logits.

    All but `hidden` take as many rows at a time as there is memory for; see `out_of_memory`.
    """

    model: PreTrainedModel
    info: BaseInfo
    heads: nn.ModuleDict
    most_rows: MostRows
    _trainable: frozenset[str]

    def learn(self, rows: int, work: Callable[[], T]) -> T:
        """Forward and backward of a micro-batch: where memory runs out, again in smaller pieces, as if nothing was.

        Args:
            rows: of its forward.
            work: adds to the gradients of what learns; whatever else it changes it is to change last.
        """
        learned = [parameter for role in self._trainable for parameter in self.parameters(role)]
        return self.most_rows.again(LEARN, rows, work, learned)

    def parameters(self, role: str) -> list[nn.Parameter]:
        raise NotImplementedError

    def _recompute_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        raise NotImplementedError

    def unpacked(self) -> AbstractContextManager[bool]:
        """Inside the block the 4-bit weights are also in memory in 16 bit, if that fits: for generating."""
        return unpacked(self.model)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None) -> Tensor:
        """Final hidden states under the role that is on. (B, T) ids and bool mask → (B, T, H).

        Args:
            position_ids: of packed rows, shape (B, T): each document counts from 0 and sees itself alone. The mask is
                then None.
        """
        trunk = self.model.base_model
        mask = None if attention_mask is None else attention_mask.long()
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        return trunk(**inputs, use_cache=False).last_hidden_state

    def completion_logps(
        self, hidden: Tensor, input_ids: Tensor, completion_mask: Tensor, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `chunked_logps` says of each completion token, in row-major order.

        lm_head is applied to completion positions only, flattened, in vocabulary chunks: no (B, T, V) tensor exists.

        Args:
            hidden: final hidden states, shape (B, T, H).
            input_ids: shape (B, T).
            completion_mask: bool, shape (B, T), False in column 0.

        Returns:
            logps, entropies and is_top1, each of shape (N,).
        """
        before_mask, targets = masked_targets(input_ids, completion_mask)
        scale, softcap = logit_transform(self.model.config)
        lm_head: Any = self.model.get_output_embeddings()
        return chunked_logps(
            hidden[before_mask],
            lm_head.weight,
            targets,
            bias=lm_head.bias,
            temperature=temperature,
            logit_scale=scale,
            logit_softcap=softcap,
            fast=self.info.fast_products,
        )

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        completion_mask: Tensor,
        *,
        position_ids: Tensor | None = None,
        temperature: float = 1.0,
        value_role: str | None = None,
    ) -> Outputs:
        """`completion_logps` of one forward, and behind them the values of `value_role`'s head; shape (N,) each.

        Args:
            position_ids: of packed rows, (1, T) all in one; memory then takes so many documents at a time.
        """

        def work(ids: Tensor, mask: Tensor | None, learned: Tensor, positions: Tensor | None) -> Outputs:
            hidden = self.hidden(ids, mask, positions)
            found = self.completion_logps(hidden, ids, learned, temperature=temperature)
            return found if value_role is None else (*found, self.heads[value_role](hidden[before(learned)]))

        inputs = (input_ids, attention_mask, completion_mask, position_ids)
        if position_ids is None or len(input_ids) > 1:
            return self._by_rows(work, *inputs)
        first = documents(position_ids)
        ends = [*first[1:], input_ids.shape[1]]
        return self._in_pieces(work, len(first), lambda piece: _columns(inputs, first[piece][0], ends[piece][-1]))

    def token_logps(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each completion token under the role that is on.

        Args:
            input_ids: shape (B, T).
            attention_mask: bool, shape (B, T).
            completion_mask: bool, shape (B, T), False in column 0.

        Returns:
            token_logps and entropies, nats, fp32, shape (B, T), 0 outside the completion.
        """
        logps, entropy, _ = self.read(input_ids, attention_mask, completion_mask, temperature=temperature)
        zeros = logps.new_zeros(completion_mask.shape)
        return zeros.masked_scatter(completion_mask, logps), zeros.masked_scatter(completion_mask, entropy)

    def scores(self, role: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the role's head says of each row, whatever the padding side. Shape (B,)."""
        head = cast(ScalarHead, self.heads[role])

        def work(ids: Tensor, mask: Tensor) -> Outputs:
            return (head.score(self.hidden(ids, mask), mask),)

        return self._by_rows(work, input_ids, attention_mask)[0]

    def values(self, role: str, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """The role's head at the state *before* each completion token. Shape (B, T), 0 outside the completion."""

        def work(ids: Tensor, mask: Tensor, completion: Tensor) -> Outputs:
            return (self.heads[role](self.hidden(ids, mask)[before(completion)]),)

        (values,) = self._by_rows(work, input_ids, attention_mask, completion_mask)
        return values.new_zeros(completion_mask.shape).masked_scatter(completion_mask, values)

    def _by_rows(self, work: Callable[..., Outputs], *inputs: Tensor | None) -> Outputs:
        """`work(*inputs)`, whose outputs begin with those of the first row."""
        assert inputs[0] is not None
        return self._in_pieces(work, len(inputs[0]), lambda piece: [x if x is None else x[piece] for x in inputs])

    def _in_pieces(
        self, work: Callable[..., Outputs], rows: int, part: Callable[[slice], list[Tensor | None]]
    ) -> Outputs:
        """What `work` says of the parts of the rows, one behind the other.

        Where a gradient is to flow, backward computes each piece once more, under the role that is on now; and memory
        that runs out is the caller's, who knows what is to be undone.
        """
        if torch.is_grad_enabled():
            pieces = self.most_rows.pieces(LEARN, rows)
            if len(pieces) == 1:
                return work(*part(pieces[0]))
            # Tensors by themselves, not inside `work`: of their device torch keeps the random state, for dropout
            how: Any = {"use_reentrant": False, "context_fn": self._recompute_contexts}
            found = [checkpoint(work, *part(piece), **how) for piece in pieces]
        else:
            found = self.most_rows.each(SCORE, rows, lambda piece: work(*part(piece)))
        return found[0] if len(found) == 1 else tuple(torch.cat(outputs) for outputs in zip(*found, strict=True))


def documents(position_ids: Tensor) -> list[int]:
    """The columns where those of a packed row begin.

    >>> documents(torch.tensor([[0, 1, 2, 0, 1]]))
    [0, 3]
    """
    return list((position_ids[0] == 0).nonzero().flatten().tolist())


def _columns(inputs: tuple[Tensor | None, ...], first: int, end: int) -> list[Tensor | None]:
    return [x if x is None else x[:, first:end] for x in inputs]
