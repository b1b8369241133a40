"""Supervised fine-tuning: trl's SFTTrainer over the `sft` role of the one base."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import SFTRecipe
from lowrank_rlhf.data import Example, Renderer, load_demonstrations
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.runs import Run

ROLE = "sft"
ROLE_FILE = "role.pt"


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
    train_set, cut = tokenize(train_examples, renderer)
    eval_set, eval_cut = tokenize(eval_examples, renderer)
    print(
        f"sft: {len(train_set)} demonstrations, {len(eval_set)} held out, {cut + eval_cut} cut to the limits",
        flush=True,
    )
    run.start(backbone, data_hash(recipe.data), rows={"train": len(train_set), "eval": len(eval_set), "cut": cut})

    with backbone.use(ROLE, train=True):
        trainer = build_trainer(recipe, backbone, run, train_set, eval_set)
        if run.checkpoint is None:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        last = trainer.evaluate()
    run.save_role(backbone, ROLE)
    final = {"eval_loss_before": run.metrics()[0]["eval_loss"], "eval_loss": last["eval_loss"]}
    run.record(final=final)
    print(f"sft: eval loss {final['eval_loss_before']:.4f} -> {final['eval_loss']:.4f}; saved in {run.dir}", flush=True)


def tokenize(examples: Sequence[Example], renderer: Renderer) -> tuple[datasets.Dataset, int]:
    """`input_ids` and `completion_mask` columns, and how many rows a limit cut."""
    sequences = [renderer.sequence(e.prompt, e.chosen or [], e.where) for e in examples]
    rows = {
        "input_ids": [s.ids for s in sequences],
        "completion_mask": [[0] * len(s.prompt_ids) + [1] * len(s.completion_ids) for s in sequences],
    }
    return datasets.Dataset.from_dict(rows), sum(s.cut for s in sequences)


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
        trainer = RunTrainer(
            run,
            backbone,
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


class RunTrainer(SFTTrainer):
    """trl's trainer, whose checkpoints are the run's: complete or absent, and of the one role that learns."""

    def __init__(self, run: Run, backbone: Backbone, **arguments: Any):
        self.run, self.role_parameters = run, backbone.parameters(ROLE)
        super().__init__(**arguments)

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
        torch.save([p.detach() for p in self.role_parameters], Path(output_dir, ROLE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = torch.load(Path(resume_from_checkpoint, ROLE_FILE), map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self.role_parameters, saved, strict=True):
                parameter.copy_(value)


class MetricsToRun(TrainerCallback):
    """Every number the trainer logs goes into the run and onto one terminal line; the run says when to save."""

    def __init__(self, run: Run):
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.is_due(state.global_step) and state.global_step < state.max_steps:
            control.should_save = True

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
