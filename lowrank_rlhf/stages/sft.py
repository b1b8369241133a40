"""Supervised fine-tuning: trl's SFTTrainer over the `sft` role of the one base."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Rollout, SFTRecipe
from lowrank_rlhf.data import Example, Renderer, data_report, load_demonstrations, print_report, tokenize_demonstrations
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.rollout import generate
from lowrank_rlhf.runs import Run, write_atomic
from lowrank_rlhf.stages.run_trainer import refuse_uneven
from lowrank_rlhf.stages.sft_trainer import ROLE, build_trainer

SAMPLES = 5


def train(recipe: SFTRecipe, run: Run) -> None:
    """Train the `sft` role and save it in the run; metrics hold `eval_loss` from step 0 on."""
    refuse_uneven(recipe.train)
    train_examples, eval_examples = load_demonstrations(recipe.data)
    torch.manual_seed(recipe.seed)
    backbone = Backbone(recipe.base)
    backbone.most_rows = MostRows("sft", unit=None if recipe.train.packing else 1)
    backbone.add_role(ROLE, recipe.lora)
    backbone.train_only(ROLE)
    if recipe.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
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
    if processes.is_main():
        write_samples(recipe, backbone, renderer, (eval_examples or train_examples)[:SAMPLES], run.dir / "samples.md")
    run.save_role(backbone, ROLE, final)
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
