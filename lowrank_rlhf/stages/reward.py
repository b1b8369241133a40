"""Reward modelling: a Bradley–Terry loss over the `reward` role and its fp32 head."""

from collections.abc import Sequence as SequenceOf

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.checkpoints import load_state, save_state
from lowrank_rlhf.config import RewardRecipe
from lowrank_rlhf.data import Example, Renderer, Sequence, Sizes, data_report, load_preferences, pad_batch, print_report
from lowrank_rlhf.data.batches import chunks
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.evaluation.intervals import bootstrap_mean
from lowrank_rlhf.losses import bradley_terry_loss
from lowrank_rlhf.progress import Progress, progress
from lowrank_rlhf.runs import Run, load_run_role
from lowrank_rlhf.scoring import score_sequences
from lowrank_rlhf.stages.early_stopping import Best
from lowrank_rlhf.stages.optim import optimizer_and_schedule

ROLE = "reward"
Pair = tuple[Sequence, Sequence]  # chosen, rejected


def train(recipe: RewardRecipe, run: Run) -> None:
    """Train the `reward` role and save it with its head; metrics hold held-out loss and accuracy from step 0 on."""
    train_examples, eval_examples = load_preferences(recipe.data)
    torch.manual_seed(recipe.seed)
    backbone = Backbone(recipe.base)
    if recipe.reward_model.init_from:
        load_run_role(backbone, recipe.reward_model.init_from, "sft", ROLE, key="reward_model.init_from")
        backbone.add_head(ROLE)
    else:
        backbone.add_role(ROLE, recipe.lora, head=True)
    backbone.train_only(ROLE)
    if recipe.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
    pairs, eval_pairs = tokenize(train_examples, renderer), tokenize(eval_examples, renderer)
    sizes = Sizes.of(sequence for pair in pairs for sequence in pair)
    report = data_report("preferences", train_examples, eval_examples, renderer, sizes)
    print_report(report)
    run.start(backbone, data_hash(recipe.data), data_report=report)

    prompts = [e.prompt_key for e in eval_examples]
    if run.checkpoint is None:
        run.log(0, evaluate(backbone, eval_pairs, prompts, recipe.train.micro_batch_size))
    optimize(recipe, backbone, run, pairs, eval_pairs, prompts)
    last = evaluate(backbone, eval_pairs, prompts, recipe.train.micro_batch_size)
    run.save_role(backbone, ROLE, last)
    run.finish(**last)
    if last:
        low, high = last["eval_accuracy_low"], last["eval_accuracy_high"]
        print(f"accuracy {last['eval_accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    print(f"reward: saved in {run.dir}", flush=True)


def tokenize(examples: SequenceOf[Example], renderer: Renderer) -> list[Pair]:
    return [
        (
            renderer.sequence(e.prompt, e.chosen or [], e.where),
            renderer.sequence(e.prompt, e.rejected or [], e.where),
        )
        for e in progress(examples, "tokenising", len(examples))
    ]


def optimize(
    recipe: RewardRecipe,
    backbone: Backbone,
    run: Run,
    pairs: list[Pair],
    eval_pairs: list[Pair],
    prompts: list[str],
) -> None:
    """The training loop: shuffle, split into steps, accumulate micro-batches, step."""
    train = recipe.train
    steps_per_epoch = -(-len(pairs) // train.batch_size)
    steps = train.max_steps or max(1, round(train.epochs * steps_per_epoch))
    optimizer, schedule = optimizer_and_schedule(backbone.parameters(ROLE), train, steps)
    shuffle = torch.Generator().manual_seed(recipe.seed)
    order: list[list[int]] = []
    done = 0
    optimizers = {ROLE: (optimizer, schedule)}
    best = Best(backbone.parameters(ROLE), recipe.eval)
    if run.checkpoint:
        cursor = load_state(run.checkpoint, backbone, optimizers)
        done, order = cursor["step"], cursor["order"]
        shuffle.set_state(cursor["shuffle"])
        best.load_state_dict(cursor["best"])
    line = Progress("reward", steps, done)
    for step in range(done + 1, steps + 1):
        if not order:
            order = chunks(torch.randperm(len(pairs), generator=shuffle).tolist(), train.batch_size)
        loss, accuracy, tokens = step_gradients(backbone, [pairs[i] for i in order.pop(0)], train.micro_batch_size)
        grad_norm = torch.nn.utils.clip_grad_norm_(backbone.parameters(ROLE), train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        metrics = {"loss": loss, "rewards/accuracies": accuracy, "grad_norm": float(grad_norm)}
        speed = line.step(step, tokens, loss=loss, accuracy=accuracy)
        run.log(step, {**metrics, "lr": float(schedule.get_last_lr()[0]), **speed})
        if recipe.eval.steps and (step % recipe.eval.steps == 0 or step == steps):
            held_out = evaluate(backbone, eval_pairs, prompts, train.micro_batch_size)
            run.log(step, held_out)
            if held_out and best.update(-held_out["eval_accuracy"]):
                print(f"reward: no better held-out accuracy for {recipe.eval.patience} evaluations, stopping")
                break
        if run.is_due(step) and step < steps:
            with run.write_checkpoint(step) as folder:
                cursor = {"step": step, "order": order, "shuffle": shuffle.get_state(), "best": best.state_dict()}
                save_state(folder, backbone, optimizers, **cursor)
    best.restore()


def step_gradients(backbone: Backbone, pairs: list[Pair], micro_batch_size: int) -> tuple[float, float, int]:
    """Accumulate the gradient of the mean loss over `pairs`; a pair shares one forward.

    Returns:
        mean loss, accuracy, tokens seen.
    """
    loss_sum, correct, tokens = 0.0, 0, 0
    with backbone.use(ROLE, train=True):
        for group in chunks(range(len(pairs)), micro_batch_size):
            both = [pairs[i][0] for i in group] + [pairs[i][1] for i in group]
            batch = pad_batch(both, backbone.info.pad_token_id).to(backbone.model.device)
            chosen, rejected = backbone.scores(ROLE, batch.input_ids, batch.attention_mask).chunk(2)
            loss = bradley_terry_loss(chosen, rejected).sum() / len(pairs)
            loss.backward()
            loss_sum += float(loss.detach())
            correct += int((chosen > rejected).sum())
            tokens += int(batch.attention_mask.sum())
    return loss_sum, correct / len(pairs), tokens


def evaluate(backbone: Backbone, pairs: list[Pair], prompts: list[str], micro_batch_size: int) -> dict[str, float]:
    """Held-out loss and accuracy, with a 95 % interval by prompt; a tie counts as half right."""
    if not pairs:
        return {}
    flat = [sequence for pair in pairs for sequence in pair]
    scores = torch.tensor(score_sequences(backbone, ROLE, flat, 2 * micro_batch_size)).view(-1, 2)
    margins = scores[:, 0] - scores[:, 1]
    right = torch.where(margins == 0, 0.5, (margins > 0).float())
    accuracy, low, high = bootstrap_mean(right.tolist(), prompts)
    return {
        "eval_loss": float(bradley_terry_loss(scores[:, 0], scores[:, 1]).mean()),
        "eval_accuracy": accuracy,
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_margin": float(margins.mean()),
    }
