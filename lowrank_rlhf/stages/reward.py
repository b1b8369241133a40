"""Reward modelling: a Bradley–Terry loss over the `reward` role and its fp32 head, or over several of them.

Of a row with K answers all pairs are in one batch and each answer is scored once (Ouyang et al. 2022,
arXiv:2203.02155, section 3.5); every row counts once, however many pairs it has.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.checkpoints import load_state, save_state
from lowrank_rlhf.config import RewardModel, RewardRecipe
from lowrank_rlhf.data import Batch, Renderer, Sizes, data_report, load_preferences, pad_batch, print_report
from lowrank_rlhf.data.batches import chunks
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
from lowrank_rlhf.losses import bradley_terry_loss, centering_loss
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.progress import Progress
from lowrank_rlhf.rewards import member_names, members_line
from lowrank_rlhf.runs import Run, load_run_role
from lowrank_rlhf.scoring import score_sequences
from lowrank_rlhf.stages.comparisons import (
    Comparison,
    Order,
    equal_pairs,
    micro_batches,
    pairs_of,
    pairs_that_fit,
    tokenize,
)
from lowrank_rlhf.stages.early_stopping import Best
from lowrank_rlhf.stages.optim import optimizer_and_schedule

ROLE = "reward"
Metrics = dict[str, float]


def train(recipe: RewardRecipe, run: Run) -> None:
    """Train the `reward` role, or each member of an ensemble, and save them with their heads.

    Metrics hold held-out loss and accuracy from step 0 on; the members' steps follow each other.
    """
    train_examples, eval_examples = load_preferences(recipe.data)
    backbone = Backbone(recipe.base)
    backbone.most_rows = MostRows("reward", unit=2)
    roles = member_names(ROLE, recipe.reward_model.members)
    for i, role in enumerate(roles):
        torch.manual_seed(recipe.seed + i)
        start(recipe, backbone, role)
    if recipe.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
    comparisons, held_out = tokenize(train_examples, renderer), tokenize(eval_examples, renderer)
    sizes = Sizes.of(answer for comparison in comparisons for answer in comparison.answers)
    report = data_report("preferences", train_examples, eval_examples, renderer, sizes)
    report["equal_pairs"] = equal_pairs(comparisons)
    print_report(report)
    run.start(backbone, data_hash(recipe.data), data_report=report)

    if run.checkpoint is None:
        run.log(0, evaluate(backbone, roles[:1], held_out, recipe.train.micro_batch_size))
    for member in range(len(roles)):
        Training(recipe, backbone, run, comparisons, held_out, member).train()
    last = evaluate(backbone, roles, held_out, recipe.train.micro_batch_size)
    for role in roles:
        run.save_role(backbone, role, last)
    run.finish(**last)
    if last:
        low, high = last["eval_accuracy_low"], last["eval_accuracy_high"]
        print(f"accuracy {last['eval_accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    print(f"reward: {members_line(backbone, roles)}; saved in {run.dir}", flush=True)


def start(recipe: RewardRecipe, backbone: Backbone, role: str) -> None:
    """Add `role`, at zero or as a copy of an SFT run's adapter, with a head at zero."""
    settings = recipe.reward_model
    if settings.init_from:
        load_run_role(backbone, settings.init_from, "sft", role, key="reward_model.init_from")
    else:
        backbone.add_role(role, recipe.lora)
    backbone.add_head(role, settings.pooling)


