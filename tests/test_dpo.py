"""DPO: trl's losses on our tokens, log-probs and reference; its laws on the float32 tiny model, and what it refuses."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.testing import assert_close
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config_preference import DPOLoss, DPORecipe
from lowrank_rlhf.data import Renderer, load_preferences, tokenize_pairs
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages import dpo, policy_start
from lowrank_rlhf.stages.dpo_trainer import build_trainer
from lowrank_rlhf.stages.policy_start import POLICY, REFERENCE
from tests.preference_runs import PAIRS, moved, recipe, shake, snapshot, write

ROOT = Path(__file__).parent.parent
LOG_2 = math.log(2)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def make_trainer(data, tmp_path):
    """A trainer whose policy has moved away from its reference, the base."""

    def make(*overrides, pairs=data):
        made = recipe(DPORecipe, pairs, f"run_dir={tmp_path}/run", *overrides)
        backbone = Backbone(made.base)
        backbone.add_role(POLICY, made.lora)
        shake(backbone, POLICY)
        backbone.train_only(POLICY)
        if made.train.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        renderer = Renderer(backbone.tokenizer, made.data)
        train, held_out = load_preferences(made.data)
        sets = [tokenize_pairs(part, renderer)[0] for part in (train, held_out)]
        return build_trainer(made, backbone, Run(made, overwrite=True), *sets, held_out)

    return make


def gradient(trainer, compute_loss=None):
    """Mean loss of the train set's micro-batches, and its gradient."""
    batches = list(trainer.get_train_dataloader())
    total = 0.0
    trainer.model.train()
    with trainer.backbone.use(POLICY, train=True):
        for batch in batches:
            loss = (compute_loss or trainer._compute_loss)(trainer.model, batch, False) / len(batches)
            loss.backward()
            total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in trainer.backbone.parameters(POLICY)])


def assert_same(ours, theirs):
    """Loss and gradient, the latter up to 1e-6 of its length."""
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < 1e-6


# What it is made of


