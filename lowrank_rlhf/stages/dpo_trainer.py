"""trl's DPOTrainer on the backbone: our tokens and log-probs, the reference by role, trl's losses and figures."""

from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config_preference import DPORecipe
from lowrank_rlhf.data import Example
from lowrank_rlhf.data.batches import chunks
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
from lowrank_rlhf.progress import progress
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.early_stopping import Best
from lowrank_rlhf.stages.policy_start import POLICY
from lowrank_rlhf.stages.run_trainer import RunCallback, RunCheckpoints, trainer_arguments
from lowrank_rlhf.stages.trl_model import (
    as_it_was,
    drop_mean_logits,
    no_second_model,
    saying,
    scored_tokens,
    sequence_logps,
)

SHOWN = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def build_trainer(
    recipe: DPORecipe,
    backbone: Backbone,
    run: Run,
    train_set: datasets.Dataset,
    eval_set: datasets.Dataset,
    eval_examples: SequenceOf[Example],
) -> "DPORunTrainer":
    """The trainer; the backbone is as it was before."""
    settings = recipe.dpo
    arguments = DPOConfig(
        **trainer_arguments(recipe, run, backbone, evaluate=bool(len(eval_set))),
        beta=settings.beta,
        loss_type=list(settings.losses),
        loss_weights=settings.loss_weights,
        label_smoothing=settings.label_smoothing,
        max_length=None,  # rows are cut already
        router_aux_loss_coef=0.0,
    )
    collator = DataCollatorForPreference(pad_token_id=backbone.info.pad_token_id)
    if settings.precompute_reference:
        train_set, eval_set = (
            with_reference(backbone, part, collator, recipe.train.micro_batch_size) for part in (train_set, eval_set)
        )
    with as_it_was(backbone):
        trainer = DPORunTrainer(
            run,
            backbone,
            eval_examples,
            model=backbone.peft,
            ref_model=no_second_model(backbone),
            args=arguments,
            data_collator=collator,
            train_dataset=train_set,
            eval_dataset=eval_set if len(eval_set) else None,
            processing_class=backbone.tokenizer,
        )
    trainer.ref_model = None
    trainer.precompute_ref_logps = True  # trl's loss reads the reference's log-probs from its inputs
    trainer.remove_callback(PrinterCallback)
    return trainer


class DPORunTrainer(RunCheckpoints, DPOTrainer):
    """trl's trainer, whose log-probs are the backbone's and whose checkpoints are the run's.

    The reference's log-probs come from the same padded tensors as the policy's, under the reference role: where the
    policy is the reference, every log-ratio is exactly 0, also in NF4, where another padding gives other log-probs.
    Held-out figures are means over rows, each pair judged alone, whatever the micro-batch. In training each pair counts
    once, also those of a ranked row: trl's losses have no weights. trl's `logits/…` figures are left out.

    Args:
        eval_examples: the held-out pairs, for their prompts and weights.
    """

    def __init__(self, run: Run, backbone: Backbone, eval_examples: SequenceOf[Example], **arguments: Any):
        self.run, self.backbone = run, backbone
        self.eval_prompts = [example.prompt_key for example in eval_examples]
        self.eval_weights = [example.weight for example in eval_examples]
        self.best = Best(backbone.parameters(POLICY), run.recipe.eval)  # type: ignore[attr-defined]
        super().__init__(callbacks=[RunCallback(run, self.best, "dpo", SHOWN)], **arguments)

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any) -> datasets.Dataset:
        return dataset  # the renderer's tokens

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        inputs = self._with_reference(inputs)  # first: the policy's role is to be on until backward
        scored = scored_tokens(self.backbone, **model_inputs(inputs))
        with self.own_figures():
            loss = super()._compute_loss(saying(scored), inputs, False)
        drop_mean_logits(self._metrics["train"])
        return loss

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and accuracy of the implicit reward with its 95 % interval by prompt; a tie is half right."""
        assert self.model is not None
        self.model.eval()  # trl sorts its figures by the mode of this wrapper, which a training step sets again
        with self.backbone.use(POLICY):
            found = [self._pair_figures(batch) for batch in self.held_out_batches()]
        batches = processes.together(found)
        figures = {name: [value for batch in batches for value in batch[name]] for name in batches[0]}
        losses = figures.pop("loss")
        margins = torch.tensor(figures["rewards/margins"], dtype=torch.float64)
        right = torch.where(margins == 0, 0.5, (margins > 0).double()).tolist()
        figures["rewards/accuracies"] = right
        accuracy, low, high = bootstrap_mean(right, self.eval_prompts, weights=self.eval_weights)
        metrics = {"eval_loss": self._mean(losses)}
        metrics |= {"eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high}
        metrics |= {f"eval_{name}": self._mean(values) for name, values in figures.items()}
        Trainer.log(self, metrics)  # past trl's own, which adds the means of the training steps so far
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _pair_figures(self, inputs: dict[str, Any]) -> dict[str, list[float]]:
        """The loss of each pair of a micro-batch, and trl's figures of it."""
        inputs = self._with_reference(inputs)
        scored = vars(scored_tokens(self.backbone, **model_inputs(inputs)))
        pairs, losses = len(inputs["input_ids"]) // 2, []
        for i in range(pairs):
            rows = [i, pairs + i]  # the chosen answers stand first
            alone = SimpleNamespace(**{name: values[rows] for name, values in scored.items()})
            one = {name: values[[i] if name in REFERENCE_COLUMNS else rows] for name, values in inputs.items()}
            with self.own_figures():
                losses.append(float(super()._compute_loss(saying(alone), one, False)))
        drop_mean_logits(self._metrics["eval"])
        figures = {"loss": losses, **self._metrics["eval"]}
        self._metrics["eval"].clear()
        del figures["num_tokens"]
        return figures

    def _with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        precomputed = REFERENCE_COLUMNS[0] in inputs
        return inputs if precomputed else inputs | reference_logps(self.backbone, inputs)

    def _mean(self, values: list[float]) -> float:
        return sum(w * v for w, v in zip(self.eval_weights, values, strict=True)) / sum(self.eval_weights)


def model_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}


def reference_logps(backbone: Backbone, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """log p of the chosen and of the rejected answers of a micro-batch under the reference, in trl's columns."""
    logps = sequence_logps(backbone, backbone.reference_role, **model_inputs(inputs))
    return dict(zip(REFERENCE_COLUMNS, logps.chunk(2), strict=True))


def with_reference(
    backbone: Backbone, pairs: datasets.Dataset, collator: DataCollatorForPreference, micro_batch_size: int
) -> datasets.Dataset:
    """The pairs with the reference's log-probs as two more columns, computed once.

    Training pads them otherwise, so in NF4 the first log-ratios are only nearly 0.
    """
    found: list[dict[str, list[float]]] = []
    groups = processes.share(chunks(range(len(pairs)), micro_batch_size))
    for group in progress(groups, "reference log-probs", len(groups)):
        batch = {k: v.to(backbone.model.device) for k, v in collator([pairs[i] for i in group]).items()}
        found.append({name: logps.tolist() for name, logps in reference_logps(backbone, batch).items()})
    batches = processes.together(found)
    for name in REFERENCE_COLUMNS:
        pairs = pairs.add_column(name, [value for batch in batches for value in batch[name]])
    return pairs
