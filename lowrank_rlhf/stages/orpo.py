"""Odds-ratio preference optimisation: SFT on the chosen answers that also pushes the rejected ones away; no reference.

    L = −log P(chosen) − λ log σ(log odds(chosen) − log odds(rejected)),  odds = P / (1 − P)

Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7; P is per token. All answers of a row are in one batch and each goes
through the base once; every row counts once, however many pairs it has.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.checkpoints import load_state, save_state
from lowrank_rlhf.config_preference import ORPORecipe
from lowrank_rlhf.data import Batch, Renderer, Sizes, data_report, load_preferences, pad_batch, print_report
from lowrank_rlhf.data.batches import chunks
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
from lowrank_rlhf.losses import orpo_loss
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.progress import Progress
from lowrank_rlhf.runs import Run
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
from lowrank_rlhf.stages.held_out import before_and_after
from lowrank_rlhf.stages.optim import optimizer_and_schedule
from lowrank_rlhf.stages.policy_start import POLICY, refuse_dropout, start_policy

Metrics = dict[str, float]


def train(recipe: ORPORecipe, run: Run) -> None:
    """Train the `policy` role and save it in the run; metrics hold held-out loss and accuracy from step 0 on."""
    refuse_dropout(recipe.lora)
    train_examples, eval_examples = load_preferences(recipe.data)
    torch.manual_seed(recipe.seed)
    backbone = Backbone(recipe.base)
    backbone.most_rows = MostRows("orpo", unit=2)
    start_policy(backbone, recipe.lora, recipe.policy_from, keep_start=False)
    backbone.train_only(POLICY)
    if recipe.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
    comparisons, held_out = tokenize(train_examples, renderer), tokenize(eval_examples, renderer)
    sizes = Sizes.of(answer for comparison in comparisons for answer in comparison.answers)
    report = data_report("preferences", train_examples, eval_examples, renderer, sizes)
    report["equal_pairs"] = equal_pairs(comparisons)
    print_report(report)
    run.start(backbone, data_hash(recipe.data), data_report=report)

    training = Training(recipe, backbone, run, comparisons, held_out)
    if run.checkpoint is None:
        training.evaluate(0)
    last = training.evaluate(training.train())
    final = before_and_after("orpo", run, last) if last else {}
    run.save_role(backbone, POLICY, final)
    run.finish(**final)
    print(f"orpo: saved in {run.dir}", flush=True)


class Training:
    """The loop: shuffle, split into steps, accumulate micro-batches, step."""

    def __init__(
        self,
        recipe: ORPORecipe,
        backbone: Backbone,
        run: Run,
        comparisons: list[Comparison],
        held_out: list[Comparison],
    ):
        self.recipe, self.backbone, self.run = recipe, backbone, run
        self.comparisons, self.held_out = comparisons, held_out
        train = recipe.train
        self.order = Order(comparisons, balance_length=False, seed=recipe.seed)
        self.steps = train.max_steps or max(1, round(train.epochs * -(-len(self.order) // train.batch_size)))
        self.batches: list[list[int]] = []
        self.best = Best(backbone.parameters(POLICY), recipe.eval)
        self.optimizer, self.schedule = optimizer_and_schedule(backbone.parameters(POLICY), train, self.steps)

    def train(self) -> int:
        """The number of steps after which it ended."""
        done = step = self.load() if self.run.checkpoint else 0
        line = Progress("orpo", self.steps, done)
        every = self.recipe.eval.steps
        for step in range(done + 1, self.steps + 1):
            metrics, tokens = self.step()
            speed = line.step(step, tokens, loss=metrics["loss"], accuracy=metrics["rewards/accuracies"])
            self.run.log(step, metrics | speed)
            due = every and self.held_out and (step % every == 0 or step == self.steps)
            if due and self.best.update(self.evaluate(step)["eval_loss"]):
                print(f"orpo: no better held-out loss for {self.best.patience} evaluations, stopping", flush=True)
                break
            if self.run.is_due(step) and step < self.steps:
                self.save(step)
        self.best.restore()
        return step

    def step(self) -> tuple[Metrics, int]:
        train = self.recipe.train
        if not self.batches:
            self.batches = chunks(self.order.epoch(), train.batch_size)
        batch = [self.comparisons[i] for i in self.batches.pop(0)]
        metrics, tokens = step_gradients(self.backbone, batch, train.micro_batch_size, self.recipe.orpo.beta)
        norm = torch.nn.utils.clip_grad_norm_(self.backbone.parameters(POLICY), train.max_grad_norm)
        metrics |= {"grad_norm": float(norm), "lr": float(self.schedule.get_last_lr()[0])}
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics, tokens

    def evaluate(self, step: int) -> Metrics:
        """Judge on the held-out rows, log it and say it."""
        metrics = evaluate(self.backbone, self.held_out, self.recipe.train.micro_batch_size, self.recipe.orpo.beta)
        self.run.log(step, metrics)
        if metrics:
            figures = f"loss {metrics['eval_loss']:.3f}  accuracy {metrics['eval_accuracy']:.3f}"
            print(f"orpo held out, step {step}  {figures}", flush=True)
        return metrics

    def save(self, step: int) -> None:
        with self.run.write_checkpoint(step) as folder:
            cursor = {"step": step, "batches": self.batches, "shuffle": self.order.generator.get_state()}
            optimizers = {POLICY: (self.optimizer, self.schedule)}
            save_state(folder, self.backbone, optimizers, **cursor, best=self.best.state_dict())

    def load(self) -> int:
        """Everything as it was after the step that is returned."""
        assert self.run.checkpoint is not None
        cursor = load_state(self.run.checkpoint, self.backbone, {POLICY: (self.optimizer, self.schedule)})
        self.batches = cursor["batches"]
        self.order.generator.set_state(cursor["shuffle"])
        self.best.load_state_dict(cursor["best"])
        return int(cursor["step"])


def step_gradients(
    backbone: Backbone, comparisons: list[Comparison], micro_batch_size: int, beta: float
) -> tuple[Metrics, int]:
    """Accumulate the gradient of the mean loss over `comparisons`; each counts once.

    Of several processes each takes its share of them.

    Returns:
        means of the loss and of trl's figures, and the number of tokens.
    """
    sums: Metrics = {}
    tokens = 0
    with backbone.use(POLICY, train=True):
        for group in micro_batches(processes.share(comparisons), pairs_that_fit(backbone, micro_batch_size)):

            def learn(group: list[Comparison] = group) -> tuple[Metrics, int]:
                batch = padded(backbone, group)
                loss, weights, figures = pair_losses(group, mean_logps(backbone, batch), beta)
                ((weights * loss).sum() / len(comparisons)).backward()
                shares = {name: float((weights * v).sum()) / len(comparisons) for name, v in figures.items()}
                return shares, int(batch.attention_mask.sum())

            shares, count = backbone.learn(sum(len(c.answers) for c in group), learn)
            sums = {name: sums.get(name, 0.0) + share for name, share in shares.items()}
            tokens += count
    processes.add_gradients(backbone.parameters(POLICY))
    parts = processes.gather((sums, tokens))
    names = parts[0][0]  # the main process has a comparison of every batch
    return {name: sum(found.get(name, 0.0) for found, _ in parts) for name in names}, sum(count for _, count in parts)


@torch.no_grad()
def evaluate(backbone: Backbone, comparisons: list[Comparison], micro_batch_size: int, beta: float) -> Metrics:
    """Held-out figures, and how often the better answer is likelier per token, with a 95 % interval by prompt."""
    if not comparisons:
        return {}
    groups = list(micro_batches(comparisons, micro_batch_size))
    with backbone.use(POLICY):
        mine = [mean_logps(backbone, padded(backbone, group)).cpu() for group in processes.share(groups)]
        logps = torch.cat(processes.together(mine)).double()
    ordered = [comparison for group in groups for comparison in group]
    _, weights, figures = pair_losses(ordered, logps, beta)
    owner = torch.repeat_interleave(torch.tensor([len(c.pairs) for c in ordered]))
    by_row = weights.new_zeros(len(ordered)).index_add(0, owner, weights * figures["rewards/accuracies"])
    accuracy, low, high = bootstrap_mean(by_row, [c.prompt_key for c in ordered])
    means = {f"eval_{name}": float((weights * values).sum()) / len(ordered) for name, values in figures.items()}
    return means | {"eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high}


def padded(backbone: Backbone, group: SequenceOf[Comparison]) -> Batch:
    batch = pad_batch([answer for c in group for answer in c.answers], backbone.info.pad_token_id)
    return batch.to(backbone.model.device)


def mean_logps(backbone: Backbone, batch: Batch) -> Tensor:
    """log p per completion token of each row under the role that is on, nats. Shape (B,)."""
    logps, _ = backbone.token_logps(batch.input_ids, batch.attention_mask, batch.completion_mask)
    return logps.sum(dim=1) / batch.completion_mask.sum(dim=1)


def pair_losses(group: SequenceOf[Comparison], logps: Tensor, beta: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss and the weight of every pair, and trl's figures of it by name; a tie is half right.

    Args:
        logps: per token, of the group's answers, in order. Shape (A,).

    Returns:
        loss and weights of shape (P,), the weights of a row's pairs summing to 1; figures of shape (P,) each.
    """
    better, worse, _, weights = pairs_of(group, logps)
    loss, log_odds_ratio = orpo_loss(better, worse, beta=beta)
    chosen, rejected = better.detach(), worse.detach()
    figures = {
        "loss": loss.detach(),
        "nll_loss": -chosen,
        "log_odds_chosen": log_odds_ratio.detach(),
        "log_odds_ratio": torch.nn.functional.logsigmoid(log_odds_ratio.detach()),
        "rewards/accuracies": torch.where(chosen == rejected, 0.5, (chosen > rejected).to(chosen)),
        "rewards/margins": beta * (chosen - rejected),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return loss, weights, figures
