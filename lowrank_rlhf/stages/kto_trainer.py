"""trl's KTOTrainer on the backbone: our tokens and log-probs, the reference by role, trl's loss and figures."""

from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config_preference import KTORecipe
from lowrank_rlhf.data import Example
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
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

SHOWN = {"margin": "rewards/margins", "kl": "kl", "accuracy": "accuracy"}
UNKNOWN = ("entropy", "num_tokens", "logits/chosen", "logits/rejected")  # of held-out rows
TEXT = ("input_ids", "attention_mask", "completion_mask")


def build_trainer(
    recipe: KTORecipe,
    backbone: Backbone,
    run: Run,
    train_set: datasets.Dataset,
    eval_set: datasets.Dataset,
    eval_examples: SequenceOf[Example],
) -> "KTORunTrainer":
    """The trainer; the backbone is as it was before.

    Args:
        train_set: in the order in which it is learned.
    """
    settings = recipe.kto
    arguments = KTOConfig(
        **trainer_arguments(recipe, run, backbone, evaluate=bool(len(eval_set))),
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        train_sampling_strategy="sequential",
        max_length=None,  # rows are cut already
        router_aux_loss_coef=0.0,
    )
    with as_it_was(backbone):
        trainer = KTORunTrainer(
            run,
            backbone,
            eval_examples,
            model=backbone.peft,
            ref_model=no_second_model(backbone),
            args=arguments,
            data_collator=DataCollatorForUnpairedPreference(pad_token_id=backbone.info.pad_token_id),
            train_dataset=train_set,
            eval_dataset=eval_set if len(eval_set) else None,
            processing_class=backbone.tokenizer,
        )
    trainer.ref_model = None
    trainer.precompute_ref_logps = True  # trl's loss reads the reference's log-probs from its inputs
    trainer.remove_callback(PrinterCallback)
    return trainer


class KTORunTrainer(RunCheckpoints, KTOTrainer):
    """trl's trainer, whose log-probs are the backbone's and whose checkpoints are the run's.

    The reference's log-probs come from the same padded tensors as the policy's, under the reference role. The KL of the
    loss is that of a micro-batch, as trl has it; held out, that of all rows together. trl's `logits/…` figures are
    left out.

    Args:
        eval_examples: the held-out rows, for their prompts.
    """

    def __init__(self, run: Run, backbone: Backbone, eval_examples: SequenceOf[Example], **arguments: Any):
        self.run, self.backbone = run, backbone
        self.eval_prompts = [example.prompt_key for example in eval_examples]
        self.best = Best(backbone.parameters(POLICY), run.recipe.eval)  # type: ignore[attr-defined]
        super().__init__(callbacks=[RunCallback(run, self.best, "kto", SHOWN)], **arguments)

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any) -> datasets.Dataset:
        return dataset  # the renderer's tokens

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        # First what needs no gradient: the policy's role is to be on until backward
        inputs = inputs | self._reference_logps(inputs) | {"policy_KL_logps": self._logps(POLICY, inputs, "KL_")}
        scored = scored_tokens(self.backbone, *(inputs[name] for name in TEXT))
        with self.own_figures():
            loss = super()._compute_loss(saying(scored), inputs, False)
        drop_mean_logits(self._metrics["train"])
        return loss

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor:
        return batch["policy_KL_logps"]

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """trl's loss and figures of the held-out rows as one batch, and how many rewards are on their label's side.

        An answer that was liked is to have a reward above β · KL, one that was not a lower one; a tie is half right.
        The share has a 95 % interval by prompt.
        """
        assert self.model is not None
        self.model.eval()  # trl sorts its figures by the mode of this wrapper, which a training step sets again
        rows = self._eval_logps()
        with self.own_figures():
            loss = float(super()._compute_loss(saying(_one_token_each(rows["logps"])), _as_inputs(rows), False))
        figures = {name: values[0] for name, values in self._metrics["eval"].items() if name not in UNKNOWN}
        self._metrics["eval"].clear()
        lead = (rows["logps"] - rows["ref_logps"]) - figures["kl"]
        lead = torch.where(rows["label"], lead, -lead)
        right = torch.where(lead == 0, 0.5, (lead > 0).double()).tolist()
        accuracy, low, high = bootstrap_mean(right, self.eval_prompts)
        metrics = {"eval_loss": loss, "eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high}
        metrics |= {f"eval_{name}": value for name, value in figures.items()}
        Trainer.log(self, metrics)  # past trl's own, which adds the means of the training steps so far
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_logps(self) -> dict[str, Tensor]:
        """Labels and log-probs of every held-out row, under policy and reference, shape (N,) each."""
        found: list[dict[str, Tensor]] = []
        for inputs in self.held_out_batches():
            logps = {"logps": self._logps(POLICY, inputs), "policy_KL_logps": self._logps(POLICY, inputs, "KL_")}
            rows = {"label": inputs["label"]} | logps | self._reference_logps(inputs)
            found.append({name: values.cpu() for name, values in rows.items()})
        batches = processes.together(found)
        device = self.backbone.model.device
        return {name: torch.cat([part[name] for part in batches]).to(device) for name in batches[0]}

    def _reference_logps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        role = self.backbone.reference_role
        return {"ref_logps": self._logps(role, inputs), "ref_KL_logps": self._logps(role, inputs, "KL_")}

    def _logps(self, role: str | None, inputs: dict[str, Any], prefix: str = "") -> Tensor:
        return sequence_logps(self.backbone, role, *(inputs[f"{prefix}{name}"] for name in TEXT))


def _one_token_each(logps: Tensor) -> SimpleNamespace:
    """Log-probs of N completions as if each were one token, for a loss that only reads their sums."""
    nothing = torch.zeros_like(logps)[:, None]
    return SimpleNamespace(log_probs=logps[:, None], entropy=nothing, mean_logits=nothing)


def _as_inputs(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The texts that go with `_one_token_each`."""
    ids = torch.zeros(len(rows["label"]), 2, dtype=torch.long, device=rows["label"].device)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    return {**rows, "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
