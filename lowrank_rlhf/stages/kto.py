"""Kahneman–Tversky optimisation: trl's KTOTrainer over the `policy` role, for answers with a thumb up or down.

    L = 1 − σ(±β(log π/π_ref(answer) − KL)),  + where it was liked, − where it was not

Ethayarajh et al. 2024, arXiv:2402.01306, section 4; KL is estimated on answers to other prompts, and is at least 0.
"""

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config_preference import KTORecipe
from lowrank_rlhf.data import Examples, Renderer, data_report, load_thumbs, print_report, tokenize_thumbs
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.held_out import before_and_after
from lowrank_rlhf.stages.kto_trainer import build_trainer
from lowrank_rlhf.stages.policy_start import POLICY, check_start, choose_reference, refuse_dropout, start_policy
from lowrank_rlhf.stages.run_trainer import refuse_uneven


def train(recipe: KTORecipe, run: Run) -> None:
    """Train the `policy` role and save it in the run; metrics hold held-out loss and accuracy from step 0 on."""
    refuse_dropout(recipe.lora)
    refuse_uneven(recipe.train)
    if recipe.train.micro_batch_size < 2:
        raise UserError("train.micro_batch_size: KTO estimates a KL over each micro-batch and needs 2 rows or more")
    train_examples, eval_examples = load_thumbs(recipe.data)
    torch.manual_seed(recipe.seed)
    backbone = Backbone(recipe.base)
    backbone.most_rows = MostRows("kto", unit=None)  # a smaller micro-batch would have another KL
    start_policy(backbone, recipe.lora, recipe.policy_from)
    choose_reference(backbone, recipe.reference, "kto")
    backbone.train_only(POLICY)
    if recipe.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
    train_rows, eval_rows = (shuffled(part, recipe.seed) for part in (train_examples, eval_examples))
    train_set, sizes = tokenize_thumbs(train_rows, renderer)
    eval_set, _ = tokenize_thumbs(eval_rows, renderer)
    report = data_report("thumbs", train_examples, eval_examples, renderer, sizes)
    print_report(report)
    run.start(backbone, data_hash(recipe.data), reference=backbone.reference_role or "base", data_report=report)
    print(f"kto: reference: {backbone.reference_role or 'base, adapters off'}", flush=True)
    print(f"kto: {balance(recipe, train_set['label'])}", flush=True)

    with backbone.use(POLICY, train=True):
        trainer = build_trainer(recipe, backbone, run, train_set, eval_set, eval_rows)
        if run.checkpoint is None and not len(eval_set):
            run.log(0, {})
        elif run.checkpoint is None:
            margin = trainer.evaluate().get("eval_rewards/margins", 0.0)  # of one kind alone there is none
            check_start(backbone, "kto", "the margin of the implicit rewards", margin)
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        trainer.best.restore()
        final = before_and_after("kto", run, trainer.evaluate()) if len(eval_set) else {}
    run.save_role(backbone, POLICY, final)
    run.finish(**final)
    print(f"kto: saved in {run.dir}", flush=True)


def shuffled(examples: Examples, seed: int) -> Examples:
    """A random order, in which neighbours rarely have the same prompt; every epoch repeats it."""
    generator = torch.Generator().manual_seed(seed)
    return examples.subset(torch.randperm(len(examples), generator=generator).tolist())


def balance(recipe: KTORecipe, labels: list[bool]) -> str:
    """How many answers were liked, and whether the weights make up for it as the paper asks.

    λ_D n_D / (λ_U n_U) in [1, 4/3]; Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
    """
    liked = sum(labels)
    others = len(labels) - liked
    weights = recipe.kto
    said = f"{liked} liked answers and {others} disliked ones"
    if weights.undesirable_weight == 0:
        return f"{said}, which weigh nothing"
    ratio = weights.desirable_weight * liked / (weights.undesirable_weight * others)
    said = f"{said}, weighted {ratio:.2f} to 1"
    if 1 <= round(ratio, 2) <= 1.34:
        return said
    advised = weights.undesirable_weight * others / liked
    return f"{said}; KTO's authors advise 1 to 4/3, as kto.desirable_weight={advised:.3g} would give"
