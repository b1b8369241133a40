"""ORPO: its loss beside a derivation and beside trl's, its laws on the float32 tiny model, its training."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from trl.experimental.orpo import ORPOTrainer

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config_preference import ORPORecipe
from lowrank_rlhf.data import Renderer, Sequence, load_preferences, pad_batch
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.losses import log_odds, orpo_loss
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages import orpo, policy_start
from lowrank_rlhf.stages.comparisons import Comparison, tokenize
from lowrank_rlhf.stages.policy_start import POLICY
from tests.preference_runs import PAIRS, moved, recipe, shake, snapshot, write

ROOT = Path(__file__).parent.parent
BETA = 0.3


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def policy(data):
    """The float32 tiny model with a policy that has moved, and the pairs as comparisons."""
    made = recipe(ORPORecipe, data)
    backbone = Backbone(made.base)
    backbone.add_role(POLICY, made.lora)
    shake(backbone, POLICY)
    backbone.train_only(POLICY)
    examples, _ = load_preferences(made.data)
    return backbone, tokenize(examples, Renderer(backbone.tokenizer, made.data))


# The formula


def test_the_loss_is_that_of_a_derivation_with_logits(policy):
    """Eq. 6 and 7 from softmax probabilities of the whole vocabulary, in NumPy and float64, pair by pair."""
    backbone, comparisons = policy
    losses = []
    with torch.no_grad(), backbone.use(POLICY) as model:
        for c in comparisons:
            mean = []
            for answer in c.answers:
                logits = model(torch.tensor([answer.ids])).logits[0].double().numpy()
                first = len(answer.prompt_ids)
                logits = logits[first - 1 : -1] - logits[first - 1 : -1].max(axis=1, keepdims=True)
                p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                mean.append(np.log(p[np.arange(len(p)), answer.completion_ids]).mean())
            odds = np.exp(mean) / (1 - np.exp(mean))
            losses.append(-mean[0] + BETA * np.log(1 + odds[1] / odds[0]))
        metrics = orpo.evaluate(backbone, comparisons, 4, BETA)
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def numpy_log_odds(x):
    return x - np.log(-np.expm1(x))


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.1, -0.6931, -0.6932, -2.0, -20.0, -80.0, -700.0, -1e4])
def test_log_odds_and_their_gradient_are_right_near_1_and_near_0(x):
    """Beside float64; d log odds / d log P = 1 / (1 − P)."""
    value = torch.tensor(x, requires_grad=True)
    found = log_odds(value)
    found.backward()
    exact = float(value.detach())  # the float32 that is meant
    assert float(found.detach()) == pytest.approx(numpy_log_odds(exact), rel=1e-5, abs=1e-6)
    assert float(value.grad) == pytest.approx(-1 / np.expm1(exact), rel=1e-5)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-9, -1e4), (-1e4, -1e-9)])
def test_loss_and_gradient_are_finite_where_an_answer_is_certain_or_impossible(chosen, rejected):
    pair = torch.tensor([chosen, rejected], requires_grad=True)
    loss, ratio = orpo_loss(pair[:1], pair[1:], beta=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(ratio).all()
    assert torch.isfinite(pair.grad).all()


# trl's


@pytest.fixture
def trls():
    """trl's experimental trainer without its loop."""
    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.beta, trainer.is_encoder_decoder, trainer.aux_loss_enabled, trainer.pad_token_id = BETA, False, False, 0
    trainer.padding_value = 0
    trainer.accelerator = types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    return trainer


def test_the_odds_ratio_term_is_trls(trls):
    generator = torch.Generator().manual_seed(0)
    logps = -4 * torch.rand(2, 64, generator=generator)
    term, *_ = trls.odds_ratio_loss(*logps)  # β log σ(log odds ratio)
    loss, ratio = orpo_loss(*logps, beta=BETA)
    assert_close(-logps[0] - loss, term, rtol=0, atol=1e-5)
    assert_close(torch.nn.functional.logsigmoid(ratio) * BETA, term, rtol=0, atol=1e-5)


def test_the_total_is_trls_where_there_is_no_prompt_to_score(trls, policy):
    """trl's first term is a mean over all tokens of the batch, those of the prompts too but for the first: with prompts
    of one token and chosen answers of one length it is ours."""
    backbone, _ = policy
    rows = [([5, 6, 7], [8, 9]), ([9, 8, 7], [6, 5, 4, 3]), ([3, 3, 9], [1])]
    comparisons = [
        Comparison(str(i), [Sequence([1], chosen), Sequence([1], rejected)], [(0, 1)], [0.0])
        for i, (chosen, rejected) in enumerate(rows)
    ]
    batch = {}
    for side in (0, 1):
        padded = pad_batch([c.answers[side] for c in comparisons], 0)
        name = ("chosen", "rejected")[side]
        batch[f"{name}_input_ids"] = padded.input_ids
        batch[f"{name}_attention_mask"] = padded.attention_mask.long()
        batch[f"{name}_labels"] = padded.input_ids.masked_fill(~padded.completion_mask, -100)
    with torch.no_grad(), backbone.use(POLICY) as model:
        total, theirs = trls.get_batch_loss_metrics(model, batch)
    ours = orpo.evaluate(backbone, comparisons, 4, BETA)
    assert ours["eval_loss"] == pytest.approx(float(total), abs=1e-5)
    for name in ("nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/margins", "logps/rejected"):
        assert ours[f"eval_{name}"] == pytest.approx(theirs[name], abs=1e-5), name


