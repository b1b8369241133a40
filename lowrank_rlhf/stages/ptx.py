"""The SFT mix of PPO: demonstrations that every policy step also learns from.

InstructGPT's "PPO-ptx" adds the pretraining loss to the PPO loss so that the policy does not forget (Ouyang et al.
2022, arXiv:2203.02155, eq. 2); here it is the loss of demonstrations.
"""

import dataclasses
from functools import partial
from typing import Any

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.data import Batch, Renderer, load_demonstrations, pad_batch
from lowrank_rlhf.data.batches import chunks
from lowrank_rlhf.out_of_memory import LEARN
from lowrank_rlhf.stages.prompt_order import PromptOrder


class SFTMix:
    """`coef` times the mean negative log-likelihood of demonstrated tokens.

    Args:
        rows: demonstrations that a step learns from.

    Raises:
        UserError: the recipe's `ptx.data` cannot be read, or has no demonstrations.
    """

    def __init__(self, recipe: PPORecipe, backbone: Backbone, renderer: Renderer, rows: int):
        assert recipe.ptx.data is not None
        data = dataclasses.replace(recipe.data, train=recipe.ptx.data, eval=None, eval_fraction=0.0, format=None)
        examples, _ = load_demonstrations(dataclasses.replace(data, columns={}))
        self.order = PromptOrder(examples, seed=recipe.seed)
        self.backbone, self.renderer, self.rows = backbone, renderer, rows
        self.coef, self.micro_batch_size = recipe.ptx.coef, recipe.train.micro_batch_size

    def backward(self) -> float:
        """Add the gradient of the next demonstrations to the role that is on; returns their loss, nats per token."""
        sequences = [self.renderer.sequence(e.prompt, e.chosen or [], e.where) for e in self.order.take(self.rows)]
        tokens = sum(len(s.completion_ids) for s in sequences)
        total = 0.0
        for group in chunks(range(len(sequences)), self.backbone.most_rows.of(self.micro_batch_size, LEARN)):
            batch = pad_batch([sequences[i] for i in group], self.backbone.info.pad_token_id)
            total += self.backbone.learn(len(group), partial(self._learn, batch, tokens))
        return total

    def _learn(self, batch: Batch, tokens: int) -> float:
        batch = batch.to(self.backbone.model.device)
        logps, _ = self.backbone.token_logps(batch.input_ids, batch.attention_mask, batch.completion_mask)
        loss = -logps.sum() / tokens
        (self.coef * loss).backward()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)
