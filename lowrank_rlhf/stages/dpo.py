"""Direct preference optimisation: trl's DPOTrainer over the `policy` role, the reference by role on the same base.

    L = −log σ(β[(log π/π_ref)(chosen) − (log π/π_ref)(rejected)])

Rafailov et al. 2023, arXiv:2305.18290, eq. 7, and trl's other losses by name. β · log π/π_ref is the implicit reward.
"""

import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config_preference import DPORecipe
from lowrank_rlhf.data import Renderer, data_report, load_preferences, print_report, tokenize_pairs
from lowrank_rlhf.data.loading import data_hash
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages.dpo_trainer import build_trainer
from lowrank_rlhf.stages.held_out import before_and_after
from lowrank_rlhf.stages.policy_start import POLICY, check_start, choose_reference, refuse_dropout, start_policy
from lowrank_rlhf.stages.run_trainer import refuse_uneven

SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # trl's losses that read label_smoothing
COUPLED = {"aot", "aot_unpaired", "sft"}  # those for which a smaller micro-batch would be another loss


def train(recipe: DPORecipe, run: Run) -> None:
    """Train the `policy` role and save it in the run; metrics hold held-out loss and accuracy from step 0 on."""
    refuse_contradictions(recipe)
    train_examples, eval_examples = load_preferences(recipe.data)
    torch.manual_seed(recipe.seed)
    backbone = Backbone(recipe.base)
    backbone.most_rows = MostRows("dpo", unit=None if COUPLED & set(recipe.dpo.losses) else 2)
    start_policy(backbone, recipe.lora, recipe.policy_from)
    choose_reference(backbone, recipe.reference, "dpo")
    backbone.train_only(POLICY)
    if recipe.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    renderer = Renderer(backbone.tokenizer, recipe.data, backbone.context)
    train_set, sizes, equal_pairs = tokenize_pairs(train_examples, renderer)
    eval_set, _, _ = tokenize_pairs(eval_examples, renderer)
    report = data_report("preferences", train_examples, eval_examples, renderer, sizes)
    report["equal_pairs"] = equal_pairs
    print_report(report)
    reference = backbone.reference_role or "base"
    run.start(backbone, data_hash(recipe.data), reference=reference, data_report=report)
    print(f"dpo: reference: {backbone.reference_role or 'base, adapters off'}", flush=True)

    with backbone.use(POLICY, train=True):
        trainer = build_trainer(recipe, backbone, run, train_set, eval_set, eval_examples)
        if run.checkpoint is None and not len(eval_set):
            run.log(0, {})
        elif run.checkpoint is None:
            margin = trainer.evaluate()["eval_rewards/margins"]
            if not recipe.dpo.precompute_reference:
                check_start(backbone, "dpo", "the margin of the implicit rewards", margin)
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        trainer.best.restore()
        final = before_and_after("dpo", run, trainer.evaluate()) if len(eval_set) else {}
    run.save_role(backbone, POLICY, final)
    run.finish(**final)
    print(f"dpo: saved in {run.dir}", flush=True)


def refuse_contradictions(recipe: DPORecipe) -> None:
    """
    Raises:
        UserError: two keys of the recipe cannot both be meant.
    """
    refuse_dropout(recipe.lora)
    refuse_uneven(recipe.train)
    settings, losses = recipe.dpo, recipe.dpo.losses
    if not losses or set(losses) == {"sft"}:
        raise UserError("dpo.loss_type: needs a loss that compares answers, sft alone does not; use lowrank-rlhf sft")
    if settings.loss_weights is not None and len(settings.loss_weights) != len(losses):
        raise UserError(
            f"dpo.loss_weights: {len(settings.loss_weights)} weights for {len(losses)} losses ({', '.join(losses)}); "
            "give one for each"
        )
    if settings.label_smoothing and not SMOOTHED & set(losses):
        raise UserError(
            f"dpo.label_smoothing: {', '.join(losses)} would ignore it; use one of {', '.join(sorted(SMOOTHED))} "
            "(robust is sigmoid with wrong labels)"
        )
    if "exo_pair" in losses and not settings.label_smoothing:
        raise UserError("dpo.label_smoothing: exo_pair needs more than 0; its paper uses 1e-3")
    if "robust" in losses and settings.label_smoothing == 0.5:
        raise UserError("dpo.label_smoothing: robust needs less than 0.5; at one half labels say nothing")
