"""PPO on one base: roll out with `policy`, score with `reward`, compare with the reference, update policy and value.

One iteration (Ouyang et al. 2022, arXiv:2203.02155; Schulman et al. 2017, arXiv:1707.06347):

    completions ~ π;  rewards_t = −kl_coef · KL_t, plus the score at the last token;  GAE with V;
    then inner_epochs × minibatches steps of the clipped policy loss and, separately, the clipped value loss.

The unit of work is a micro-batch fixed for the iteration: the old log-probs and the update run on the same padded
tensors, so that the first ratio is exactly 1 also in NF4, where another padding gives other log-probs. A minibatch is a
random part of the batch, sorted by length within, so that little is padded; docs/ppo.md lists every detail.
"""

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lowrank_rlhf.advantages import masked_mean, token_rewards
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.callbacks import Callbacks
from lowrank_rlhf.checkpoints import load_state, save_state
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.data import Example, Renderer, Sequence, load_prompts, pad_batch
from lowrank_rlhf.data.batches import by_length, chunks
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.data.report import data_report, print_report
from lowrank_rlhf.data.tokenized import Sizes
from lowrank_rlhf.evaluation.texts import rollout_texts
from lowrank_rlhf.kl import AdaptiveKL, clip_kl, kl_per_token
from lowrank_rlhf.panel import Line, panel
from lowrank_rlhf.phases import Phases
from lowrank_rlhf.progress import progress
from lowrank_rlhf.rewards import load_rewards
from lowrank_rlhf.rollout import generate, sampling_mismatch
from lowrank_rlhf.rollout_samples import show_samples
from lowrank_rlhf.runs import WARNINGS, Run
from lowrank_rlhf.scoring import policy_logps
from lowrank_rlhf.shaping import RunningMoments, shape_scores
from lowrank_rlhf.stability import Watch
from lowrank_rlhf.stability_rules import KL_BUDGET
from lowrank_rlhf.stages.experience import (
    Experience,
    Metrics,
    Rollouts,
    Said,
    align,
    in_order,
    kl_of_completions,
    objective_metrics,
    with_advantages,
)
from lowrank_rlhf.stages.policy_start import REFERENCE, check_start
from lowrank_rlhf.stages.ppo_start import refuse_contradictions, start_roles, start_value
from lowrank_rlhf.stages.ppo_update import Updater
from lowrank_rlhf.stages.prompt_order import PromptOrder
from lowrank_rlhf.stages.ptx import SFTMix


def train(recipe: PPORecipe, run: Run, callbacks: SequenceOf[TrainerCallback] = ()) -> None:
    """Train the `policy` and `value` roles and save them; metrics row k is the rollout that update k learned from.

    Args:
        callbacks: transformers' `TrainerCallback`s, which hear of every iteration as a step.
    """
    ppo = PPO(recipe)
    run.start(
        ppo.backbone,
        data_hash(recipe.data, recipe.ptx.data),
        reference=ppo.backbone.reference_role or "base",
        data_report=ppo.data_report,
    )
    print_report(ppo.data_report)
    print(f"ppo: reference: {ppo.backbone.reference_role or 'base, adapters off'}", flush=True)
    if mismatch := sampling_mismatch(recipe.rollout):
        print(f"ppo: warning: {mismatch}", flush=True)
    steps = recipe.train.max_steps
    done, heard_state = ppo.load(run.checkpoint) if run.checkpoint else (0, None)
    heard = Callbacks(callbacks, run, max_steps=steps, done=done, model=ppo.backbone.model)
    if heard_state:
        heard.load_state_dict(heard_state)
    metrics: Metrics = {}
    with panel("ppo", steps, done, run.metrics() if done else []) as line, heard:
        for step in range(done + 1, steps + 1):
            heard.on_step_begin()
            metrics = iteration(ppo, run, line, step)
            heard.on_step_end(step, metrics)
            if heard.is_due(step) and step < steps:
                with heard.write_checkpoint(step) as folder:
                    ppo.save(folder, step, heard.state_dict())
    for role in dict.fromkeys(("policy", ppo.value_role)):
        run.save_role(ppo.backbone, role, metrics)
    run.finish(**metrics)
    print(f"ppo: saved in {run.dir}", flush=True)


def iteration(ppo: "PPO", run: Run, line: Line, step: int) -> Metrics:
    """Roll out, learn from it, log it and show it."""
    experiences, metrics = ppo.collect()
    if step == 1:
        first = {**metrics, **ppo.first_ratio(experiences[0])}
        check_start(ppo.backbone, "ppo", "KL", first["objective/kl"], " nats")
        run.log(0, first)
    metrics |= ppo.update(experiences)
    ppo.end_iteration(step, metrics["objective/kl"])
    metrics |= ppo.speed(experiences)
    metrics |= line.step(step, sum(int(e.batch.attention_mask.sum()) for e in experiences), metrics)
    run.log(step, metrics)
    ppo.tell(run, line, step, metrics)
    return metrics


