"""trl's SFTTrainer on the backbone: our log-probs, the run's checkpoints, figures and end."""

from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.passes import documents
from lowrank_rlhf.config import SFTRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.early_stopping import Best
from lowrank_rlhf.stages.run_trainer import RunCallback, RunCheckpoints, keep_lora_precision, trainer_arguments

ROLE = "sft"
SHOWN = {"accuracy": "mean_token_accuracy"}


def build_trainer(
    recipe: SFTRecipe, backbone: Backbone, run: Run, train_set: datasets.Dataset, eval_set: datasets.Dataset
) -> "RunTrainer":
    """The trainer, its LoRA weights in fp32 as they were before it was built.

    Raises:
        UserError: the base cannot keep packed rows apart.
    """
    if recipe.train.packing:
        refuse_leaking(backbone)
    longest = recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
    arguments = SFTConfig(
        **trainer_arguments(recipe, run, backbone, evaluate=bool(len(eval_set))),
        completion_only_loss=True,
        # Rows are cut already; packed, as many whole ones as fit go into one of this length
        max_length=longest if recipe.train.packing else None,
        packing=recipe.train.packing,
        eval_packing=False,
    )
    with keep_lora_precision(backbone):
        trainer = RunTrainer(
            run,
            backbone,
            model=backbone.peft,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=eval_set if len(eval_set) else None,
            processing_class=backbone.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def refuse_leaking(backbone: Backbone) -> None:
    """Of two documents in one row the second must not see the first: other tokens there change none of its states.

    Raises:
        UserError: they do. A recurrent base, or one whose attention ignores `position_ids`, cannot be packed.
    """
    first, second = torch.arange(8) + 5, torch.arange(8) + 5
    positions = torch.arange(8).repeat(2)[None].to(backbone.model.device)
    with backbone.use(None):
        states = [
            backbone.hidden(torch.cat([ids, second])[None].to(backbone.model.device), None, positions)[0, 8:]
            for ids in (first, first.flip(0))
        ]
    if not torch.equal(*states):
        raise UserError(
            f"train.packing: {backbone.info.model} lets packed rows see each other; use train.packing: false"
        )


class RunTrainer(RunCheckpoints, SFTTrainer):
    """trl's trainer, whose log-probs are the backbone's and whose checkpoints are the run's, of the role that learns.

    trl's own loss scores every position where there is no Triton, ours only the learned ones: the same loss, on a CPU
    1.5 times as fast. Its held-out loss is a mean of batch means, ours is over all tokens, whatever the micro-batch.
    """

    def __init__(self, run: Run, backbone: Backbone, **arguments: Any):
        self.run, self.backbone, self.role_parameters = run, backbone, backbone.parameters(ROLE)
        self.best = Best(self.role_parameters, run.recipe.eval)  # type: ignore[attr-defined]
        super().__init__(callbacks=[RunCallback(run, self.best, "sft", SHOWN)], **arguments)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """−log p summed over the micro-batch's learned tokens, by the number of those of the whole batch."""
        logps, entropy, is_top1 = self._learned_logps(inputs)
        self._total_train_tokens += self._tokens(inputs)
        figures = {"entropy": float(entropy.detach().mean()), "mean_token_accuracy": float(is_top1.float().mean())}
        for name, value in figures.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return -logps.sum() / (len(logps) if num_items_in_batch is None else num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss and accuracy of the learned tokens of the held-out rows."""
        with self.backbone.use(ROLE):
            batches = [self._learned_logps(batch) for batch in self.held_out_batches()]
        batches = processes.together([(a.cpu(), b.cpu(), c.cpu()) for a, b, c in batches])
        logps, entropy, is_top1 = (torch.cat(parts) for parts in zip(*batches, strict=True))
        figures = {"loss": -logps, "entropy": entropy, "mean_token_accuracy": is_top1}
        metrics = {f"eval_{name}": float(values.double().mean()) for name, values in figures.items()}
        Trainer.log(self, metrics)  # past trl's own, which adds the means of the training steps so far
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def rows(self, inputs: dict[str, Any]) -> int:
        """Packed, all are in one."""
        return len(documents(inputs["position_ids"])) if "position_ids" in inputs else super().rows(inputs)

    def _learned_logps(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        ids, learned = inputs["input_ids"], inputs["labels"] != -100
        return self.backbone.read(ids, inputs.get("attention_mask"), learned, position_ids=inputs.get("position_ids"))

    def _tokens(self, inputs: dict[str, Any]) -> int:
        return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
