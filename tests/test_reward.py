"""Reward training: comparisons of K answers, their weights, length balance, ensembles; what the losses add up to."""

import json
import math
import random
import re

import pytest
import torch
from torch.testing import assert_close

from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.cli import main
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import Renderer, Sequence, load_preferences
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.losses import bradley_terry_loss
from lowrank_rlhf.rewards.sources import combine
from lowrank_rlhf.stages.comparisons import Comparison, Order, equal_pairs, micro_batches, pairs_of, tokenize


def comparison(*lengths, pairs=((0, 1),), margins=None):
    """Answers of these lengths; the first is the better one of a pair."""
    answers = [Sequence([1], [2] * length) for length in lengths]
    return Comparison("prompt", answers, list(pairs), margins or [0.0] * len(pairs))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RANKED = {"prompt": "Colour?", "responses": ["red", "green", "blue", "grey"], "ranking": [2, 1, 3, 3]}


# What a batch adds up to


def test_the_gradient_of_two_pairs_by_hand():
    """Scores (log 3, 0) and (0, 0): d loss/d chosen = −½ · (1 − σ) with σ = ¾ and ½, the opposite for the rejected."""
    group = [comparison(1, 1), comparison(1, 1)]
    scores = torch.tensor([math.log(3), 0.0, 0.0, 0.0], requires_grad=True)
    better, worse, margins, weights = pairs_of(group, scores)
    ((weights * bradley_terry_loss(better, worse, margin=margins)).sum() / 2).backward()
    assert_close(scores.grad, torch.tensor([-1 / 8, 1 / 8, -1 / 4, 1 / 4]))


def test_a_ranking_counts_once_and_scores_each_answer_once(tmp_path):
    """Four answers with one tie are five pairs of weight ⅕; each text is tokenised once."""
    path = write(tmp_path / "ranked.jsonl", [RANKED, {**RANKED, "prompt": "Hue?"}])
    examples, _ = load_preferences(Data(train=str(path), eval_fraction=0))
    comparisons = tokenize(examples, Renderer(tiny_tokenizer(), Data(train="unused")))
    assert [len(c.answers) for c in comparisons] == [4, 4]
    texts = [tiny_tokenizer().decode(a.completion_ids, skip_special_tokens=True) for a in comparisons[0].answers]
    assert [(texts[i], texts[j]) for i, j in comparisons[0].pairs] == [
        ("green", "red"),
        ("green", "blue"),
        ("green", "grey"),
        ("red", "blue"),
        ("red", "grey"),
    ]
    group = [comparisons[0], comparison(1, 1)]
    better, worse, margins, weights = pairs_of(group, torch.arange(6.0))
    assert weights[:5].sum() == pytest.approx(1)
    assert weights[5:].tolist() == [1.0]
    assert (better[5], worse[5], len(margins)) == (4, 5, 6)


def test_pairs_that_a_limit_makes_equal_are_counted(tmp_path):
    """Answers of 10 and 11 bytes are the same 8; those of the other pairs are not."""
    ranked = {"prompt": "Hi", "responses": ["x" * 10, "x" * 11, "y"], "ranking": [1, 2, 3]}
    examples, _ = load_preferences(Data(train=str(write(tmp_path / "d.jsonl", [ranked])), eval_fraction=0))
    for limit, equal in ((8, 1), (64, 0)):
        renderer = Renderer(tiny_tokenizer(), Data(train="unused", max_completion_tokens=limit))
        assert equal_pairs(tokenize(examples, renderer)) == equal


def test_two_rows_with_the_same_prompt_are_two_comparisons(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, {"prompt": "Hi", "chosen": "Hey", "rejected": "No"}]
    examples, _ = load_preferences(Data(train=str(write(tmp_path / "d.jsonl", rows)), eval_fraction=0))
    assert len(tokenize(examples, Renderer(tiny_tokenizer(), Data(train="unused")))) == 2