# Batches


def gradients(backbone, comparisons, micro_batch_size):
    for parameter in backbone.parameters(POLICY):
        parameter.grad = None
    metrics, tokens = orpo.step_gradients(backbone, comparisons, micro_batch_size, BETA)
    return metrics, tokens, torch.cat([p.grad.flatten() for p in backbone.parameters(POLICY)])


def test_eight_micro_batches_are_a_batch_of_eight(policy):
    backbone, comparisons = policy
    whole = gradients(backbone, comparisons[:8], 8)
    parts = gradients(backbone, comparisons[:8], 1)
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    assert parts[1] == whole[1]
    assert float((parts[2] - whole[2]).norm() / whole[2].norm()) < 1e-6


def test_both_answers_of_a_pair_share_one_forward(policy, monkeypatch):
    backbone, comparisons = policy
    rows = []
    hidden = backbone.hidden
    monkeypatch.setattr(backbone, "hidden", lambda ids, *args: rows.append(len(ids)) or hidden(ids, *args))
    gradients(backbone, comparisons[:8], 4)
    assert rows == [8, 8]


def test_a_ranking_counts_as_much_as_a_pair_and_scores_each_answer_once(policy, tmp_path, monkeypatch):
    backbone, _ = policy
    ranked = {"prompt": "Colour?", "responses": ["red", "green!", "bl"], "ranking": [1, 2, 3]}
    single = {"prompt": "Hue?", "responses": ["grey", "brown"], "ranking": [2, 1]}
    made = recipe(ORPORecipe, write(tmp_path / "ranked.jsonl", [ranked, single]))
    comparisons = tokenize(load_preferences(made.data)[0], Renderer(backbone.tokenizer, made.data))
    alone = [orpo.evaluate(backbone, [c], 4, BETA) for c in comparisons]
    both = orpo.evaluate(backbone, comparisons, 4, BETA)
    for name in ("eval_loss", "eval_accuracy", "eval_log_odds_chosen"):
        assert both[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, abs=1e-6)
    assert gradients(backbone, comparisons, 4)[0]["loss"] == pytest.approx(both["eval_loss"], abs=1e-6)


# Training


def test_it_learns_and_changes_nothing_but_the_policy(data, tmp_path, monkeypatch):
    seen = []
    started = policy_start.start_policy

    def start_policy(backbone, *args, **kwargs):
        started(backbone, *args, **kwargs)
        seen.append((backbone, snapshot(backbone)))

    monkeypatch.setattr(orpo, "start_policy", start_policy)
    options = ("base.quantization=nf4", "train.max_steps=32", "train.learning_rate=0.01", "orpo.beta=0.5")
    made = recipe(ORPORecipe, data, f"run_dir={tmp_path}/run", *options)
    orpo.train(made, run := Run(made))
    ((backbone, before),) = seen
    assert moved(before, snapshot(backbone)) == {POLICY}
    final = run.info["final"]
    assert final["eval_loss"] < 0.5 * final["eval_loss_before"]
    assert final["eval_accuracy"] == 1.0
    rows = run.metrics()
    assert rows[0]["step"] == 0
    assert rows[0]["eval_nll_loss"] > rows[-1]["eval_nll_loss"]
    assert rows[-1]["eval_log_odds_chosen"] > rows[0]["eval_log_odds_chosen"] + 1
    assert "reference" not in run.info


def test_it_goes_on_from_a_run_and_keeps_one_adapter(data, tmp_path):
    arguments = ["orpo", "--config", "recipes/orpo.yaml", "--tiny", f"data.train={data}", "base.device=cpu"]
    assert cli_main([*arguments, f"run_dir={tmp_path}/first", "train.learning_rate=0.05"]) == 0
    again = [f"run_dir={tmp_path}/second", f"policy_from={tmp_path}/first", "train.learning_rate=0.0"]
    assert cli_main([*arguments, *again]) == 0
    file = "adapters/policy/adapter_model.safetensors"
    assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert [path.name for path in (tmp_path / "second/adapters").iterdir()] == ["policy"]


def test_one_base_in_memory(data, tmp_path, bases_seen):
    made = recipe(ORPORecipe, data, f"run_dir={tmp_path}/run", "base.quantization=nf4")
    orpo.train(made, Run(made))
    assert bases_seen == {(14, 14)}


def test_it_stops_when_held_out_loss_no_longer_falls_and_keeps_the_best(data, tmp_path, capsys):
    options = ("train.max_steps=40", "train.learning_rate=0.5", "eval.steps=1", "eval.patience=2")
    made = recipe(ORPORecipe, data, f"run_dir={tmp_path}/run", *options)
    orpo.train(made, run := Run(made))
    assert "orpo: no better held-out loss for 2 evaluations, stopping" in capsys.readouterr().out
    seen = [row["eval_loss"] for row in run.metrics() if row["step"] and "eval_loss" in row]
    assert len(seen) < 40
    assert run.info["final"]["eval_loss"] == pytest.approx(min(seen), abs=1e-6)


def test_dropout_is_refused(data, tmp_path):
    made = recipe(ORPORecipe, data, f"run_dir={tmp_path}/run", "lora.dropout=0.1")
    with pytest.raises(UserError, match=r"lora.dropout: log-probs of a policy"):
        orpo.train(made, Run(made))
