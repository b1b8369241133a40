"""One PPO step with four separate models and plain transformers and PEFT calls: the row that ours is compared with.

The same prompts, lengths, LoRA, micro-batches and losses as ours, sampled at temperature 1 with a KV cache.
"""

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lowrank_rlhf.advantages import gae, token_rewards, whiten
from lowrank_rlhf.backbone.separate import SeparateModels
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.data import Renderer, load_prompts
from lowrank_rlhf.data.batches import pad_left
from lowrank_rlhf.kl import kl_per_token
from lowrank_rlhf.losses import ppo_policy_loss, ppo_value_loss


class NaivePPO:
    """The models, the prompts and the optimizers; `step` returns the seconds of each phase."""

    def __init__(self, recipe: PPORecipe):
        self.recipe = recipe
        self.separate = SeparateModels(recipe.base, recipe.lora)
        renderer = Renderer(self.separate.tokenizer, recipe.data)
        prompts, _ = load_prompts(recipe.data)
        rows = [renderer.prompt(e.prompt, e.where)[0] for e in prompts[: recipe.train.batch_size]]
        self.ids, self.mask = pad_left(rows, self.separate.info.pad_token_id)
        self.new_tokens = recipe.data.max_completion_tokens
        learning = [p for p in self.separate.value.parameters() if p.requires_grad]
        learning += list(self.separate.value_head.parameters())
        policy = [p for p in self.separate.policy.parameters() if p.requires_grad]
        self.optimizers = [torch.optim.AdamW(p, lr=recipe.train.learning_rate) for p in (policy, learning)]

    def step(self) -> dict[str, float]:
        seconds: defaultdict[str, float] = defaultdict(float)
        started = time.perf_counter()
        ids = self.separate.generate(self.ids, self.mask, self.new_tokens)
        mask = torch.cat([self.mask, torch.ones_like(ids[:, -self.new_tokens :], dtype=torch.bool)], dim=1)
        seconds["generate"] = time.perf_counter() - started
        rows = self.recipe.train.micro_batch_size
        parts = [self.score(i, m) for i, m in zip(ids.split(rows), mask.split(rows), strict=True)]
        seconds["score"] = time.perf_counter() - started - seconds["generate"]
        advantages = torch.cat([part["advantages"] for part in parts])
        advantages = whiten(advantages, torch.ones_like(advantages, dtype=torch.bool))
        for part, each in zip(parts, advantages.split(rows), strict=True):
            part["advantages"] = each
        per_step = len(parts) // self.recipe.ppo.minibatches
        for _ in range(self.recipe.ppo.inner_epochs):
            for first in range(0, len(parts), per_step):
                self.update(parts[first : first + per_step])
        seconds["update"] = time.perf_counter() - started - seconds["generate"] - seconds["score"]
        return dict(seconds)

    @torch.no_grad()
    def score(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        models, new = self.separate, self.new_tokens
        models.policy.eval()
        models.value.eval()
        logps, reference = (self.logps(model, ids, mask) for model in (models.policy, models.reference))
        scores = models.reward_head.score(models.hidden(models.reward, ids, mask), mask)
        values = models.value_head(models.hidden(models.value, ids, mask)[:, -new - 1 : -1])
        counts = torch.ones_like(logps, dtype=torch.bool)
        kl = kl_per_token(logps, reference, "k1")
        rewards = token_rewards(scores, kl, counts, kl_coef=self.recipe.kl.coef)
        settings = self.recipe.ppo
        advantages, returns = gae(rewards, values, counts, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
        names = {"ids": ids, "mask": mask, "logps": logps, "values": values}
        return names | {"advantages": advantages, "returns": returns}

    def update(self, parts: list[dict[str, Any]]) -> None:
        """One step of the policy and one of the value model."""
        models, settings = self.separate, self.recipe.ppo
        models.policy.train()
        models.value.train()
        tokens = sum(part["logps"].numel() for part in parts)
        for part in parts:
            logps = self.logps(models.policy, part["ids"], part["mask"])
            loss, _ = ppo_policy_loss(logps, part["logps"], part["advantages"], clip_range=settings.clip_range)
            (loss.sum() / tokens).backward()
            hidden = models.hidden(models.value, part["ids"], part["mask"])[:, -self.new_tokens - 1 : -1]
            values = models.value_head(hidden)
            loss, _ = ppo_value_loss(values, part["values"], part["returns"], clip_range=settings.value_clip_range)
            (loss.sum() / tokens).backward()
        for optimizer in self.optimizers:
            learning = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(learning, self.recipe.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def logps(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probs of the completion, shape (b, C)."""
        logits = self.separate.completion_logits(model, ids, mask, self.new_tokens)
        chosen = ids[:, -self.new_tokens :].unsqueeze(-1)
        return logits.log_softmax(dim=-1).gather(-1, chosen).squeeze(-1)
