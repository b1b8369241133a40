"""trl's SFTTrainer on the backbone: our log-probs, the run's checkpoints, figures and end."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import SFTRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.progress import Progress
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.early_stopping import Best

ROLE = "sft"
ROLE_FILE = "role.pt"


def build_trainer(
    recipe: SFTRecipe, backbone: Backbone, run: Run, train_set: datasets.Dataset, eval_set: datasets.Dataset
) -> "RunTrainer":
    """The trainer, its LoRA weights in fp32 as they were before it was built.

    Raises:
        UserError: the batch cannot be cut into micro-batches, or the base cannot keep packed rows apart.
    """
    if recipe.train.packing:
        refuse_leaking(backbone)
    arguments = trainer_arguments(recipe, run, backbone.info.device == "cpu", evaluate=bool(len(eval_set)))
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


def trainer_arguments(recipe: SFTRecipe, run: Run, use_cpu: bool, *, evaluate: bool) -> SFTConfig:
    """The recipe in trl's words.

    Raises:
        UserError: the batch cannot be cut into micro-batches.
    """
    train = recipe.train
    if train.batch_size % train.micro_batch_size:
        raise UserError(
            f"train.batch_size: {train.batch_size} is not a multiple of train.micro_batch_size "
            f"({train.micro_batch_size})"
        )
    return SFTConfig(
        output_dir=str(run.dir),  # nothing is written there: we save roles, not models
        per_device_train_batch_size=train.micro_batch_size,
        per_device_eval_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.batch_size // train.micro_batch_size,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_ratio,
        lr_scheduler_type="constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch",
        seed=recipe.seed,
        bf16=False,  # no autocast: the base computes in its own types, the adapters in fp32
        gradient_checkpointing=False,  # the backbone's own is adapter-safe
        use_cpu=use_cpu,
        eval_strategy="steps" if recipe.eval.steps and evaluate else "no",
        eval_steps=recipe.eval.steps,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        completion_only_loss=True,
        # Rows are cut already; packed, as many whole ones as fit go into one of this length
        max_length=recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens if train.packing else None,
        packing=train.packing,
        eval_packing=False,
    )


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


@contextmanager
def keep_lora_precision(backbone: Backbone) -> Iterator[None]:
    """Undo trl's cast of trainable LoRA weights to bf16, which it does when it is given a 4-bit base.

    In bf16, small optimizer steps round to nothing, and a frozen fp32 copy would no longer equal the policy.
    """
    before = [(p, p.data) for role in backbone.roles for p in backbone.parameters(role)]
    yield
    for parameter, data in before:
        parameter.data = data


class RunTrainer(SFTTrainer):
    """trl's trainer, whose log-probs are the backbone's and whose checkpoints are the run's, of the role that learns.

    trl's own loss scores every position where there is no Triton, ours only the learned ones: the same loss, on a CPU
    1.5 times as fast. Its held-out loss is a mean of batch means, ours is over all tokens, whatever the micro-batch.
    """

    def __init__(self, run: Run, backbone: Backbone, **arguments: Any):
        self.run, self.backbone, self.role_parameters = run, backbone, backbone.parameters(ROLE)
        self.best = Best(self.role_parameters, run.recipe.eval)  # type: ignore[attr-defined]
        super().__init__(callbacks=[RunCallback(run, self.best)], **arguments)

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
            batches = [self._learned_logps(self._prepare_inputs(batch)) for batch in self.get_eval_dataloader()]
        logps, entropy, is_top1 = (torch.cat(parts) for parts in zip(*batches, strict=True))
        figures = {"loss": -logps, "entropy": entropy, "mean_token_accuracy": is_top1}
        metrics = {f"eval_{name}": float(values.double().mean()) for name, values in figures.items()}
        Trainer.log(self, metrics)  # past trl's own, which adds the means of the training steps so far
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _learned_logps(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        ids, learned = inputs["input_ids"], inputs["labels"] != -100
        hidden = self.backbone.hidden(ids, inputs.get("attention_mask"), inputs.get("position_ids"))
        return self.backbone.completion_logps(hidden, ids, learned)

    def _tokens(self, inputs: dict[str, Any]) -> int:
        return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.run.write_checkpoint(self.state.global_step) as folder:
            self.args.output_dir = str(folder)
            # Past trl's own method, which writes a model card that names a local path as the base
            Trainer._save_checkpoint(self, model, trial)
            (written,) = folder.iterdir()
            for path in written.iterdir():
                path.rename(folder / path.name)
            written.rmdir()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir()
        weights = [p.detach() for p in self.role_parameters]
        torch.save({"weights": weights, "best": self.best.state_dict()}, Path(output_dir, ROLE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = torch.load(Path(resume_from_checkpoint, ROLE_FILE), map_location="cpu", weights_only=True)
        self.best.load_state_dict(saved["best"])
        with torch.no_grad():
            for parameter, value in zip(self.role_parameters, saved["weights"], strict=True):
                parameter.copy_(value)


class RunCallback(TrainerCallback):
    """Every number goes into the run and onto one terminal line; the run says when to save, the best when to stop."""

    def __init__(self, run: Run, best: Best):
        self.run, self.best = run, best
        self.progress: Progress | None = None
        self.tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = Progress("sft", state.max_steps, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.is_due(state.global_step) and state.global_step < state.max_steps:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and self.best.update(kwargs["metrics"]["eval_loss"]):
            print(f"sft: no better held-out loss for {self.best.patience} evaluations, stopping", flush=True)
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items() if math.isfinite(float(value))}
        if "loss" in metrics and self.progress:
            tokens, self.tokens = metrics["num_tokens"] - self.tokens, metrics["num_tokens"]
            shown = {"loss": metrics["loss"], "accuracy": metrics["mean_token_accuracy"]}
            metrics |= self.progress.step(state.global_step, int(tokens), **shown)
        elif "eval_loss" in metrics:
            loss, accuracy = metrics["eval_loss"], metrics["eval_mean_token_accuracy"]
            print(f"sft held out, step {state.global_step}  loss {loss:.3f}  accuracy {accuracy:.3f}", flush=True)
        self.run.log(state.global_step, metrics)