LOSSES = [
    ("sigmoid",),
    ("sigmoid_norm",),
    ("ipo",),
    ("[sigmoid, sft]", "dpo.loss_weights=[1.0, 0.3]"),
    ("robust", "dpo.label_smoothing=0.1"),
    ("aot",),
]


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: options[0])
def test_loss_gradient_and_figures_are_trls(options, make_trainer):
    """trl's own forward with its fused lm_head, its own reference (adapters off): the same numbers."""
    overrides = [f"dpo.loss_type={options[0]}", *options[1:]]
    trainer = make_trainer(*overrides)
    ours, our_figures = gradient(trainer), dict(trainer._metrics["train"])

    trainer = make_trainer(*overrides)
    trainer.precompute_ref_logps = False
    add_fused_lm_head(trainer.backbone.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trls = gradient(trainer, lambda *args: DPOTrainer._compute_loss(trainer, *args))
    assert ours[1].norm() > 1e-3
    assert_close(ours, trls, rtol=1e-5, atol=1e-6)
    trl_figures = dict(trainer._metrics["train"])
    assert trl_figures.keys() - our_figures.keys() == {"logits/chosen", "logits/rejected"}
    for name, values in our_figures.items():
        assert values == pytest.approx(trl_figures[name], abs=1e-4), name


def test_micro_batches_of_one_are_a_batch_of_eight(make_trainer):
    assert_same(gradient(make_trainer("train.micro_batch_size=1")), gradient(make_trainer()))


def test_gradient_checkpointing_changes_nothing(make_trainer):
    """The reference's forward between the policy's and its backward must not be what is recomputed."""
    assert_same(gradient(make_trainer("train.gradient_checkpointing=true")), gradient(make_trainer()))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_building_the_trainer_leaves_the_backbone_as_it_was(quantization, data, tmp_path):
    """No `ref` adapter, no second model, no bf16 LoRA, and the model's own forward."""
    made = recipe(DPORecipe, data, f"base.quantization={quantization}", f"run_dir={tmp_path}/run")
    backbone = Backbone(made.base)
    backbone.add_role(POLICY, made.lora)
    backbone.train_only(POLICY)
    before, modules = snapshot(backbone), len(list(backbone.model.modules()))
    pairs, _, _ = tokenize_pairs(load_preferences(made.data)[0], Renderer(backbone.tokenizer, made.data))
    trainer = build_trainer(made, backbone, Run(made), pairs, pairs, load_preferences(made.data)[0])
    assert backbone.roles == [POLICY]
    assert trainer.ref_model is None
    assert moved(before, snapshot(backbone)) == set()
    assert {p.dtype for p in backbone.parameters(POLICY)} == {torch.float32}
    assert "forward" not in vars(backbone.model)
    assert len(list(backbone.model.modules())) == modules


# The laws


@pytest.mark.parametrize("start", ["base", "sft"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_before_any_update_the_loss_is_log_2_and_margins_are_0(quantization, start, data, tmp_path, monkeypatch):
    overrides = [f"run_dir={tmp_path}/dpo", f"base.quantization={quantization}", "train.micro_batch_size=2"]
    if start == "sft":
        overrides.append(f"policy_from={sft_run(tmp_path, quantization)}")
    made = recipe(DPORecipe, data, *overrides)
    dpo.train(made, run := Run(made))
    held_out, first = run.metrics()[:2]
    assert (held_out["step"], first["step"]) == (0, 1)
    assert held_out["eval_loss"] == pytest.approx(LOG_2, abs=1e-7)
    assert held_out["eval_rewards/margins"] == held_out["eval_rewards/chosen"] == 0.0
    assert held_out["eval_accuracy"] == 0.5
    # What the first step logs is from before it
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-7)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0.0
    assert run.info["reference"] == ("start" if start == "sft" else "base")


def sft_run(tmp_path, quantization="none"):
    data = write(tmp_path / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
    settings = [f"data.train={data}", f"run_dir={tmp_path}/sft", "train.learning_rate=0.05", "lora.dropout=0.1"]
    settings += [f"base.quantization={quantization}", "base.device=cpu"]
    assert cli_main(["sft", "--config", "recipes/sft.yaml", "--tiny", *settings]) == 0
    return tmp_path / "sft"


def test_it_learns_and_changes_nothing_but_the_policy(data, tmp_path, monkeypatch):
    """32 steps at both starts: the loss falls, held-out pairs of the same kind are told apart, all else is frozen."""
    seen = []
    started = policy_start.start_policy

    def start_policy(backbone, *args, **kwargs):
        started(backbone, *args, **kwargs)
        seen.append((backbone, snapshot(backbone)))

    monkeypatch.setattr(dpo, "start_policy", start_policy)
    sft = sft_run(tmp_path, "nf4")
    options = ("base.quantization=nf4", "train.max_steps=32", "train.learning_rate=0.01")
    made = recipe(DPORecipe, data, f"run_dir={tmp_path}/run", f"policy_from={sft}", *options)
    dpo.train(made, run := Run(made))
    ((backbone, before),) = seen
    assert backbone.roles == [REFERENCE, POLICY]
    assert moved(before, snapshot(backbone)) == {POLICY}
    final = run.info["final"]
    assert final["eval_loss"] < 0.3 < LOG_2 == pytest.approx(final["eval_loss_before"], abs=1e-6)
    assert (final["eval_accuracy_before"], final["eval_accuracy"]) == (0.5, 1.0)
    assert final["eval_accuracy_low"] == final["eval_accuracy_high"] == 1.0


def test_one_base_in_memory(data, tmp_path, bases_seen):
    made = recipe(DPORecipe, data, f"run_dir={tmp_path}/run", "base.quantization=nf4")
    dpo.train(made, Run(made))
    assert bases_seen == {(14, 14)}


def test_a_reference_that_the_policy_does_not_start_from_is_said(data, tmp_path, capsys):
    made = recipe(DPORecipe, data, f"run_dir={tmp_path}/run", f"policy_from={sft_run(tmp_path)}", "reference=base")
    dpo.train(made, run := Run(made))
    assert "reference: base after SFT, so the margin of the implicit rewards starts at" in capsys.readouterr().out
    assert abs(run.metrics()[0]["eval_rewards/margins"]) > 0.01
    assert run.info["reference"] == "base"


def test_a_precomputed_reference_gives_the_same_training(data, tmp_path, monkeypatch):
    """In float32 up to rounding, as it is padded otherwise; and no step computes it again."""
    rows = {}
    for precompute in ("false", "true"):
        options = [f"run_dir={tmp_path}/{precompute}", f"dpo.precompute_reference={precompute}"]
        options += ["train.max_steps=4", "train.learning_rate=0.01", "train.batch_size=4", "train.micro_batch_size=4"]
        made = recipe(DPORecipe, data, *options)
        dpo.train(made, run := Run(made))
        rows[precompute] = [row for row in run.metrics() if "loss" in row or "eval_loss" in row]
    assert len(rows["true"]) == len(rows["false"]) == 6
    for ours, theirs in zip(rows["true"], rows["false"], strict=True):
        for name in theirs.keys() & {"loss", "rewards/margins", "eval_loss", "eval_rewards/margins"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


def test_a_precomputed_reference_costs_no_forward_in_training(make_trainer, monkeypatch):
    trainer = make_trainer("dpo.precompute_reference=true")
    used = []
    monkeypatch.setattr(trainer.backbone, "use", lambda role, train=False: used.append(role) or _Nothing())
    (batch, *_) = trainer.get_train_dataloader()
    trainer._compute_loss(trainer.model, batch, False)
    assert used == []


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


# Held out


def test_held_out_figures_are_those_of_rows_whatever_the_micro_batch(make_trainer, tmp_path):
    """A ranking of three answers is three pairs and counts as much as one pair."""
    ranked = {"prompt": "Colour?", "responses": ["red", "green!", "bl"], "ranking": [1, 2, 3]}
    pairs = write(tmp_path / "ranked.jsonl", [ranked])
    alone = {k: v for k, v in make_trainer(pairs=pairs).evaluate().items() if k.startswith("eval_")}
    single = {"prompt": "Hue?", "responses": ["grey", "brown"], "ranking": [2, 1]}
    other = make_trainer(pairs=write(tmp_path / "single.jsonl", [single])).evaluate()
    both = write(tmp_path / "both.jsonl", [ranked, single])
    for size in (1, 2, 8):
        found = make_trainer(f"train.micro_batch_size={size}", pairs=both).evaluate()
        for name in ("eval_loss", "eval_accuracy", "eval_rewards/margins", "eval_logps/chosen"):
            assert found[name] == pytest.approx((alone[name] + other[name]) / 2, abs=1e-5), name


def test_the_accuracy_is_the_share_of_pairs_whose_chosen_answer_gained_more(make_trainer, tmp_path):
    """By hand from log-probs of single texts: right where log π − log π_ref of the chosen answer is the larger."""
    swapped = [dict(row, chosen=row["rejected"], rejected=row["chosen"]) for row in PAIRS[::2]]
    rows = [*swapped, *PAIRS[1::2]]
    trainer = make_trainer(pairs=write(tmp_path / "mixed.jsonl", rows))
    backbone, renderer = trainer.backbone, Renderer(trainer.backbone.tokenizer, trainer.run.recipe.data)
    gains = []
    for row in rows:
        for side in ("chosen", "rejected"):
            asked = [{"role": "user", "content": row["prompt"]}]
            text = renderer.sequence(asked, [{"role": "assistant", "content": row[side]}])
            ids = torch.tensor([text.ids])
            mask = torch.ones_like(ids, dtype=torch.bool)
            completion = torch.arange(ids.shape[1])[None] >= len(text.prompt_ids)
            with torch.no_grad():
                logps = []
                for role in (POLICY, None):
                    with backbone.use(role):
                        logps.append(float(backbone.token_logps(ids, mask, completion)[0].sum()))
            gains.append(logps[0] - logps[1])
    right = [chosen > rejected for chosen, rejected in zip(gains[::2], gains[1::2], strict=True)]
    found = trainer.evaluate()
    assert found["eval_accuracy"] == pytest.approx(sum(right) / len(right))
    assert 0 <= found["eval_accuracy_low"] < found["eval_accuracy"] < found["eval_accuracy_high"] <= 1
    margin = sum(gains[::2]) - sum(gains[1::2])
    assert found["eval_rewards/margins"] == pytest.approx(0.1 * margin / len(rows), abs=1e-5)


# The run it leaves


def test_a_run_answers_is_compared_exported_and_gone_on_from(data, tmp_path, capsys):
    sft = sft_run(tmp_path)
    settings = [f"data.train={data}", "data.max_prompt_tokens=32", "base.quantization=none", "base.device=cpu"]
    settings += ["train.learning_rate=0.01", "dpo.beta=0.2"]
    arguments = ["dpo", "--config", "recipes/dpo.yaml", "--tiny", *settings]
    assert cli_main([*arguments, f"run_dir={tmp_path}/dpo", f"policy_from={sft}"]) == 0
    assert cli_main([*arguments, f"run_dir={tmp_path}/again", f"policy_from={tmp_path}/dpo"]) == 0
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in PAIRS[:4]])
    out = ["--out", str(tmp_path / "samples.jsonl"), "--max-new-tokens", "4"]
    assert cli_main(["sample", str(tmp_path / "dpo"), "--prompts", str(prompts), "--k", "2", *out]) == 0
    assert cli_main(["export", str(tmp_path / "dpo"), "--to", str(tmp_path / "exported")]) == 0
    compared = [str(tmp_path / "dpo"), str(tmp_path / "again"), "--prompts", str(prompts), "--max-new-tokens", "4"]
    capsys.readouterr()
    assert cli_main(["evaluate", "policy", *compared, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    kl = {policy["name"]: policy["metrics"] for policy in report["policies"]}
    assert {"base", "dpo", "again"} <= kl.keys()
    for name in ("dpo", "again"):  # each kept to what it started from: sft, and the first dpo
        assert kl[name]["kl_to_reference"]["value"] != kl[name]["kl_to_base"]["value"]
    card = (tmp_path / "dpo/adapters/policy/README.md").read_text()
    assert "| method | DPO:" in card
    assert "| reference | start |" in card
    assert json.loads((tmp_path / "dpo/run.json").read_text())["recipe"]["dpo"]["beta"] == 0.2


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.dropout=0.1"], "lora.dropout: log-probs of a policy"),
        (["dpo.loss_type=sft"], "dpo.loss_type: needs a loss that compares answers"),
        (["dpo.loss_type=[]"], "dpo.loss_type: needs a loss that compares answers"),
        (["dpo.loss_type=[sigmoid, sft]", "dpo.loss_weights=[1.0]"], "dpo.loss_weights: 1 weights for 2 losses"),
        (["dpo.label_smoothing=0.1"], "dpo.label_smoothing: sigmoid would ignore it; use one of"),
        (["dpo.loss_type=exo_pair"], "dpo.label_smoothing: exo_pair needs more than 0"),
        (["dpo.loss_type=robust", "dpo.label_smoothing=0.5"], "dpo.label_smoothing: robust needs less than 0.5"),
        (["train.batch_size=5", "train.micro_batch_size=2"], "train.batch_size: 5 is not a multiple of"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(overrides, message, data, tmp_path):
    made = recipe(DPORecipe, data, f"run_dir={tmp_path}/run", *overrides)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        dpo.train(made, Run(made))
    assert not list((tmp_path / "run").glob("adapters"))


@pytest.mark.parametrize("value", ["sigmoid2", "[sigmoid, nonsense]"])
def test_an_unknown_loss_is_refused_with_the_list(value, data):
    with pytest.raises(UserError, match=r"dpo.loss_type: expected one of sigmoid, sigmoid_norm, hinge, ipo,"):
        recipe(DPORecipe, data, f"dpo.loss_type={value}")


def test_every_loss_of_trl_is_known_and_no_other():
    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert len(known) == 15
    assert set(get_args(DPOLoss)) == known


def test_the_recipe_keeps_lists(data):
    made = load_recipe(DPORecipe, overrides=[f"data.train={data}", "dpo.loss_type=[sigmoid, sft]"])
    assert made.dpo.losses == ["sigmoid", "sft"]
