"""The loop of PPO and GRPO: roll out, learn from it, log it and show it; checkpoints between."""

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from lowrank_rlhf.advantages import masked_mean
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.callbacks import Callbacks
from lowrank_rlhf.checkpoints import load_state, save_state
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.data.report import print_report
from lowrank_rlhf.panel import Line, panel
from lowrank_rlhf.rollout import sampling_mismatch
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.experience import Experience, Metrics
from lowrank_rlhf.stages.on_policy import OnPolicy
from lowrank_rlhf.stages.policy_loss import PolicyLoss
from lowrank_rlhf.stages.policy_start import check_start
from lowrank_rlhf.stages.steps import Steps


class Updater(Protocol):
    """What learns from a batch."""

    loss: PolicyLoss
    steps: Steps

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Method(Protocol):
    """PPO or GRPO. `roles` are those it trains."""

    on_policy: OnPolicy
    roles: list[str]

    @property
    def updater(self) -> Updater: ...

    def collect(self) -> tuple[SequenceOf[Experience], Metrics]:
        """A batch to learn from, and what it was like."""

    def update(self, experiences: Any) -> Metrics:
        """Learn from what `collect` gave."""


def run_iterations(method: Method, run: Run, callbacks: SequenceOf[TrainerCallback], *more_data: str | None) -> None:
    """Train the method's roles and save them; metrics row k is the rollout that update k learned from.

    Args:
        callbacks: transformers' `TrainerCallback`s, which hear of every iteration as a step.
        more_data: sources beside `recipe.data`.
    """
    on_policy, recipe = method.on_policy, method.on_policy.recipe
    reference = on_policy.backbone.reference_role
    run.start(
        on_policy.backbone,
        data_hash(recipe.data, *more_data),
        reference=reference or "base",
        data_report=on_policy.data_report,
    )
    print_report(on_policy.data_report)
    print(f"{recipe.stage}: reference: {reference or 'base, adapters off'}", flush=True)
    if mismatch := sampling_mismatch(recipe.rollout):
        print(f"{recipe.stage}: warning: {mismatch}", flush=True)
    steps = recipe.train.max_steps
    done, heard_state = load(method, run.checkpoint) if run.checkpoint else (0, None)
    heard = Callbacks(callbacks, run, max_steps=steps, done=done, model=on_policy.backbone.model)
    if heard_state:
        heard.load_state_dict(heard_state)
    metrics: Metrics = {}
    with panel(recipe.stage, steps, done, run.metrics() if done else []) as line, heard, on_policy.unpacked():
        for step in range(done + 1, steps + 1):
            heard.on_step_begin()
            metrics = iteration(method, run, line, step)
            heard.on_step_end(step, metrics)
            if heard.is_due(step) and step < steps:
                with heard.write_checkpoint(step) as folder:
                    save(method, folder, step, heard.state_dict())
    for role in method.roles:
        run.save_role(on_policy.backbone, role, metrics)
    run.finish(**metrics)
    print(f"{recipe.stage}: saved in {run.dir}", flush=True)


def iteration(method: Method, run: Run, line: Line, step: int) -> Metrics:
    """Roll out, learn from it, log it and show it."""
    on_policy = method.on_policy
    experiences, metrics = method.collect()
    if step == 1:
        first = {**metrics, **first_ratio(on_policy.backbone, method.updater.loss, experiences[0])}
        check_start(on_policy.backbone, on_policy.recipe.stage, "KL", first["objective/kl"], " nats")
        run.log(0, first)
    with on_policy.phases("update"):
        metrics |= method.update(experiences)
    on_policy.end_iteration(step, metrics["objective/kl"])
    metrics |= on_policy.speed(experiences)
    metrics |= line.step(step, sum(int(e.batch.attention_mask.sum()) for e in experiences), metrics)
    run.log(step, metrics)
    on_policy.tell(run, line, step, metrics)
    return metrics


def first_ratio(backbone: Backbone, loss: PolicyLoss, experience: Experience) -> Metrics:
    """π/π_old of a training forward before any update: 1, or the update and the scoring disagree."""
    with torch.no_grad(), backbone.use("policy", train=True):
        logps, _ = loss.current_logps(experience)
    return {"val/ratio": float(masked_mean((logps - experience.token_logps).exp(), experience.mask))}


def save(method: Method, folder: Path, step: int, heard: dict[str, Any]) -> None:
    """Everything that is needed to go on after `step`, `heard` being the state of the callbacks."""
    save_state(
        folder,
        method.on_policy.backbone,
        method.updater.steps.optimizers,
        step=step,
        heard=heard,
        on_policy=method.on_policy.state_dict(),
        updater=method.updater.state_dict(),
    )


def load(method: Method, folder: Path) -> tuple[int, dict[str, Any]]:
    """Everything as it was after the step that is returned, and the state of the callbacks."""
    cursor = load_state(folder, method.on_policy.backbone, method.updater.steps.optimizers)
    method.on_policy.load_state_dict(cursor["on_policy"])
    method.updater.load_state_dict(cursor["updater"])
    return int(cursor["step"]), cursor["heard"]