class Training:
    """The loop of one member: shuffle, split into steps, accumulate micro-batches, step."""

    def __init__(
        self,
        recipe: RewardRecipe,
        backbone: Backbone,
        run: Run,
        comparisons: list[Comparison],
        held_out: list[Comparison],
        member: int,
    ):
        self.recipe, self.backbone, self.run = recipe, backbone, run
        self.comparisons, self.held_out = comparisons, held_out
        self.role = member_names(ROLE, member + 1)[-1]
        train, settings = recipe.train, recipe.reward_model
        self.order = Order(comparisons, balance_length=settings.balance_length, seed=recipe.seed + member)
        self.steps = train.max_steps or max(1, round(train.epochs * -(-len(self.order) // train.batch_size)))
        self.first, self.total = member * self.steps, settings.members * self.steps  # steps of the whole run
        self.batches: list[list[int]] = []
        self.best = Best(backbone.parameters(self.role), recipe.eval)

    def train(self) -> None:
        run, step = self.run, int(self.run.checkpoint.name.rpartition("-")[2]) if self.run.checkpoint else 0
        if step > self.first + self.steps:
            return  # the checkpoint is of a later member
        self.backbone.train_only(self.role)
        self.optimizer, self.schedule = optimizer_and_schedule(
            self.backbone.parameters(self.role), self.recipe.train, self.steps
        )
        done = self.load() if run.checkpoint and step > self.first else self.first
        line = Progress("reward", self.total, done)
        for step in range(done + 1, self.first + self.steps + 1):
            metrics, tokens = self.step()
            speed = line.step(step, tokens, loss=metrics["loss"], accuracy=metrics["rewards/accuracies"])
            run.log(step, metrics | speed)
            if self.evaluate(step):
                print(f"reward: no better held-out accuracy for {self.recipe.eval.patience} evaluations, stopping")
                break
            if run.is_due(step) and step < self.total:
                self.save(step)
        self.best.restore()

    def step(self) -> tuple[Metrics, int]:
        train = self.recipe.train
        if not self.batches:
            self.batches = chunks(self.order.epoch(), train.batch_size)
        batch = [self.comparisons[i] for i in self.batches.pop(0)]
        metrics, tokens = step_gradients(
            self.backbone, self.role, batch, train.micro_batch_size, self.recipe.reward_model
        )
        norm = torch.nn.utils.clip_grad_norm_(self.backbone.parameters(self.role), train.max_grad_norm)
        metrics |= {"grad_norm": float(norm), "lr": float(self.schedule.get_last_lr()[0])}
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics, tokens

    def evaluate(self, step: int) -> bool:
        """Judge on the held-out rows where it is time to; whether the training is to stop."""
        every = self.recipe.eval.steps
        if not every or not self.held_out or (step % every and step < self.first + self.steps):
            return False
        metrics = evaluate(self.backbone, [self.role], self.held_out, self.recipe.train.micro_batch_size)
        self.run.log(step, metrics)
        print(
            f"reward held out, step {step}  loss {metrics['eval_loss']:.3f}  accuracy {metrics['eval_accuracy']:.3f}",
            flush=True,
        )
        return self.best.update(-metrics["eval_accuracy"])

    def save(self, step: int) -> None:
        with self.run.write_checkpoint(step) as folder:
            cursor = {"step": step, "batches": self.batches, "shuffle": self.order.generator.get_state()}
            optimizers = {self.role: (self.optimizer, self.schedule)}
            save_state(folder, self.backbone, optimizers, **cursor, best=self.best.state_dict())

    def load(self) -> int:
        """Everything as it was after the step that is returned."""
        assert self.run.checkpoint is not None
        cursor = load_state(self.run.checkpoint, self.backbone, {self.role: (self.optimizer, self.schedule)})
        self.batches = cursor["batches"]
        self.order.generator.set_state(cursor["shuffle"])
        self.best.load_state_dict(cursor["best"])
        return int(cursor["step"])


def step_gradients(
    backbone: Backbone, role: str, comparisons: list[Comparison], micro_batch_size: int, settings: RewardModel
) -> tuple[Metrics, int]:
    """Accumulate the gradient of the mean loss over `comparisons`; each counts once, and its pairs share a forward.

    Of several processes each takes its share of them.

    Returns:
        mean loss, accuracy, score and margin, and the number of tokens.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    with backbone.use(role, train=True):
        for group in micro_batches(processes.share(comparisons), pairs_that_fit(backbone, micro_batch_size)):
            batch = pad_batch([a for c in group for a in c.answers], backbone.info.pad_token_id)

            def learn(group: list[Comparison] = group, batch: Batch = batch) -> Tensor:
                batch = batch.to(backbone.model.device)
                scores = backbone.scores(role, batch.input_ids, batch.attention_mask)
                better, worse, margins, weights = pairs_of(group, scores)
                loss = bradley_terry_loss(better, worse, margin=margins, label_smoothing=settings.label_smoothing)
                pull = settings.center_coef * centering_loss(better, worse)
                ((weights * (loss + pull)).sum() / len(comparisons)).backward()
                wins = torch.where(better == worse, 0.5, (better > worse).float())
                figures = torch.stack([loss, wins, (better + worse) / 2, better - worse]).detach()
                return (weights * figures).sum(dim=1).double().cpu()

            sums += backbone.learn(len(batch.input_ids), learn)
            tokens += int(batch.attention_mask.sum())
    processes.add_gradients(backbone.parameters(role))
    sums, tokens = (sum(parts) for parts in zip(*processes.gather((sums, tokens)), strict=True))
    names = ("loss", "rewards/accuracies", "rewards/mean", "rewards/margins")
    return dict(zip(names, (sums / len(comparisons)).tolist(), strict=True)), tokens


@torch.no_grad()
def evaluate(
    backbone: Backbone, roles: SequenceOf[str], comparisons: list[Comparison], micro_batch_size: int
) -> Metrics:
    """Held-out loss and accuracy of the members' mean score, with a 95 % interval by prompt; a tie is half right."""
    if not comparisons:
        return {}
    answers = [answer for comparison in comparisons for answer in comparison.answers]
    mine = processes.share(answers)
    passes = [processes.together(score_sequences(backbone, role, mine, 2 * micro_batch_size)) for role in roles]
    members = torch.tensor(passes, dtype=torch.float64)
    better, worse, _, weights = pairs_of(comparisons, members.mean(dim=0))
    right = torch.where(better == worse, 0.5, (better > worse).double())
    owner = torch.repeat_interleave(torch.tensor([len(c.pairs) for c in comparisons]))
    by_row = torch.zeros(len(comparisons), dtype=torch.float64).index_add(0, owner, weights * right)
    accuracy, low, high = bootstrap_mean(by_row.tolist(), [c.prompt_key for c in comparisons])
    metrics = {
        "eval_loss": float((weights * bradley_terry_loss(better, worse)).sum()) / len(comparisons),
        "eval_accuracy": accuracy,
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_margin": float((weights * (better - worse)).sum()) / len(comparisons),
        "eval_mean_score": float(members.mean()),
    }
    if len(roles) > 1:
        metrics["eval_disagreement"] = float(members.std(dim=0, correction=0).mean())
    return metrics
