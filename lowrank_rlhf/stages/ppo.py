"""PPO on one base: roll out with `policy`, score with `reward`, compare with the reference, update policy and value.

One iteration (Ouyang et al. 2022, arXiv:2203.02155; Schulman et al. 2017, arXiv:1707.06347):

    completions ~ π;  rewards_t = −kl_coef · KL_t, plus the score at the last token;  GAE with V;
    then inner_epochs × minibatches steps of the clipped policy loss and, separately, the clipped value loss.

The unit of work is a micro-batch fixed for the iteration: the old log-probs and the update run on the same padded
tensors, so that the first ratio is exactly 1 also in NF4, where another padding gives other log-probs.
"""

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from torch import Tensor

from lowrank_rlhf.advantages import gae, masked_mean, token_rewards
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.checkpoints import load_state, save_state
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.data import Batch, Example, Renderer, Sequence, load_prompts, pad_batch
from lowrank_rlhf.data.batches import chunks
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.data.report import data_report, print_report
from lowrank_rlhf.data.tokenized import Sizes
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.kl import kl_per_token
from lowrank_rlhf.losses import ppo_policy_loss, ppo_value_loss
from lowrank_rlhf.progress import Progress, progress
from lowrank_rlhf.rewards import load_rewards
from lowrank_rlhf.rollout import generate
from lowrank_rlhf.runs import Run, load_run_role
from lowrank_rlhf.scoring import policy_logps
from lowrank_rlhf.stages.experience import Experience, Metrics, align, objective_metrics, whiten_advantages
from lowrank_rlhf.stages.optim import optimizer_and_schedule


def train(recipe: PPORecipe, run: Run) -> None:
    """Train the `policy` and `value` roles and save them; metrics row k is the rollout that update k learned from."""
    ppo = PPO(recipe)
    run.start(
        ppo.backbone,
        data_hash(recipe.data),
        reference=ppo.backbone.reference_role or "base",
        data_report=ppo.data_report,
    )
    print_report(ppo.data_report)
    print(f"ppo: reference: {ppo.backbone.reference_role or 'base, adapters off'}", flush=True)
    metrics: Metrics = {}
    done = ppo.load(run.checkpoint) if run.checkpoint else 0
    line = Progress("ppo", recipe.train.max_steps, done)
    for step in range(done + 1, recipe.train.max_steps + 1):
        experiences, metrics = ppo.collect()
        if step == 1:
            first = {**metrics, **ppo.first_ratio(experiences[0])}
            ppo.check_start(first)
            run.log(0, first)
        metrics |= ppo.update(experiences)
        shown = {name: metrics[f"objective/{name}"] for name in ("scores", "kl", "length")}
        metrics |= line.step(step, sum(int(e.batch.attention_mask.sum()) for e in experiences), **shown)
        run.log(step, metrics)
        if run.is_due(step) and step < recipe.train.max_steps:
            with run.write_checkpoint(step) as folder:
                ppo.save(folder, step)
    for role in ("policy", "value"):
        run.save_role(ppo.backbone, role, metrics)
    run.finish(**metrics)
    print(f"ppo: saved in {run.dir}", flush=True)


