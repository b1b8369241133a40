"""KTO: thumbs from rows and from pairs, trl's loss on our tokens, log-probs and reference; its laws and training."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from trl import KTOTrainer
from trl.trainer.utils import add_fused_lm_head

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config import Data
from lowrank_rlhf.config_preference import KTORecipe
from lowrank_rlhf.data import Renderer, load_thumbs, tokenize_thumbs
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages import kto, policy_start
from lowrank_rlhf.stages.kto import balance
from lowrank_rlhf.stages.kto_trainer import build_trainer
from lowrank_rlhf.stages.policy_start import POLICY
from tests.preference_runs import PAIRS, moved, recipe, shake, snapshot, write

ROOT = Path(__file__).parent.parent
THUMBS = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "thumbs.jsonl", THUMBS)


# Data


def thumbs(tmp_path, *rows):
    """(prompt, answer, liked) of each example."""
    examples, _ = load_thumbs(Data(train=str(write(tmp_path / "data.jsonl", rows)), eval_fraction=0))
    return [(e.prompt[0]["content"], (e.chosen or e.rejected)[0]["content"], e.chosen is not None) for e in examples]


def test_rows_and_pairs_and_rankings_are_single_answers(tmp_path):
    """Of a ranking the best is liked, the worst is not; what is better than one and worse than another is neither."""
    assert thumbs(tmp_path, *THUMBS[:2]) == [("Say x0", "yes", True), ("Say x0", "nope", False)]
    assert thumbs(tmp_path, PAIRS[0]) == [("Say x0", "yes", True), ("Say x0", "nope", False)]
    ranked = {"prompt": "Hi", "responses": ["a", "b", "c", "d"], "ranking": [2, 1, 3, 3]}
    assert sorted(thumbs(tmp_path, ranked)) == [("Hi", "b", True), ("Hi", "c", False), ("Hi", "d", False)]


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1"])
def test_a_thumb_up_is_written_in_several_ways(label, tmp_path):
    down = {"prompt": "a", "completion": "b", "label": not label if isinstance(label, bool) else "0"}
    assert thumbs(tmp_path, {"prompt": "a", "completion": "c", "label": label}, down)[0] == ("a", "c", True)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (THUMBS[::2], "16 answers to learn from were liked and 0 were not, both are needed"),
        (THUMBS[1::2], "0 answers to learn from were liked and 16 were not, both are needed"),
        ([{"prompt": "a", "completion": "b"}], "1 answers to learn from were liked and 0 were not"),
        ([{"prompt": "a"}], "data.jsonl, row 1: this is a prompt alone; give completion and label, or two answers"),
        ([THUMBS[0], {**THUMBS[1], "label": "bad"}], "data.jsonl, row 2: column 'label': expected true or false"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "row 1: the chosen and the rejected answer are the same"),
    ],
)
def test_data_without_thumbs_are_refused(rows, words, tmp_path):
    with pytest.raises(UserError, match="^.*" + words):
        thumbs(tmp_path, *rows)


def test_the_answer_for_the_kl_is_that_of_the_row_before(tmp_path):
    made = recipe(KTORecipe, write(tmp_path / "data.jsonl", THUMBS[:5]))
    examples, _ = load_thumbs(made.data)
    renderer = Renderer(Backbone(made.base).tokenizer, made.data)
    rows = list(tokenize_thumbs(examples, renderer)[0])
    assert [row["KL_completion_ids"] for row in rows] == [rows[i - 1]["completion_ids"] for i in range(5)]
    assert [row["label"] for row in rows] == [True, False, True, False, True]


# What it is made of


@pytest.fixture
def make_trainer(data, tmp_path):
    """A trainer whose policy has moved away from its reference, the base."""

    def make(*overrides):
        made = recipe(KTORecipe, data, f"run_dir={tmp_path}/run", *overrides)
        backbone = Backbone(made.base)
        backbone.add_role(POLICY, made.lora)
        shake(backbone, POLICY)
        backbone.train_only(POLICY)
        renderer = Renderer(backbone.tokenizer, made.data)
        train, held_out = (kto.shuffled(part, 0) for part in load_thumbs(made.data))
        sets = [tokenize_thumbs(part, renderer)[0] for part in (train, held_out)]
        return build_trainer(made, backbone, Run(made, overwrite=True), *sets, held_out)

    return make


def gradient(trainer, compute_loss=None):
    batches = list(trainer.get_train_dataloader())
    total = 0.0
    trainer.model.train()
    with trainer.backbone.use(POLICY, train=True):
        for batch in batches:
            loss = (compute_loss or trainer._compute_loss)(trainer.model, batch, False) / len(batches)
            loss.backward()
            total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in trainer.backbone.parameters(POLICY)])


def test_loss_gradient_and_figures_are_trls(make_trainer, monkeypatch):
    """trl's own forwards with its fused lm_head, its own KL and its own reference (adapters off)."""
    options = ("kto.desirable_weight=1.3", "kto.beta=0.5")
    trainer = make_trainer(*options)
    ours, our_figures = gradient(trainer), dict(trainer._metrics["train"])

    trainer = make_trainer(*options)
    trainer.precompute_ref_logps = False
    monkeypatch.setattr(type(trainer), "_compute_kl_logps", KTOTrainer._compute_kl_logps)
    add_fused_lm_head(trainer.backbone.model, outputs=("log_probs", "entropy", "mean_logits"))
    trls = gradient(trainer, lambda *args: KTOTrainer._compute_loss(trainer, *args))
    assert ours[1].norm() > 1e-3
    assert_close(ours, trls, rtol=1e-5, atol=1e-6)
    assert max(our_figures["kl"]) > 0
    trl_figures = dict(trainer._metrics["train"])
    assert trl_figures.keys() - our_figures.keys() == {"logits/chosen", "logits/rejected"}
    for name, values in our_figures.items():
        assert values == pytest.approx(trl_figures[name], abs=1e-4), name


