"""Several speakers answer at once: one batch, one forward per token, an adapter and a sampler of its own per row."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from lowrank_rlhf.arena.votes.records import Decoding
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Rollout
from lowrank_rlhf.data.batches import pad_left
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rollout import sampling_warpers, state_argument

# Columns of the prompts that one forward reads: a stop is heard between two, and attention masks stay small
PREFILL_COLUMNS = 512


@dataclass
class Row:
    """One answer that is being written.

    Attributes:
        role: on the backbone; None is the bare base.
        completion: token ids so far, the end-of-turn token included.
        ended: by an end-of-turn token.
    """

    role: str | None
    prompt: list[int]
    decoding: Decoding
    stop_ids: Sequence[int]
    completion: list[int] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.decoding.seed)

    @property
    def done(self) -> bool:
        return self.ended or len(self.completion) >= self.decoding.max_new_tokens

    def take(self, logits: Tensor) -> int:
        """The next token, from fp32 logits (V,) on the CPU; what it draws depends on nothing beside this row."""
        logits = logits - logits.max()
        if logits.isnan().any():
            raise UserError("its logits are not numbers; is the adapter damaged, or did its training diverge?")
        if self.decoding.temperature == 0:
            token = int(logits.argmax())
        else:
            logits = logits.unsqueeze(0)
            settings = Rollout(temperature=self.decoding.temperature, top_p=self.decoding.top_p)
            for warp in sampling_warpers(settings):
                logits = warp(None, logits)  # these read no ids
            token = int(torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=self.generator))
        self.completion.append(token)
        self.ended = token in self.stop_ids
        return token


class Batch:
    """Rows that grow together; one that is done leaves the batch and its cache.

    Between `step`s the model carries this batch's adapters: `close` takes them off, whatever happened before.
    """

    def __init__(self, backbone: Backbone, rows: Sequence[Row]):
        self.backbone, self.rows = backbone, list(rows)
        model = backbone.model
        self.state_name = state_argument(model)
        self.state: DynamicCache | None = DynamicCache(config=model.config)
        ids, mask = pad_left([row.prompt for row in rows], backbone.info.pad_token_id)
        self.ids: Tensor = ids.to(model.device)
        self.positions: Tensor = (mask.cumsum(dim=1) - 1).clamp(min=0).to(model.device)
        self.mask: Tensor = mask.long().to(model.device)
        self.read = 0  # columns that are in the cache
        self.modes = ExitStack()
        self._enter()

    @torch.inference_mode()
    def step(self) -> bool:
        """One token more for every row, and those that are done leave; or some more of long prompts is read.

        Returns:
            whether the rows have grown.
        """
        # A recurrent state can be carried on by one token only
        width = self.ids.shape[1] if getattr(self.backbone.model, "_is_stateful", False) else PREFILL_COLUMNS
        logits = self._forward(self.ids[:, :width], self.positions[:, :width])
        if self.ids.shape[1] > width:
            self.ids, self.positions = self.ids[:, width:], self.positions[:, width:]
            return False
        tokens = [row.take(logits[b]) for b, row in enumerate(self.rows)]
        self.ids = torch.tensor(tokens, device=self.ids.device).unsqueeze(1)
        self.positions = self.positions[:, -1:] + 1
        self.mask = pad(self.mask, (0, 1), value=1)
        going_on = [b for b, row in enumerate(self.rows) if not row.done]
        if going_on and len(going_on) < len(self.rows):
            self._keep(going_on)
        elif not going_on:
            self.rows = []
        return True

    def close(self) -> None:
        """Take the adapters off and forget the cache."""
        self.rows, self.state = [], None
        self.modes.close()

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """fp32 logits (B, V) after the next columns, on the CPU."""
        # A purely recurrent model has no column per token that a mask could hide once the prompt is read
        masked = self.state_name == "past_key_values" or not self.rows[0].completion
        self.read += ids.shape[1]
        output = self.backbone.model(
            input_ids=ids,
            attention_mask=self.mask[:, : self.read] if masked else None,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.state_name: self.state},
        )
        return output.logits[:, -1].float().cpu()

    def _keep(self, going_on: list[int]) -> None:
        kept = torch.tensor(going_on, device=self.ids.device)
        assert self.state is not None
        # Not `batch_select_indices`, which forgets the recurrent half of a hybrid layer
        self.state.reorder_cache(kept)  # type: ignore[arg-type]
        self.ids, self.positions, self.mask = self.ids[kept], self.positions[kept], self.mask[kept]
        self.rows = [self.rows[b] for b in going_on]
        self.modes.close()
        self._enter()

    def _enter(self) -> None:
        self.modes = ExitStack()
        self.modes.enter_context(self.backbone.mixed([row.role for row in self.rows]))
