"""What lets one of trl's trainers train a role of a run: its arguments, LoRA precision, checkpoints and figures."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import SFTRecipe, Train
from lowrank_rlhf.config_preference import DPORecipe, KTORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.progress import Progress
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.early_stopping import Best
from lowrank_rlhf.stages.shared_steps import SharedSteps

ROLES_FILE = "roles.pt"


def refuse_uneven(train: Train) -> None:
    """
    Raises:
        UserError: the batch cannot be cut into micro-batches, as many for each process.
    """
    count = processes.count()
    if train.batch_size % (train.micro_batch_size * count):
        shared = f" times {count} processes" if count > 1 else ""
        raise UserError(
            f"train.batch_size: {train.batch_size} is not a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}){shared}"
        )


def trainer_arguments(
    recipe: SFTRecipe | DPORecipe | KTORecipe, run: Run, backbone: Backbone, *, evaluate: bool
) -> dict[str, Any]:
    """The recipe in transformers' words, for any of trl's configs."""
    train = recipe.train
    return {
        "output_dir": str(run.dir),  # nothing is written there: we save roles, not models
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // train.micro_batch_size,
        "average_tokens_across_devices": False,  # each process counts those of all, see SharedSteps
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "warmup_steps": train.warmup_ratio,
        "lr_scheduler_type": "constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch",
        "seed": recipe.seed,
        "bf16": False,  # no autocast: the base computes in its own types, the adapters in fp32
        "gradient_checkpointing": False,  # the backbone's own is adapter-safe
        "use_cpu": backbone.info.device == "cpu",
        "eval_strategy": "steps" if recipe.eval.steps and evaluate else "no",
        "eval_steps": recipe.eval.steps,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


@contextmanager
def keep_lora_precision(backbone: Backbone) -> Iterator[None]:
    """Undo trl's cast of trainable LoRA weights to bf16, which it does when it is given a 4-bit base.

    In bf16, small optimizer steps round to nothing, and a frozen fp32 copy would no longer equal the policy.
    """
    before = [(p, p.data) for role in backbone.roles for p in backbone.parameters(role)]
    yield
    for parameter, data in before:
        parameter.data = data


class RunCheckpoints(SharedSteps):
    """The part of a trainer that writes and reads the run's checkpoints: every role's weights, and the best so far."""

    run: Run
    most_rows: dict[str, int]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.most_rows = self.backbone.most_rows.state_dict()
        with self.run.write_checkpoint(self.state.global_step) as folder:
            self.args.output_dir = str(folder)
            # Past trl's own method, which writes a model card that names a local path as the base
            Trainer._save_checkpoint(self, model, trial)
            if not processes.is_main():
                return
            (written,) = folder.iterdir()
            for path in written.iterdir():
                path.rename(folder / path.name)
            written.rmdir()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir()
        roles = {role: [p.detach() for p in self.backbone.parameters(role)] for role in self.backbone.roles}
        state = {"roles": roles, "best": self.best.state_dict(), "most_rows": self.most_rows}
        torch.save(state, Path(output_dir, ROLES_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = torch.load(Path(resume_from_checkpoint, ROLES_FILE), map_location="cpu", weights_only=True)
        self.best.load_state_dict(saved["best"])
        self.backbone.most_rows.load_state_dict(saved.get("most_rows", {}))  # an earlier version's has none
        with torch.no_grad():
            for role, weights in saved["roles"].items():
                for parameter, value in zip(self.backbone.parameters(role), weights, strict=True):
                    parameter.copy_(value)


class RunCallback(TrainerCallback):
    """Every number goes into the run and onto one terminal line; the run says when to save, the best when to stop.

    Args:
        stage: its name on the terminal.
        shown: what a line shows beside the loss, name on the terminal → metric; held out, `eval_` stands before it.
    """

    def __init__(self, run: Run, best: Best, stage: str, shown: Mapping[str, str]):
        self.run, self.best, self.stage, self.shown = run, best, stage, shown
        self.progress: Progress | None = None
        self.tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = Progress(self.stage, state.max_steps, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.is_due(state.global_step) and state.global_step < state.max_steps:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and self.best.update(kwargs["metrics"]["eval_loss"]):
            print(f"{self.stage}: no better held-out loss for {self.best.patience} evaluations, stopping", flush=True)
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items() if math.isfinite(float(value))}
        if "loss" in metrics and self.progress:
            tokens, self.tokens = metrics["num_tokens"] - self.tokens, metrics["num_tokens"]
            metrics |= self.progress.step(state.global_step, int(tokens), **self._figures(metrics, ""))
        elif "eval_loss" in metrics:
            figures = "".join(f"  {name} {value:.3f}" for name, value in self._figures(metrics, "eval_").items())
            print(f"{self.stage} held out, step {state.global_step}{figures}", flush=True)
        self.run.log(state.global_step, metrics)

    def _figures(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        names = {"loss": "loss", **self.shown}
        return {name: metrics[prefix + metric] for name, metric in names.items() if prefix + metric in metrics}
