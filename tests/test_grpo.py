"""GRPO's laws on the float32 tiny model, and what each of its options changes."""

import json
import math
from pathlib import Path

import pytest
import torch

from lowrank_rlhf.advantages import leave_one_out_baseline
from lowrank_rlhf.cli import main
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages import grpo as grpo_stage
from lowrank_rlhf.stages.grpo import GRPO

ROOT = Path(__file__).parent.parent
GROUP = 4


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def recipe(*overrides):
    """Two prompts of at most 16 tokens, four answers of 8 new tokens to each, in float32 on the CPU."""
    settings = [
        "base.model=tiny",
        "base.quantization=none",
        "base.device=cpu",
        "data.train=tests/learning_prompts.jsonl",
        "data.max_prompt_tokens=16",
        "data.max_completion_tokens=8",
        "reward=tests.reward_functions:lowercase",
        "train.batch_size=2",
        "train.micro_batch_size=4",
        "train.max_steps=3",
        "train.learning_rate=3e-3",
        "rollout.batch_size=8",
        f"grpo.group_size={GROUP}",
    ]
    return load_recipe(GRPORecipe, overrides=settings + list(overrides))


def weights(grpo):
    return [p.detach().clone() for p in grpo.backbone.parameters("policy")]


def gradients(grpo):
    return torch.cat([p.grad.flatten() for p in grpo.backbone.parameters("policy")])