class PPO:
    """The roles on one base, the prompts, the rewards and the optimizers of a PPO run."""

    def __init__(self, recipe: PPORecipe):
        refuse_contradictions(recipe)
        self.recipe = recipe
        prompts, held_out = load_prompts(recipe.data)
        self.order = PromptOrder(prompts, seed=recipe.seed, curriculum=recipe.rollout.curriculum)
        torch.manual_seed(recipe.seed)
        self.backbone = backbone = Backbone(recipe.base)
        self.renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
        sizes = Sizes()
        for e in progress(prompts, "tokenising", len(prompts)):
            ids, cut = self.renderer.prompt(e.prompt, e.where)
            sizes.add(len(ids), 0, cut)
        self.data_report = data_report("prompts", prompts, held_out, self.renderer, sizes)
        start_roles(recipe, backbone)
        self.reward = load_rewards(recipe, backbone, self.renderer, prompts)
        start_value(recipe, backbone)
        self.value_role = "value" if recipe.value_model.trunk == "own" else "policy"
        backbone.train_only(*dict.fromkeys(("policy", self.value_role)))
        backbone.without_dropout("policy", self.value_role)
        if recipe.train.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        rows = recipe.train.batch_size // recipe.ppo.minibatches
        mix = SFTMix(recipe, backbone, self.renderer, rows) if recipe.ptx.data else None
        self.updater = Updater(recipe, backbone, mix)
        self.kl = AdaptiveKL(recipe.kl.coef, recipe.kl.target, recipe.kl.horizon)
        self.moments = RunningMoments()
        budget = max(KL_BUDGET, 2 * (recipe.kl.target or 0))
        self.watch = Watch(recipe.train.batch_size, recipe.data.max_completion_tokens, budget)
        self.phases = Phases()
        self.shuffle = torch.Generator().manual_seed(recipe.seed)

    # Rolling out and scoring

    def collect(self) -> tuple[list[Experience], Metrics]:
        """Roll out one batch and compute everything about it that needs no gradient."""
        recipe = self.recipe
        examples = self.order.take(recipe.train.batch_size)
        with self.phases("generate"):
            sequences = self.roll_out(examples)
        with self.phases("reward"):
            scores, metrics = self.judge(examples, sequences)
        with self.phases("score"):
            groups = self.micro_batches(sequences)
            parts = [self.score(minibatch, [sequences[i] for i in g], scores[g]) for minibatch, g in groups]
        experiences = with_advantages(parts, recipe.ppo, whiten_rewards=recipe.shaping.whiten)
        texts = [self.renderer.decode(s.completion_ids) for s in sequences]
        self.said = Said(examples, texts, scores.tolist(), in_order(kl_of_completions(experiences), groups))
        return experiences, objective_metrics(experiences, self.kl.coef) | metrics | rollout_texts(texts)

    def roll_out(self, examples: SequenceOf[Example]) -> list[Sequence]:
        return generate(
            self.backbone,
            "policy",
            [self.renderer.prompt(e.prompt, e.where)[0] for e in examples],
            self.recipe.rollout,
            max_new_tokens=self.recipe.data.max_completion_tokens,
            stop_ids=self.renderer.stop_ids,
        )

    def judge(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> tuple[Tensor, Metrics]:
        """The score of each completion after penalties and shaping, and what the sources said."""
        recipe = self.recipe
        scored = self.reward(examples, sequences)
        missing_eos = torch.tensor([s.cut for s in sequences])
        lengths = torch.tensor([len(s.completion_ids) for s in sequences])
        raw = torch.tensor(scored.scores, dtype=torch.float64)
        penalty = recipe.rollout.missing_eos_penalty * missing_eos
        shaped = shape_scores(raw, lengths, recipe.shaping, self.moments) - penalty
        metrics = {
            "objective/scores": float((raw - penalty).mean()),
            "objective/disagreement": sum(scored.disagreement) / len(sequences),
            "val/num_eos_tokens": float((~missing_eos).sum()),
            "val/eos_rate": float((~missing_eos).float().mean()),
        }
        parts = {f"objective/scores/{name}": sum(each) / len(each) for name, each in scored.parts.items()}
        return shaped.float(), metrics | parts

    def micro_batches(self, sequences: SequenceOf[Sequence]) -> list[tuple[int, list[int]]]:
        """Which sequences go through the base together, and in which minibatch: random parts, each by length."""
        train, count = self.recipe.train, self.recipe.ppo.minibatches
        order = torch.randperm(len(sequences), generator=self.shuffle).tolist()
        return [
            (minibatch, group)
            for minibatch, part in enumerate(chunks(order, len(sequences) // count))
            for group in by_length(sequences, part, train.micro_batch_size, train.micro_batch_tokens)
        ]

    @torch.no_grad()
    def score(self, minibatch: int, sequences: SequenceOf[Sequence], scores: Tensor) -> Rollouts:
        """Old log-probs, reference log-probs, values and token rewards of one micro-batch."""
        backbone, recipe = self.backbone, self.recipe
        batch = pad_batch(sequences, backbone.info.pad_token_id).to(backbone.model.device)
        temperature = recipe.rollout.temperature
        logps, entropy = policy_logps(backbone, "policy", batch, temperature)
        reference_logps, _ = policy_logps(backbone, backbone.reference_role, batch, temperature)
        with backbone.use(self.value_role):
            values = backbone.values(self.value_role, batch.input_ids, batch.attention_mask, batch.completion_mask)
        logps, reference_logps, entropy, values, mask = (
            align(x, batch.completion_mask) for x in (logps, reference_logps, entropy, values, batch.completion_mask)
        )
        scores = scores.to(values)
        kl = clip_kl(kl_per_token(logps, reference_logps, recipe.kl.estimator), recipe.kl.clip)
        rewards = token_rewards(scores, kl, mask, kl_coef=self.kl.coef if recipe.kl.in_reward else 0.0)
        return Rollouts(minibatch, batch, mask, logps, reference_logps, entropy, values, scores, rewards)

    # Updating

    def update(self, experiences: list[Experience]) -> Metrics:
        """inner_epochs passes over the batch in minibatches; policy and value step separately."""
        minibatches: dict[int, list[Experience]] = {}
        for e in experiences:
            minibatches.setdefault(e.minibatch, []).append(e)
        with self.phases("update"):
            return self.updater(list(minibatches.values()), self.kl.coef, self.shuffle)

    def end_iteration(self, step: int, kl: float) -> None:
        """Steer the KL coefficient, and move the reference where it is time to."""
        self.kl.update(kl, self.recipe.train.batch_size)
        every = self.recipe.kl.refresh_steps
        if every and step % every == 0:
            self.backbone.copy_weights("policy", REFERENCE)

    # What a person sees

    def speed(self, experiences: SequenceOf[Experience]) -> Metrics:
        """Seconds, memory and tokens per second of the iteration's phases."""
        tokens = sum(int(e.batch.attention_mask.sum()) for e in experiences)
        new = sum(int(e.mask.sum()) for e in experiences)
        return self.phases.metrics({"generate": new, "reward": tokens, "score": tokens, "update": tokens})

    def tell(self, run: Run, line: Line, step: int, metrics: Metrics) -> None:
        """Say what looks wrong, and every so often what the policy says."""
        for words in self.watch.update(step, metrics):
            line.warn(step, words)
            run.append(WARNINGS, [{"step": step, "warning": words}])
        every = self.recipe.rollout.show_steps
        if every and (step % every == 0 or step == 1):
            show_samples(run, step, *self.said, say=line.note)

    # Going on

    def save(self, folder: Path, step: int, heard: dict[str, Any]) -> None:
        cursor = {
            "step": step,
            "heard": heard,
            "order": self.order.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "kl": self.kl.state_dict(),
            "moments": self.moments.state_dict(),
            "updater": self.updater.state_dict(),
            "watch": self.watch.state_dict(),
        }
        save_state(folder, self.backbone, self.updater.optimizers, **cursor)

    def load(self, folder: Path) -> tuple[int, dict[str, Any]]:
        """Everything as it was after the step that is returned, and the state of the callbacks."""
        cursor = load_state(folder, self.backbone, self.updater.optimizers)
        for name in ("order", "kl", "moments", "updater", "watch"):
            getattr(self, name).load_state_dict(cursor[name])
        self.shuffle.set_state(cursor["shuffle"])
        return int(cursor["step"]), cursor["heard"]

    # The start

    def first_ratio(self, experience: Experience) -> Metrics:
        """π/π_old of a training forward before any update: 1, or the update and the scoring disagree."""
        with torch.no_grad(), self.backbone.use("policy", train=True):
            batch = experience.batch
            hidden = self.backbone.hidden(batch.input_ids, batch.attention_mask)
            logps, _ = self.updater.current_logps(experience, hidden)
        return {"val/ratio": float(masked_mean((logps - experience.token_logps).exp(), experience.mask))}