def test_a_rows_margin_reaches_the_loss(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No", "margin": 1.5}] * 2
    examples, _ = load_preferences(Data(train=str(write(tmp_path / "d.jsonl", rows)), eval_fraction=0))
    (first, _) = tokenize(examples, Renderer(tiny_tokenizer(), Data(train="unused")))
    assert pairs_of([first], torch.zeros(2))[2].tolist() == [1.5]


def test_micro_batches_hold_every_comparison_once_and_like_lengths_together():
    group = [comparison(n, 1) for n in (9, 1, 8, 2)] + [comparison(3, 3, 3, 3, 3, pairs=[(0, 4)])]
    found = list(micro_batches(group, pairs=2))
    assert sorted(map(id, (c for g in found for c in g))) == sorted(map(id, group))
    assert [[len(c.answers[0].completion_ids) for c in g] for g in found] == [[1, 2], [3], [8, 9]]


# The order


def test_every_epoch_shows_every_comparison_in_a_new_order():
    order = Order([comparison(1, 2)] * 20, balance_length=False, seed=0)
    first, second = order.epoch(), order.epoch()
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_balanced_epochs_show_as_many_longer_as_shorter_winners():
    """15 rows where the longer wins, 4 where the shorter does, 2 equal: 4 + 4 + 2 an epoch, the four anew each time."""
    rows = [comparison(5, 1)] * 15 + [comparison(1, 5)] * 4 + [comparison(3, 3)] * 2
    order = Order(rows, balance_length=True, seed=0)
    assert len(order) == 10
    epochs = [order.epoch() for _ in range(20)]
    for epoch in epochs:
        assert len(set(epoch)) == 10
        assert set(range(15, 21)) <= set(epoch)
    assert {i for epoch in epochs for i in epoch} == set(range(21))


def test_balance_without_one_of_the_kinds_is_refused():
    with pytest.raises(UserError, match=r"balance_length: the better answer is the longer one in 3 rows and the"):
        Order([comparison(5, 1)] * 3, balance_length=True, seed=0)


# Ensembles


def test_members_are_combined_by_hand():
    """Scores 1 and 3, mean 2, standard deviation 1; minus twice that 0."""
    members = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert combine(members, "mean", 1.0).tolist() == [2.0, 4.0]
    assert combine(members, "min", 1.0).tolist() == [1.0, 4.0]
    assert combine(members, "mean_minus_std", 2.0).tolist() == [0.0, 4.0]


@pytest.fixture
def planted(tmp_path):
    """The longer answer wins in three rows of four."""
    rows = []
    for i in range(120):
        long, short = "word " * (6 + i % 5), "word " * (1 + i % 3)
        chosen, rejected = (long, short) if i % 4 else (short, long)
        rows.append({"prompt": f"Question {i}?", "chosen": chosen.strip(), "rejected": rejected.strip()})
    return write(tmp_path / "planted.jsonl", rows)


def train(run_dir, *overrides):
    arguments = ["--config", "recipes/reward.yaml", "--tiny", "data.max_rows=null"]
    settings = ["data.max_completion_tokens=64", "train.learning_rate=0.01", "train.batch_size=8"]
    settings += ["train.micro_batch_size=4"]
    assert main(["reward", *arguments, *settings, f"run_dir={run_dir}", *overrides]) == 0
    return json.loads((run_dir / "run.json").read_text())["final"]


def test_an_ensemble_saves_members_that_differ_and_says_how_far(planted, tmp_path, request, monkeypatch, capsys):
    monkeypatch.chdir(request.config.rootpath)
    final = train(tmp_path / "run", f"data.train={planted}", "reward_model.members=3")
    assert final["eval_disagreement"] > 0
    *_, last, _ = capsys.readouterr().out.splitlines()  # and then the memory
    sizes = re.fullmatch(r"reward: 3 members, (.+) MB of adapter and head each, (.+) MB in all; saved in (.+)", last)
    assert sizes is not None
    assert float(sizes[2]) == pytest.approx(3 * float(sizes[1]), abs=0.02)  # each rounded
    names = ["reward", "reward_2", "reward_3"]
    assert sorted(path.name for path in (tmp_path / "run/adapters").iterdir()) == names
    weights = [(tmp_path / f"run/adapters/{name}/adapter_model.safetensors").read_bytes() for name in names]
    assert len(set(weights)) == 3
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))