def test_held_out_figures_by_hand_whatever_the_micro_batch(make_trainer):
    """1 − σ(±β(log-ratio − KL)) with the KL of all rows together; right where the log-ratio is on its label's side."""
    trainer = make_trainer()
    rows = {name: values.double() for name, values in trainer._eval_logps().items() if name != "label"}
    liked = trainer._eval_logps()["label"].bool()
    kl = max(0.0, float((rows["policy_KL_logps"] - rows["ref_KL_logps"]).mean()))
    lead = rows["logps"] - rows["ref_logps"] - kl
    lead = torch.where(liked, lead, -lead)
    for size in (2, 8):
        found = make_trainer(f"train.micro_batch_size={size}").evaluate()
        assert found["eval_loss"] == pytest.approx(float((1 - torch.sigmoid(0.1 * lead)).mean()), abs=1e-5)
        assert found["eval_accuracy"] == pytest.approx(float((lead > 0).double().mean()))
        assert found["eval_accuracy_low"] <= found["eval_accuracy"] <= found["eval_accuracy_high"]
        assert found["eval_kl"] == pytest.approx(kl, abs=1e-4)


# The laws


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_before_any_update_the_loss_is_a_half_and_margins_and_kl_are_0(quantization, data, tmp_path):
    made = recipe(KTORecipe, data, f"run_dir={tmp_path}/run", f"base.quantization={quantization}")
    kto.train(made, run := Run(made))
    held_out, first = run.metrics()[:2]
    assert (held_out["step"], held_out["eval_loss"], held_out["eval_kl"]) == (0, 0.5, 0.0)
    assert held_out["eval_rewards/margins"] == held_out["eval_rewards/chosen"] == 0.0
    assert held_out["eval_accuracy"] == 0.5
    assert (first["step"], first["loss"], first["kl"], first["rewards/margins"]) == (1, 0.5, 0.0, 0.0)


def test_it_learns_and_changes_nothing_but_the_policy(data, tmp_path, monkeypatch, capsys):
    seen = []
    started = policy_start.start_policy

    def start_policy(backbone, *args, **kwargs):
        started(backbone, *args, **kwargs)
        seen.append((backbone, snapshot(backbone)))

    monkeypatch.setattr(kto, "start_policy", start_policy)
    options = ("base.quantization=nf4", "train.max_steps=32", "train.learning_rate=0.01")
    made = recipe(KTORecipe, data, f"run_dir={tmp_path}/run", *options)
    kto.train(made, run := Run(made))
    ((backbone, before),) = seen
    assert backbone.roles == [POLICY]
    assert moved(before, snapshot(backbone)) == {POLICY}
    final = run.info["final"]
    assert final["eval_loss"] < 0.4 < final["eval_loss_before"] == 0.5
    assert final["eval_rewards/margins"] > 1
    assert final["eval_accuracy"] > 0.8
    assert run.info["reference"] == "base"
    assert "kto: 16 liked answers and 16 disliked ones, weighted 1.00 to 1\n" in capsys.readouterr().out


def test_one_base_in_memory(data, tmp_path, bases_seen):
    made = recipe(KTORecipe, data, f"run_dir={tmp_path}/run", "base.quantization=nf4")
    kto.train(made, Run(made))
    assert bases_seen == {(14, 14)}


def test_a_run_is_gone_on_from(data, tmp_path):
    arguments = ["kto", "--config", "recipes/kto.yaml", "--tiny", f"data.train={data}", "train.learning_rate=0.01"]
    assert cli_main([*arguments, f"run_dir={tmp_path}/first"]) == 0
    assert cli_main([*arguments, f"run_dir={tmp_path}/second", f"policy_from={tmp_path}/first"]) == 0
    assert "| method | KTO:" in (tmp_path / "second/adapters/policy/README.md").read_text()


# Weights


@pytest.mark.parametrize(
    ("liked", "weights", "words"),
    [
        (2, [], "2 liked answers and 2 disliked ones, weighted 1.00 to 1"),
        (1, ["kto.desirable_weight=4"], "1 liked answers and 3 disliked ones, weighted 1.33 to 1"),
        (1, [], "1 liked answers and 3 disliked ones, weighted 0.33 to 1; KTO's authors advise 1 to 4/3, as "),
        (3, ["kto.undesirable_weight=0"], "3 liked answers and 1 disliked ones, which weigh nothing"),
    ],
)
def test_weights_that_do_not_make_up_for_the_counts_are_said(liked, weights, words, data):
    said = balance(recipe(KTORecipe, data, *weights), [True] * liked + [False] * (4 - liked))
    assert said.startswith(words)
    if "advise" in said:
        assert said.endswith("kto.desirable_weight=3 would give")
