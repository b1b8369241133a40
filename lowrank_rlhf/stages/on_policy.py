"""What PPO and GRPO share of an iteration: roll out with `policy`, judge, compare with the reference, without gradient.

The unit of work is a micro-batch fixed for the iteration: the old log-probs and the update run on the same padded
tensors, so that the first ratio is exactly 1 also in NF4, where another padding gives other log-probs. A minibatch is a
random part of the batch, sorted by length within, so that little is padded; docs/ppo.md lists every detail.
"""

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from lowrank_rlhf.advantages import token_rewards
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import OnPolicyRecipe
from lowrank_rlhf.data import Example, Renderer, Sequence, load_prompts, pad_batch
from lowrank_rlhf.data.batches import by_length, chunks
from lowrank_rlhf.data.report import data_report
from lowrank_rlhf.data.tokenized import Sizes
from lowrank_rlhf.evaluation.texts import rollout_texts
from lowrank_rlhf.kl import AdaptiveKL, clip_kl, kl_per_token
from lowrank_rlhf.panel import Line
from lowrank_rlhf.phases import Phases
from lowrank_rlhf.progress import progress
from lowrank_rlhf.rewards import load_rewards
from lowrank_rlhf.rollout import generate
from lowrank_rlhf.rollout_samples import show_samples
from lowrank_rlhf.runs import WARNINGS, Run
from lowrank_rlhf.scoring import policy_logps
from lowrank_rlhf.shaping import RunningMoments, shape_scores
from lowrank_rlhf.stability import Watch
from lowrank_rlhf.stability_rules import KL_BUDGET
from lowrank_rlhf.stages.experience import (
    Metrics,
    Rollouts,
    Said,
    align,
    in_order,
    kl_of_completions,
    objective_metrics,
)
from lowrank_rlhf.stages.on_policy_start import start_roles
from lowrank_rlhf.stages.policy_start import REFERENCE
from lowrank_rlhf.stages.prompt_order import PromptOrder


class OnPolicy:
    """The policy on its base with prompts, rewards and reference; what is watched, and how strong the leash is.

    Args:
        minibatches: optimizer steps that a pass over the batch is cut into.
        group_size: completions of each prompt, one after the other in the batch.
    """

    def __init__(self, recipe: OnPolicyRecipe, *, minibatches: int, group_size: int = 1):
        self.recipe, self.minibatches, self.group_size = recipe, minibatches, group_size
        self.completions = recipe.train.batch_size * group_size
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
        self.kl = AdaptiveKL(recipe.kl.coef, recipe.kl.target, recipe.kl.horizon)
        self.moments = RunningMoments()
        budget = max(KL_BUDGET, 2 * (recipe.kl.target or 0))
        self.watch = Watch(self.completions, recipe.data.max_completion_tokens, budget, stage=recipe.stage)
        self.phases = Phases()
        self.shuffle = torch.Generator().manual_seed(recipe.seed)

    def collect(self) -> tuple[list[Rollouts], Metrics]:
        """Roll out one batch and compute everything about it that needs neither gradient nor values."""
        examples = [e for e in self.order.take(self.recipe.train.batch_size) for _ in range(self.group_size)]
        with self.phases("generate"):
            sequences = self.roll_out(examples)
        with self.phases("reward"):
            scores, metrics = self.judge(examples, sequences)
        with self.phases("score"):
            groups = self.micro_batches(sequences)
            rollouts = [self.score(m, rows, [sequences[i] for i in rows], scores[rows]) for m, rows in groups]
        texts = [self.renderer.decode(s.completion_ids) for s in sequences]
        self.said = Said(examples, texts, scores.tolist(), in_order(kl_of_completions(rollouts), rollouts))
        return rollouts, objective_metrics(rollouts, self.kl.coef) | metrics | rollout_texts(texts)

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
        train = self.recipe.train
        order = torch.randperm(len(sequences), generator=self.shuffle).tolist()
        return [
            (minibatch, rows)
            for minibatch, part in enumerate(chunks(order, len(sequences) // self.minibatches))
            for rows in by_length(sequences, part, train.micro_batch_size, train.micro_batch_tokens)
        ]

    @torch.no_grad()
    def score(self, minibatch: int, rows: list[int], sequences: SequenceOf[Sequence], scores: Tensor) -> Rollouts:
        """Old log-probs, reference log-probs and token rewards of one micro-batch."""
        backbone, recipe = self.backbone, self.recipe
        batch = pad_batch(sequences, backbone.info.pad_token_id).to(backbone.model.device)
        temperature = recipe.rollout.temperature
        logps, entropy = policy_logps(backbone, "policy", batch, temperature)
        reference_logps, _ = policy_logps(backbone, backbone.reference_role, batch, temperature)
        logps, reference_logps, entropy, mask = (
            align(x, batch.completion_mask) for x in (logps, reference_logps, entropy, batch.completion_mask)
        )
        scores = scores.to(logps)
        kl = clip_kl(kl_per_token(logps, reference_logps, recipe.kl.estimator), recipe.kl.clip)
        rewards = token_rewards(scores, kl, mask, kl_coef=self.kl.coef if recipe.kl.in_reward else 0.0)
        return Rollouts(minibatch, rows, batch, mask, logps, reference_logps, entropy, scores, rewards)

    def end_iteration(self, step: int, kl: float) -> None:
        """Steer the KL coefficient, and move the reference where it is time to."""
        self.kl.update(kl, self.completions)
        every = self.recipe.kl.refresh_steps
        if every and step % every == 0:
            self.backbone.copy_weights("policy", REFERENCE)

    # What a person sees

    def speed(self, rollouts: SequenceOf[Rollouts]) -> Metrics:
        """Seconds, memory and tokens per second of the iteration's phases."""
        tokens = sum(int(part.batch.attention_mask.sum()) for part in rollouts)
        new = sum(int(part.mask.sum()) for part in rollouts)
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

    def state_dict(self) -> dict[str, Any]:
        steered = {name: getattr(self, name).state_dict() for name in ("order", "kl", "moments", "watch")}
        return steered | {"shuffle": self.shuffle.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("order", "kl", "moments", "watch"):
            getattr(self, name).load_state_dict(state[name])
        self.shuffle.set_state(state["shuffle"])