def test_the_score_follows_length_less_where_lengths_are_balanced(planted, tmp_path, request, monkeypatch):
    """Unbalanced, length predicts three labels of four; balanced, nothing, and then nothing is there to learn."""
    monkeypatch.chdir(request.config.rootpath)
    settings = (f"data.train={planted}", "train.max_steps=40")
    plain = train(tmp_path / "plain", *settings)
    balanced = train(tmp_path / "balanced", *settings, "reward_model.balance_length=true")
    assert plain["eval_margin"] > 0.1
    assert abs(balanced["eval_margin"]) < 0.5 * plain["eval_margin"]


def length_and_word(path, seed, prompt):
    """The longer answer wins in three rows of four, and apart from that the better word in seven of ten."""
    source = random.Random(seed)
    rows = []
    for i in range(160):
        better, worse = ("kiwi ", "plum ") if source.random() < 0.7 else ("plum ", "kiwi ")
        long, short = 6 + i % 5, 1 + i % 3
        words = (better * long, worse * short) if i % 4 else (better * short, worse * long)
        rows.append({"prompt": f"{prompt} {i}?", "chosen": words[0].strip(), "rejected": words[1].strip()})
    return write(path, rows)


def test_the_correlation_with_length_falls_where_lengths_are_balanced(tmp_path, request, monkeypatch, capsys):
    """As `evaluate reward` reports it, on other rows of the kind; over five seeds it fell by 0.32 to 0.83.

    The word is there to be learned instead: where length is all there is, a balanced model's scores are nearly equal,
    and what is left of them still follows length, in whichever direction.
    """
    monkeypatch.chdir(request.config.rootpath)
    data = length_and_word(tmp_path / "train.jsonl", 0, "Question"), length_and_word(tmp_path / "eval.jsonl", 1, "New")
    settings = (f"data.train={data[0]}", f"data.eval={data[1]}", "train.max_steps=40")
    found = {}
    for balance in ("false", "true"):
        run = tmp_path / balance
        train(run, *settings, f"reward_model.balance_length={balance}")
        assert main(["evaluate", "reward", str(run), "--data", str(data[1])]) == 0
        found[balance] = json.loads((run / "report.json").read_text())["length"]
        assert found[balance]["verdict"] in capsys.readouterr().out
    plain, balanced = (found[balance]["pearson"]["value"] for balance in ("false", "true"))
    print(f"score and length, Pearson: {plain:+.3f}, length-balanced {balanced:+.3f}")
    assert plain > 0.5
    assert abs(balanced) < plain - 0.3


def test_odd_pairs_are_counted_before_training_and_no_metric_is_nan(tmp_path, request, monkeypatch, capsys):
    """Contradicting labels, an answer that says nothing, a prompt beyond the limit, and a pair that the limit makes
    equal; a tie is half right and no division by zero."""
    monkeypatch.chdir(request.config.rootpath)
    rows = [{"prompt": "Con?", "chosen": "x", "rejected": "y"}, {"prompt": "Con?", "chosen": "y", "rejected": "x"}]
    rows += [
        {"prompt": "Empty?", "chosen": "x", "rejected": ""},
        {"prompt": "L" * 5000, "chosen": "x", "rejected": "y"},
    ]
    rows += [{"prompt": "Long?", "chosen": "x" * 5000, "rejected": "x" * 5001}]
    odd = write(tmp_path / "odd.jsonl", rows)
    train(tmp_path / "run", f"data.train={odd}", f"data.eval={odd}")
    said = capsys.readouterr().out
    for line in (
        "4 of 10 texts cut to data.max_prompt_tokens or data.max_completion_tokens",
        "pairs that are the same tokens once cut, and teach nothing: 1",
        "pairs that contradict another one (the two answers swapped): 2",
        "answers that say nothing, learned as they are: 1",
    ):
        assert f"  {line}\n" in said
    for file in ("metrics.jsonl", "run.json"):
        assert "NaN" not in (tmp_path / "run" / file).read_text()


def test_centred_scores_stay_near_0(planted, tmp_path, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    settings = (f"data.train={planted}", "train.max_steps=20")
    loose = train(tmp_path / "loose", *settings, "reward_model.center_coef=0")
    tight = train(tmp_path / "tight", *settings, "reward_model.center_coef=1")
    assert abs(tight["eval_mean_score"]) < abs(loose["eval_mean_score"])
