"""Four models in memory, as PPO is commonly run: what one shared base is compared with.

Policy and value are bases with a LoRA adapter of their own, reference and reward two more bases, all loaded and called
by plain transformers and PEFT.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_rlhf.backbone.base import load_base
from lowrank_rlhf.backbone.heads import ScalarHead
from lowrank_rlhf.config import Base, Lora


class SeparateModels:
    """`policy`, `reference`, `reward` and `value`, each with a base of its own.

    Args:
        base: what each of them loads.
    """

    def __init__(self, base: Base, lora: Lora):
        self.tokenizer: PreTrainedTokenizerBase
        self.reference, self.tokenizer, self.info = load_base(base)
        self.reward, *_ = load_base(base)
        self.policy, self.value = (_with_lora(load_base(base)[0], lora) for _ in range(2))
        size = self.reference.config.get_text_config().hidden_size
        self.reward_head, self.value_head = (ScalarHead(size).to(self.reference.device) for _ in range(2))
        self.reward_head.requires_grad_(False)

    @property
    def models(self) -> list[nn.Module]:
        return [self.policy, self.reference, self.reward, self.value]

    @torch.no_grad()
    def generate(self, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        """Whole rows, left-padded prompts first, by transformers' own loop."""
        self.policy.eval()
        policy: Any = self.policy
        return policy.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            do_sample=True,
            top_k=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )

    @staticmethod
    def completion_logits(model: Any, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        """Of the last `new_tokens` columns, in fp32, from a forward that computes those of all columns."""
        logits: Tensor = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        return logits[:, -new_tokens - 1 : -1].float()

    @staticmethod
    def hidden(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        trunk = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model
        states: Tensor = trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return states


def _with_lora(model: PreTrainedModel, lora: Lora) -> nn.Module:
    config = LoraConfig(r=lora.r, lora_alpha=int(lora.alpha), target_modules=lora.target_modules, task_type="CAUSAL_LM")
    return get_peft_model(model, config)
