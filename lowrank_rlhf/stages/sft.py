"""Supervised fine-tuning: trl's SFTTrainer over the `sft` role of the one base."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import SFTRecipe
from lowrank_rlhf.data import Renderer, data_report, load_demonstrations, print_report, tokenize_demonstrations
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.runs import Run

ROLE = "sft"


def train(recipe: SFTRecipe, run: Run) -> None:
    """Train the `sft` role and save it in the run; metrics hold `eval_loss` from step 0 on."""
    train_examples, eval_examples = load_demonstrations(recipe.data)
    torch.manual_seed(recipe.seed)
    backbone = Backbone(recipe.base)
    backbone.add_role(ROLE, recipe.lora)
    backbone.train_only(ROLE)
    if recipe.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    renderer = Renderer(backbone.tokenizer, recipe.data)
    train_set, sizes = tokenize_demonstrations(train_examples, renderer)
    eval_set, _ = tokenize_demonstrations(eval_examples, renderer)
    report = data_report("demonstrations", train_examples, eval_examples, renderer, sizes)
    print_report(report)
    run.record(data_hash=data_hash(recipe.data), data_report=report)

    with backbone.use(ROLE, train=True):
        trainer = build_trainer(recipe, backbone, run, train_set, eval_set)
        first = trainer.evaluate()
        trainer.train()
        last = trainer.evaluate()
    run.save_role(backbone, ROLE)
    final = {"eval_loss_before": first["eval_loss"], "eval_loss": last["eval_loss"]}
    run.record(final=final)
    print(f"sft: eval loss {final['eval_loss_before']:.4f} -> {final['eval_loss']:.4f}; saved in {run.dir}", flush=True)


def build_trainer(
    recipe: SFTRecipe, backbone: Backbone, run: Run, train_set: datasets.Dataset, eval_set: datasets.Dataset
) -> SFTTrainer:
    """The trainer, its LoRA weights in fp32 as they were before it was built."""
    train = recipe.train
    arguments = SFTConfig(
        output_dir=str(run.dir),  # nothing is written there: we save roles, not models
        per_device_train_batch_size=train.micro_batch_size,
        per_device_eval_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=max(1, train.batch_size // train.micro_batch_size),
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
        use_cpu=backbone.info.device == "cpu",
        eval_strategy="steps" if recipe.eval.steps else "no",
        eval_steps=recipe.eval.steps,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        completion_only_loss=True,
        max_length=None,
        packing=False,
    )
    assert backbone.peft is not None
    with keep_lora_precision(backbone):
        trainer = SFTTrainer(
            model=backbone.peft,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=backbone.tokenizer,
            callbacks=[MetricsToRun(run)],
        )
    trainer.remove_callback(_printer())
    return trainer


@contextmanager
def keep_lora_precision(backbone: Backbone) -> Iterator[None]:
    """Undo trl's cast of trainable LoRA weights to bf16, which it does when it is given a 4-bit base.

    In bf16, small optimizer steps round to nothing, and a frozen fp32 copy would no longer equal the policy.
    """
    before = [(p, p.data) for role in backbone.roles for p in backbone.parameters(role)]
    yield
    for parameter, data in before:
        parameter.data = data


class MetricsToRun(TrainerCallback):
    """Every number the trainer logs, into the run's metrics.jsonl and onto one terminal line."""

    def __init__(self, run: Run):
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items() if math.isfinite(float(value))}
        self.run.log(state.global_step, metrics)
        shown = {"loss", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy"} & metrics.keys()
        if shown:
            print(
                f"sft step {state.global_step:4d}  " + "  ".join(f"{k} {metrics[k]:.4f}" for k in sorted(shown)),
                flush=True,
            )


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