def move(grpo, size=0.05):
    """Put the policy where it is after some training: a little noise on every weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in grpo.backbone.parameters("policy"):
            p += size * torch.randn(p.shape, generator=generator)


def by_rollout(experiences, value):
    """One number per completion, in the order in which they were rolled out."""
    found = [(i, number) for e in experiences for i, number in zip(e.rows, value(e).tolist(), strict=True)]
    return torch.tensor([number for _, number in sorted(found)])


def first_tokens(experience):
    return experience.advantages[:, 0]


# Laws


@pytest.mark.parametrize(
    "options", [[], ["grpo.scale_by_std=false"], ["grpo.advantage=rloo"], ["kl.in_reward=true", "kl.coef=0.5"]]
)
def test_advantages_sum_to_0_in_each_group_and_are_the_same_for_every_token(options):
    grpo = GRPO(recipe("train.batch_size=4", *options))
    move(grpo)
    experiences, _ = grpo.collect()
    advantages = by_rollout(experiences, first_tokens).view(-1, GROUP)
    assert advantages.abs().max() > 0.05
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(4), rtol=0, atol=1e-6)
    for e in experiences:
        assert torch.equal(e.advantages, torch.where(e.mask, e.advantages[:, :1], 0.0))


def test_the_answers_of_a_group_have_one_prompt_and_their_own_scores():
    """Through the shuffle into micro-batches by length and back."""
    grpo = GRPO(recipe("train.batch_size=4", "train.micro_batch_size=2"))
    experiences, _ = grpo.collect()
    said = grpo.on_policy.said
    prompts = [e.prompt_key for e in said.examples]
    assert len(set(prompts)) == 4
    assert prompts == [prompts[i - i % GROUP] for i in range(16)]
    asked = {i: e.batch.input_ids[k][:8] for e in experiences for k, i in enumerate(e.rows)}
    scores = by_rollout(experiences, lambda e: e.scores)
    torch.testing.assert_close(scores, torch.tensor(said.scores))
    for i in range(16):
        same = torch.equal(asked[i], asked[i - i % GROUP])
        assert same, "the tokens of a row are those of its group's prompt"
    groups = scores.view(-1, GROUP).double()
    expected = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(by_rollout(experiences, first_tokens), expected.flatten().float(), rtol=0, atol=1e-5)


def test_rloo_leaves_the_sample_itself_out_of_its_baseline():
    """One reward changes: to the bit, its own baseline stays and those of its group move, by 1/(G − 1) of it."""
    grpo = GRPO(recipe("grpo.advantage=rloo"))
    experiences, _ = grpo.collect()
    rewards = by_rollout(experiences, lambda e: e.rewards.sum(dim=1)).view(-1, GROUP)
    advantages = by_rollout(experiences, first_tokens).view(-1, GROUP)
    baseline = leave_one_out_baseline(rewards)
    torch.testing.assert_close(advantages, rewards - baseline, rtol=0, atol=1e-6)
    for changed in range(GROUP):
        other = rewards.clone()
        other[0, changed] += 3e7
        moved = leave_one_out_baseline(other) - baseline
        assert moved[0, changed] == 0.0
        assert bool((moved[0, torch.arange(GROUP) != changed] > 0.9e7).all())
        assert bool((moved[1] == 0.0).all()), "the other group"


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_eight_micro_batches_of_one_are_one_of_eight(aggregation):
    """The gradient of the same rollouts, whatever the padding, with KL in the loss and an entropy bonus."""

    def one_step(micro_batch_size):
        grpo = GRPO(
            recipe(
                f"train.micro_batch_size={micro_batch_size}",
                f"grpo.loss_aggregation={aggregation}",
                "grpo.entropy_coef=0.1",
                "kl.coef=0.1",
            )
        )
        move(grpo)
        torch.manual_seed(7)
        experiences, metrics = grpo.collect()
        assert len(experiences) == 8 // micro_batch_size
        row = grpo.updater.policy_gradients(experiences, kl_coef=0.1)
        return gradients(grpo), metrics | row

    (ours, ours_metrics), (theirs, theirs_metrics) = one_step(1), one_step(8)
    assert ours.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for name, value in ours_metrics.items():
        assert theirs_metrics[name] == pytest.approx(value, abs=1e-5), name


def test_the_two_aggregations_differ_where_lengths_do():
    found = []
    for aggregation in ("token", "sequence"):
        grpo = GRPO(recipe(f"grpo.loss_aggregation={aggregation}"))
        move(grpo, size=0.3)
        torch.manual_seed(1)
        experiences, _ = grpo.collect()
        short = [cut_to(e, 3) for e in experiences]
        grpo.updater.policy_gradients(short, kl_coef=0.0)
        found.append(gradients(grpo))
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


def cut_to(e, tokens):
    """The same with only the first tokens of its first row counted."""
    mask = e.mask.clone()
    mask[0, tokens:] = False
    keep = e.batch.completion_mask.cumsum(dim=1) <= torch.where(torch.arange(len(mask)) == 0, tokens, 99)[:, None]
    batch = type(e.batch)(e.batch.input_ids, e.batch.attention_mask, e.batch.completion_mask & keep)
    return type(e)(**{**vars(e), "mask": mask, "batch": batch})


def test_without_reward_and_without_kl_the_policy_stays_to_the_bit():
    grpo = GRPO(recipe("reward=tests.reward_functions:zero", "kl.coef=0", "grpo.inner_epochs=3"))
    before = weights(grpo)
    for _ in range(2):
        experiences, metrics = grpo.collect()
        grpo.update(experiences)
        assert metrics["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(grpo), strict=True))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("start", ["base", "sft"])
def test_kl_is_0_and_ratio_is_1_before_any_update(quantization, start, tmp_path):
    overrides = [f"base.quantization={quantization}"]
    if start == "sft":
        made = ["sft", "--config", "recipes/sft.yaml", "--tiny", f"run_dir={tmp_path}/sft", *overrides]
        assert main([*made, "base.device=cpu", "train.learning_rate=0.05", "lora.r=16", "lora.dropout=0.1"]) == 0
        overrides.append(f"policy_from={tmp_path}/sft")
    settings = recipe(f"run_dir={tmp_path}/grpo", "grpo.minibatches=2", *overrides)
    run = Run(settings)
    grpo_stage.train(settings, run)
    first = run.metrics()[0]
    assert first["step"] == 0
    assert first["objective/kl"] == 0.0
    assert first["val/ratio"] == 1.0
    assert run.info["reference"] == ("start" if start == "sft" else "base")
    assert sorted(path.name for path in (tmp_path / "grpo/adapters").iterdir()) == ["policy"]


# Options


def test_kl_in_the_reward_is_taken_off_each_completions_own():
    """R = score − coef · KL of the completion, against the mean of the others' R."""
    options = ("kl.in_reward=true", "kl.estimator=k1", "kl.coef=0.2", "grpo.advantage=rloo")
    grpo = GRPO(recipe(*options, "train.micro_batch_size=8"))
    move(grpo)
    experiences, _ = grpo.collect()
    said = grpo.on_policy.said
    rewards = (torch.tensor(said.scores) - 0.2 * torch.tensor(said.kl)).view(-1, GROUP)
    expected = (rewards - rewards.mean(dim=1, keepdim=True)) * GROUP / (GROUP - 1)
    assert torch.tensor(said.kl).abs().max() > 0.1
    torch.testing.assert_close(by_rollout(experiences, first_tokens), expected.flatten(), rtol=0, atol=1e-5)