class PPO:
    """The four roles on one base, the prompts, the rewards and the two optimizers of a PPO run."""

    def __init__(self, recipe: PPORecipe):
        self.recipe = recipe
        micro_batches = recipe.train.batch_size // recipe.train.micro_batch_size
        if recipe.train.batch_size % recipe.train.micro_batch_size or micro_batches % recipe.ppo.minibatches:
            raise UserError(
                f"train.batch_size: {recipe.train.batch_size} prompts must be ppo.minibatches "
                f"({recipe.ppo.minibatches}) times a multiple of train.micro_batch_size "
                f"({recipe.train.micro_batch_size})"
            )
        self.prompts, held_out = load_prompts(recipe.data)
        torch.manual_seed(recipe.seed)
        self.backbone = backbone = Backbone(recipe.base)
        self.renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
        sizes = Sizes()
        for e in progress(self.prompts, "tokenising", len(self.prompts)):
            ids, cut = self.renderer.prompt(e.prompt, e.where)
            sizes.add(len(ids), 0, cut)
        self.data_report = data_report("prompts", self.prompts, held_out, self.renderer, sizes)
        start_policy(recipe, backbone)
        self.reward = load_rewards(recipe, backbone, self.renderer)
        start_value(recipe, backbone)
        backbone.train_only("policy", "value")
        if recipe.train.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        steps = recipe.train.max_steps * recipe.ppo.inner_epochs * recipe.ppo.minibatches
        self.optimizers = {
            "policy": optimizer_and_schedule(backbone.parameters("policy"), recipe.train, steps),
            "value": optimizer_and_schedule(
                backbone.parameters("value"), recipe.train, steps, recipe.value_model.learning_rate
            ),
        }
        self.shuffle = torch.Generator().manual_seed(recipe.seed)
        self.order: list[int] = []

    # Rolling out and scoring

    def next_prompts(self) -> list[Example]:
        """The next batch of prompts; each epoch visits every prompt once, in a new order."""
        size = self.recipe.train.batch_size
        while len(self.order) < size:
            self.order += torch.randperm(len(self.prompts), generator=self.shuffle).tolist()
        taken, self.order = self.order[:size], self.order[size:]
        return [self.prompts[i] for i in taken]

    def collect(self) -> tuple[list[Experience], Metrics]:
        """Roll out one batch and compute everything about it that needs no gradient."""
        recipe = self.recipe
        examples = self.next_prompts()
        sequences = generate(
            self.backbone,
            "policy",
            [self.renderer.prompt(e.prompt, e.where)[0] for e in examples],
            recipe.rollout,
            max_new_tokens=recipe.data.max_completion_tokens,
            stop_ids=self.renderer.stop_ids,
        )
        scored = self.reward(examples, sequences)
        scores = torch.tensor(scored.scores)
        missing_eos = torch.tensor([s.cut for s in sequences])
        scores = scores - recipe.rollout.missing_eos_penalty * missing_eos
        experiences = [
            self.score([sequences[i] for i in group], scores[group])
            for group in chunks(range(len(sequences)), recipe.train.micro_batch_size)
        ]
        metrics = objective_metrics(experiences, recipe.kl.coef)
        metrics["objective/disagreement"] = sum(scored.disagreement) / len(sequences)
        metrics["val/num_eos_tokens"] = float((~missing_eos).sum())
        if recipe.ppo.whiten:
            experiences = whiten_advantages(experiences)
        return experiences, metrics

    @torch.no_grad()
    def score(self, sequences: SequenceOf[Sequence], scores: Tensor) -> Experience:
        """Old log-probs, reference log-probs, values, rewards and advantages of one micro-batch."""
        backbone, recipe = self.backbone, self.recipe
        batch = pad_batch(sequences, backbone.info.pad_token_id).to(backbone.model.device)
        temperature = recipe.rollout.temperature
        logps, entropy = policy_logps(backbone, "policy", batch, temperature)
        reference_logps, _ = policy_logps(backbone, backbone.reference_role, batch, temperature)
        with backbone.use("value"):
            values = backbone.values("value", batch.input_ids, batch.attention_mask, batch.completion_mask)
        logps, reference_logps, entropy, values, mask = (
            align(x, batch.completion_mask) for x in (logps, reference_logps, entropy, values, batch.completion_mask)
        )
        kl = kl_per_token(logps, reference_logps, recipe.kl.estimator)
        scores = scores.to(values)
        rewards = token_rewards(scores, kl, mask, kl_coef=recipe.kl.coef)
        advantages, returns = gae(rewards, values, mask, gamma=recipe.ppo.gamma, gae_lambda=recipe.ppo.gae_lambda)
        return Experience(batch, mask, logps, reference_logps, entropy, values, scores, advantages, returns)

    # Updating

    def update(self, experiences: list[Experience]) -> Metrics:
        """inner_epochs passes over the batch in minibatches; policy and value step separately."""
        per_minibatch = len(experiences) // self.recipe.ppo.minibatches
        rows: list[Metrics] = []
        for _ in range(self.recipe.ppo.inner_epochs):
            order = torch.randperm(len(experiences), generator=self.shuffle).tolist()
            for group in chunks(order, per_minibatch):
                minibatch = [experiences[i] for i in group]
                rows.append(self.policy_step(minibatch) | self.value_step(minibatch))
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def policy_step(self, minibatch: list[Experience]) -> Metrics:
        """One optimizer step of the policy; the loss is the mean over all completion tokens of the minibatch."""
        tokens = sum(int(e.mask.sum()) for e in minibatch)
        loss_sum = clipped_sum = kl_sum = ratio_sum = 0.0
        with self.backbone.use("policy", train=True):
            for e in minibatch:
                logps = self.current_logps(e.batch)
                loss, clipped = ppo_policy_loss(
                    logps, e.token_logps, e.advantages, clip_range=self.recipe.ppo.clip_range
                )
                loss = torch.where(e.mask, loss, 0.0).sum() / tokens
                loss.backward()
                log_ratio = (logps.detach() - e.token_logps)[e.mask]
                loss_sum += float(loss.detach())
                clipped_sum += float(clipped[e.mask].sum())
                kl_sum += float(0.5 * (log_ratio**2).sum())
                ratio_sum += float(log_ratio.exp().sum())
        grad_norm = self.step("policy")
        return {
            "loss/policy_avg": loss_sum,
            "policy/approxkl_avg": kl_sum / tokens,
            "policy/clipfrac_avg": clipped_sum / tokens,
            "policy/grad_norm": grad_norm,
            "val/ratio": ratio_sum / tokens,
            "lr": float(self.optimizers["policy"][1].get_last_lr()[0]),
        }

    def value_step(self, minibatch: list[Experience]) -> Metrics:
        """One optimizer step of the value role."""
        tokens = sum(int(e.mask.sum()) for e in minibatch)
        loss_sum = clipped_sum = 0.0
        with self.backbone.use("value", train=True):
            for e in minibatch:
                batch = e.batch
                values = self.backbone.values("value", batch.input_ids, batch.attention_mask, batch.completion_mask)
                values = align(values, batch.completion_mask)
                loss, clipped = ppo_value_loss(values, e.values, e.returns, clip_range=self.recipe.ppo.value_clip_range)
                loss = torch.where(e.mask, loss, 0.0).sum() / tokens
                loss.backward()
                loss_sum += float(loss.detach())
                clipped_sum += float(clipped[e.mask].sum())
        grad_norm = self.step("value")
        return {
            "loss/value_avg": loss_sum,
            "val/clipfrac_avg": clipped_sum / tokens,
            "value/grad_norm": grad_norm,
        }

    def step(self, role: str) -> float:
        optimizer, schedule = self.optimizers[role]
        norm = torch.nn.utils.clip_grad_norm_(self.backbone.parameters(role), self.recipe.train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def current_logps(self, batch: Batch) -> Tensor:
        """Log-probs (b, C) of the role that is on, with gradient where it learns."""
        where = (batch.input_ids, batch.attention_mask, batch.completion_mask)
        logps, _ = self.backbone.token_logps(*where, temperature=self.recipe.rollout.temperature)
        return align(logps, batch.completion_mask)

    # Going on

    def save(self, folder: Path, step: int) -> None:
        cursor = {"step": step, "order": self.order, "shuffle": self.shuffle.get_state()}
        save_state(folder, self.backbone, self.optimizers, **cursor)

    def load(self, folder: Path) -> int:
        """Everything as it was after the step that is returned."""
        cursor = load_state(folder, self.backbone, self.optimizers)
        self.order = cursor["order"]
        self.shuffle.set_state(cursor["shuffle"])
        return int(cursor["step"])

    # The start

    def first_ratio(self, experience: Experience) -> Metrics:
        """π/π_old of a training forward before any update: 1, or the update and the scoring disagree."""
        with self.backbone.use("policy", train=True):
            logps = self.current_logps(experience.batch).detach()
        return {"val/ratio": float(masked_mean((logps - experience.token_logps).exp(), experience.mask))}

    def check_start(self, metrics: Metrics) -> None:
        """KL to the reference is 0 before any update, unless the recipe asked for another start.

        Raises:
            RuntimeError: it is not, so the reference is not what the policy started from.
        """
        literal_base = self.recipe.reference == "base" and self.recipe.policy_from is not None
        if literal_base:
            print(f"ppo: reference: base after SFT, so KL starts at {metrics['objective/kl']:.2f} nats, not 0")
        elif abs(metrics["objective/kl"]) > 1e-3:
            raise RuntimeError(f"KL to the reference is {metrics['objective/kl']} nats before any update, expected 0")


def start_policy(recipe: PPORecipe, backbone: Backbone) -> None:
    """Add `policy`, a copy of the run in `policy_from` or zero, and resolve the reference."""
    if recipe.policy_from is None:
        if recipe.reference == "start":
            print("ppo: reference: start is the base itself here, the policy starts at zero", flush=True)
        backbone.add_role("policy", recipe.lora)
        backbone.reference_role = None
        return
    load_run_role(backbone, recipe.policy_from, "sft", "start", key="policy_from")
    backbone.copy_role("start", "policy")
    backbone.reference_role = None if recipe.reference == "base" else "start"


def start_value(recipe: PPORecipe, backbone: Backbone) -> None:
    """Add `value` as `value_model.init` says; a copy of a reward brings its head, else the head starts at zero."""
    init = recipe.value_model.init
    if init == "auto":
        init = "reward" if "reward" in backbone.roles else "zero"
    if init == "zero":
        backbone.add_role("value", recipe.lora, head=True)
        return
    if init not in backbone.roles:
        raise UserError("value_model.init: reward needs a reward run in reward_from; use zero or policy")
    backbone.copy_role(init, "value")
    if "value" not in backbone.heads:
        backbone.add_head("value")
