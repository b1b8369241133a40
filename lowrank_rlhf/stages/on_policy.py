"""What PPO and GRPO share of an iteration: roll out with `policy`, judge, compare with the reference, without gradient.

The unit of work is a micro-batch fixed for the iteration: the old log-probs and the update run on the same padded
tensors, so that the first ratio is exactly 1 also in NF4, where another padding gives other log-probs. A minibatch is a
random part of the batch, sorted by length within, so that little is padded; docs/ppo.md lists every detail.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, closing, nullcontext
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
from lowrank_rlhf.out_of_memory import LEARN, SCORE, MostRows
from lowrank_rlhf.panel import Line
from lowrank_rlhf.phases import Phases
from lowrank_rlhf.progress import progress
from lowrank_rlhf.rewards import Judging, Scored, Worker, load_rewards
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
    Unjudged,
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
        backbone.most_rows = MostRows(recipe.stage, generation_key="rollout.batch_size")
        self.renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
        sizes = Sizes()
        for e in progress(prompts, "tokenising", len(prompts)):
            ids, cut = self.renderer.prompt(e.prompt, e.where)
            sizes.add(len(ids), 0, cut)
        self.data_report = data_report("prompts", prompts, held_out, self.renderer, sizes)
        start_roles(recipe, backbone)
        self.reward = load_rewards(recipe, backbone, self.renderer, prompts)
        self.worker, self.worker_seconds = Worker(), 0.0
        self.kl = AdaptiveKL(recipe.kl.coef, recipe.kl.target, recipe.kl.horizon)
        self.moments = RunningMoments()
        budget = max(KL_BUDGET, 2 * (recipe.kl.target or 0))
        self.watch = Watch(self.completions, recipe.data.max_completion_tokens, budget, stage=recipe.stage)
        self.phases = Phases()
        self.shuffle = torch.Generator().manual_seed(recipe.seed)

    def collect(self, beside: Callable[[Unjudged], None] = lambda part: None) -> tuple[list[Rollouts], Metrics]:
        """Roll out one batch and compute everything about it that needs no gradient, slow rewards in a worker thread.

        Args:
            beside: what else is computed of each micro-batch while its rewards may not be there yet.
        """
        examples = [e for e in self.order.take(self.recipe.train.batch_size) for _ in range(self.group_size)]
        judges = closing(Judging(self.reward, self.worker, examples, self.group_size))
        with judges as judging:
            with self.phases("generate"):
                sequences = self.roll_out(examples, judging.add)
            with self.phases("reward"):
                judging.add_rest(sequences)
            with self.phases("score"):
                unjudged = []
                for minibatch, rows in self.micro_batches(sequences):
                    unjudged.append(self.score(minibatch, rows, [sequences[i] for i in rows]))
                    beside(unjudged[-1])
            with self.phases("reward"):
                scores, metrics = self.judge(judging.result(), sequences)
                rollouts = [self.with_rewards(part, scores[part.rows]) for part in unjudged]
        texts = [self.renderer.decode(s.completion_ids) for s in sequences]
        self.said = Said(examples, texts, scores.tolist(), in_order(kl_of_completions(rollouts), rollouts))
        self.worker_seconds = judging.seconds
        return rollouts, objective_metrics(rollouts, self.kl.coef) | metrics | rollout_texts(texts)

    def unpacked(self) -> AbstractContextManager[object]:
        """For a whole run: weights also in 16 bit, where log-probs are the same to the bit, so far measured on CPU."""
        return self.backbone.unpacked() if self.backbone.info.device == "cpu" else nullcontext()

    def roll_out(
        self, examples: SequenceOf[Example], finished: Callable[[dict[int, Sequence]], None] | None = None
    ) -> list[Sequence]:
        return generate(
            self.backbone,
            "policy",
            [self.renderer.prompt(e.prompt, e.where)[0] for e in examples],
            self.recipe.rollout,
            max_new_tokens=self.recipe.data.max_completion_tokens,
            stop_ids=self.renderer.stop_ids,
            finished=finished,
        )

    def judge(self, scored: Scored, sequences: SequenceOf[Sequence]) -> tuple[Tensor, Metrics]:
        """The score of each completion after penalties and shaping, and what the sources said."""
        recipe = self.recipe
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
        size = self.backbone.most_rows.of(train.micro_batch_size, LEARN, SCORE)
        order = torch.randperm(len(sequences), generator=self.shuffle).tolist()
        return [
            (minibatch, rows)
            for minibatch, part in enumerate(chunks(order, len(sequences) // self.minibatches))
            for rows in by_length(sequences, part, size, train.micro_batch_tokens)
        ]

    @torch.no_grad()
    def score(self, minibatch: int, rows: list[int], sequences: SequenceOf[Sequence]) -> Unjudged:
        """Old and reference log-probs of one micro-batch."""
        backbone, temperature = self.backbone, self.recipe.rollout.temperature
        batch = pad_batch(sequences, backbone.info.pad_token_id).to(backbone.model.device)
        logps, entropy = policy_logps(backbone, "policy", batch, temperature)
        reference_logps, _ = policy_logps(backbone, backbone.reference_role, batch, temperature)
        logps, reference_logps, entropy, mask = (
            align(x, batch.completion_mask) for x in (logps, reference_logps, entropy, batch.completion_mask)
        )
        return Unjudged(minibatch, rows, batch, mask, logps, reference_logps, entropy)

    @torch.no_grad()
    def with_rewards(self, part: Unjudged, scores: Tensor) -> Rollouts:
        """Its token rewards: the score at the last token, less the KL of each where that is in the reward."""
        recipe, scores = self.recipe, scores.to(part.token_logps)
        kl = kl_per_token(part.token_logps, part.reference_token_logps, recipe.kl.estimator)
        kl_coef = self.kl.coef if recipe.kl.in_reward else 0.0
        rewards = token_rewards(scores, clip_kl(kl, recipe.kl.clip), part.mask, kl_coef=kl_coef)
        return Rollouts(**vars(part), scores=scores, rewards=rewards)

    def end_iteration(self, step: int, kl: float) -> None:
        """Steer the KL coefficient, and move the reference where it is time to."""
        self.kl.update(kl, self.completions)
        every = self.recipe.kl.refresh_steps
        if every and step % every == 0:
            self.backbone.copy_weights("policy", REFERENCE)

    # What a person sees

    def speed(self, rollouts: SequenceOf[Rollouts]) -> Metrics:
        """Seconds, memory and tokens per second of the iteration's phases; how long rewards beside them took."""
        tokens = sum(int(part.batch.attention_mask.sum()) for part in rollouts)
        new = sum(int(part.mask.sum()) for part in rollouts)
        figures = self.phases.metrics({"generate": new, "reward": tokens, "score": tokens, "update": tokens})
        return figures | ({"reward_worker_seconds": self.worker_seconds} if self.worker_seconds else {})

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