def test_kl_in_the_loss_pulls_the_policy_back():
    """No reward, a policy away from its reference: with the term KL falls, and the rewards do not know of it."""

    def path(coef):
        options = (f"kl.coef={coef}", "train.batch_size=8", "train.micro_batch_size=32", "grpo.inner_epochs=4")
        grpo = GRPO(recipe("reward=tests.reward_functions:zero", "train.learning_rate=0.01", *options))
        move(grpo)
        found = []
        for _ in range(12):
            experiences, metrics = grpo.collect()
            assert all(bool((e.rewards == 0).all()) for e in experiences)
            found.append(metrics["objective/kl"])
            grpo.update(experiences)
        return found[0], sum(found[-3:]) / 3

    first, last = path(1.0)
    assert first > 0.5
    assert last < first / 2
    first, last = path(0.0)
    assert last > first / 2


def test_approx_kl_stops_the_update_before_the_step_that_goes_too_far():
    grpo = GRPO(recipe("grpo.inner_epochs=20", "grpo.target_kl_stop=0.001", "train.learning_rate=0.05"))
    row = grpo.update(grpo.collect()[0])
    assert 1 <= row["policy/minibatches"] < 20
    assert row["policy/stopped"] == 1


def test_every_completion_is_in_one_minibatch_and_each_is_a_step():
    grpo = GRPO(recipe("grpo.minibatches=2", "grpo.inner_epochs=3"))
    experiences, _ = grpo.collect()
    assert sorted(e.minibatch for e in experiences) == [0, 1]
    assert sorted(i for e in experiences for i in e.rows) == list(range(8))
    assert grpo.update(experiences)["policy/minibatches"] == 6


def test_a_step_without_finite_gradient_is_left_out_and_three_stop_the_run(capsys):
    grpo = GRPO(recipe())
    experiences, _ = grpo.collect()
    before = weights(grpo)
    bad = [type(e)(**{**vars(e), "advantages": e.advantages * math.nan}) for e in experiences]
    assert grpo.update(bad)["policy/skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(grpo), strict=True))
    assert "grpo: the gradient of policy is not finite" in capsys.readouterr().out
    grpo.update(bad)
    with pytest.raises(UserError, match=r"3 steps in a row .* lower train.learning_rate, start again"):
        grpo.update(bad)


def test_groups_that_teach_nothing_are_counted_and_warned_of(tmp_path, capsys):
    settings = recipe(f"run_dir={tmp_path}/run", "reward=tests.reward_functions:one", "train.max_steps=4")
    grpo_stage.train(settings, Run(settings))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["frac_reward_zero_std"] == 1.0 for row in rows)
    warnings = [json.loads(line)["warning"] for line in (tmp_path / "run/warnings.jsonl").read_text().splitlines()]
    assert [w for w in warnings if w.startswith("in 100% of the groups every answer has the same reward")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.micro_batch_size=3"], r"train.batch_size: 2 prompts × grpo.group_size \(4\) must be grpo.minibatches"),
        (["grpo.minibatches=4"], r"must be grpo.minibatches \(4\) times a multiple of train.micro_batch_size \(4\)"),
        (["train.micro_batch_tokens=20"], "train.micro_batch_tokens: 20 do not hold one row"),
        (["kl.estimator=k1"], "kl.estimator: k1 teaches nothing as a loss"),
        (["kl.target=1", "kl.coef=0"], "kl.target: a coefficient of 0"),
        (["kl.clip=1"], "kl.clip: bounds the KL in the reward"),
        (["kl.refresh_steps=1", "reference=base"], "kl.refresh_steps: moves the reference"),
        (["lora.dropout=0.1"], "lora.dropout: log-probs of a policy"),
        (["reward="], "reward_from or reward: GRPO needs"),
        (["grpo.group_size=1"], "grpo.group_size: must be at least 2"),
    ],
)
def test_contradictions_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        GRPO(recipe(*overrides))
