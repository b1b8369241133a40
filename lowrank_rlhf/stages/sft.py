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
from lowrank_rlhf.config import Rollout, SFTRecipe
from lowrank_rlhf.data import Example, Renderer, data_report, load_demonstrations, print_report, tokenize_demonstrations
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.progress import Progress
from lowrank_rlhf.rollout import generate
from lowrank_rlhf.runs import Run, write_atomic
from lowrank_rlhf.stages.early_stopping import Best

ROLE = "sft"
ROLE_FILE = "role.pt"
SAMPLES = 5


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
    run.start(backbone, data_hash(recipe.data), data_report=report)

    with backbone.use(ROLE, train=True):
        trainer = build_trainer(recipe, backbone, run, train_set, eval_set)
        if run.checkpoint is None and len(eval_set):
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        trainer.best.restore()
        final = {}
        if len(eval_set):
            final = {"eval_loss_before": run.metrics()[0]["eval_loss"], "eval_loss": trainer.evaluate()["eval_loss"]}
            print(f"sft: eval loss {final['eval_loss_before']:.4f} -> {final['eval_loss']:.4f}", flush=True)
    write_samples(recipe, backbone, renderer, (eval_examples or train_examples)[:SAMPLES], run.dir / "samples.md")
    run.save_role(backbone, ROLE)
    run.finish(**final)
    print(f"sft: saved in {run.dir}", flush=True)


def write_samples(
    recipe: SFTRecipe, backbone: Backbone, renderer: Renderer, examples: Sequence[Example], path: Path
) -> None:
    """Greedy answers to the same prompts before (the bare base) and after, for a person to read."""
    prompts = [renderer.prompt(e.prompt, e.where)[0] for e in examples]
    limit = recipe.data.max_completion_tokens
    answers = {
        name: generate(
            backbone, role, prompts, Rollout(), max_new_tokens=limit, stop_ids=renderer.stop_ids, greedy=True
        )
        for name, role in (("before", None), ("after", ROLE))
    }
    lines = ["# Greedy answers to held-out prompts, before and after SFT", ""]
    for i, example in enumerate(examples):
        lines += [f"**{example.prompt[-1]['content']}**", ""]
        lines += [f"- {name}: {renderer.decode(answers[name][i].completion_ids).strip()}" for name in answers]
        lines.append("")
    write_atomic(path, "\n".join(lines))


def build_trainer(
    recipe: SFTRecipe, backbone: Backbone, run: Run, train_set: datasets.Dataset, eval_set: datasets.Dataset
) -> "RunTrainer":
    """The trainer, its LoRA weights in fp32 as they were before it was built."""
    arguments = trainer_arguments(recipe, run, backbone.info.device == "cpu", evaluate=bool(len(eval_set)))
    assert backbone.peft is not None
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
    trainer.remove_callback(_printer())
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
        max_length=None,
        packing=False,
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
    """trl's trainer, whose checkpoints are the run's: complete or absent, and of the one role that learns."""

    def __init__(self, run: Run, backbone: Backbone, **arguments: Any):
        self.run, self.role_parameters = run, backbone.parameters(ROLE)
        self.best = Best(self.role_parameters, run.recipe.eval)  # type: ignore[attr-defined]
        super().__init__(callbacks=[RunCallback(run, self.best)], **arguments)

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


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
