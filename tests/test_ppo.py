"""PPO's laws on the float32 tiny model, and what each of its options changes."""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from lowrank_rlhf import logps_cpu
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.runs import Interrupted, Run
from lowrank_rlhf.stages import ppo as ppo_stage
from lowrank_rlhf.stages.ppo import PPO
from lowrank_rlhf.stages.steps import finite_means
from tests import reward_functions

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def recipe(*overrides):
    """Eight prompts of at most 16 tokens, 8 new tokens, in float32 on the CPU."""
    settings = [
        "base.model=tiny",
        "base.quantization=none",
        "base.device=cpu",
        "data.train=tests/learning_prompts.jsonl",
        "data.max_prompt_tokens=16",
        "data.max_completion_tokens=8",
        "reward=tests.reward_functions:lowercase",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "train.max_steps=3",
        "train.learning_rate=3e-3",
        "value_model.learning_rate=3e-3",
        "rollout.batch_size=8",
        "ppo.minibatches=1",
        "ppo.inner_epochs=1",
    ]
    return load_recipe(PPORecipe, overrides=settings + list(overrides))


def weights(ppo, role):
    return [p.detach().clone() for p in ppo.backbone.parameters(role)]


def gradients(ppo, role):
    return torch.cat([p.grad.flatten() for p in ppo.backbone.parameters(role)])


def move(ppo, role="policy", size=0.05):
    """Put a role where it is after some training: a little noise on every weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ppo.backbone.parameters(role):
            p += size * torch.randn(p.shape, generator=generator)


# Laws


def test_without_reward_and_without_kl_the_policy_stays_to_the_bit():
    ppo = PPO(recipe("reward=tests.reward_functions:zero", "kl.coef=0", "ppo.inner_epochs=3"))
    before = weights(ppo, "policy")
    for _ in range(2):
        experiences, _ = ppo.collect()
        ppo.update(experiences)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ppo, "policy"), strict=True))


def test_a_reward_that_is_the_same_for_all_has_no_expected_gradient():
    """E[∇ log π] = 0: over N batches the mean gradient shrinks like 1/√N beside the gradient of one."""
    count = 60
    ppo = PPO(recipe("reward=tests.reward_functions:one", "kl.coef=0", "ppo.whiten=false", "value_model.init=zero"))
    found = []
    for _ in range(count):
        experiences, _ = ppo.collect()
        assert all(bool((e.advantages[e.mask] > 0).all()) for e in experiences), "nothing cancels within a batch"
        ppo.updater.policy_gradients(experiences, kl_coef=0.0)
        found.append(gradients(ppo, "policy"))
        ppo.updater.steps.optimizers["policy"][0].zero_grad()
    one, mean = torch.stack(found).norm(dim=1).mean(), torch.stack(found).mean(dim=0).norm()
    assert one > 0
    assert mean < 2 * one / math.sqrt(count)


def test_a_huge_kl_coefficient_holds_the_policy():
    """Against the same training without a leash."""

    def last_kl(coef):
        ppo = PPO(recipe(f"kl.coef={coef}", "train.batch_size=32", "train.micro_batch_size=32", "ppo.inner_epochs=4"))
        found = []
        for _ in range(15):
            experiences, metrics = ppo.collect()
            found.append(metrics["objective/kl"])
            ppo.update(experiences)
        return sum(found[-5:]) / 5

    free, held = last_kl(0), last_kl(1000)
    assert free > 0.5
    assert abs(held) < free / 10


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_eight_micro_batches_of_one_are_one_of_eight(trunk):
    """The gradients of policy and value, of the same rollouts, whatever the padding."""

    def one_step(micro_batch_size):
        ppo = PPO(recipe(f"train.micro_batch_size={micro_batch_size}", f"value_model.trunk={trunk}", "kl.coef=0.1"))
        move(ppo, ppo.value_role)
        torch.manual_seed(7)
        experiences, metrics = ppo.collect()
        assert len(experiences) == 8 // micro_batch_size
        ppo.updater.policy_gradients(experiences, kl_coef=0.1)
        if trunk == "own":
            ppo.updater.value_gradients(experiences)
        return [gradients(ppo, role) for role in dict.fromkeys(("policy", ppo.value_role))], metrics

    (ours, ours_metrics), (theirs, theirs_metrics) = one_step(1), one_step(8)
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for name, value in ours_metrics.items():
        assert theirs_metrics[name] == pytest.approx(value, abs=1e-5), name


def test_a_token_budget_cuts_micro_batches_and_changes_nothing_else():
    budget = PPO(recipe("train.micro_batch_size=8", "train.micro_batch_tokens=48"))
    plain = PPO(recipe("train.micro_batch_size=8"))
    found = []
    for ppo in (budget, plain):
        torch.manual_seed(3)
        experiences, _ = ppo.collect()
        ppo.updater.policy_gradients(experiences, kl_coef=0.05)
        found.append((experiences, gradients(ppo, "policy")))
    (small, ours), (large, theirs) = found
    assert len(large) == 1
    assert len(small) > 1
    assert all(e.batch.input_ids.numel() <= 48 for e in small)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Options


def test_every_prompt_is_in_one_minibatch_and_each_is_a_step(monkeypatch):
    ppo = PPO(recipe("ppo.minibatches=2", "ppo.inner_epochs=3"))
    experiences, _ = ppo.collect()
    assert sorted(e.minibatch for e in experiences) == [0, 1]
    assert sum(len(e.batch.input_ids) for e in experiences) == 8
    assert ppo.update(experiences)["policy/minibatches"] == 6


def test_approx_kl_stops_the_update_before_the_step_that_goes_too_far():
    ppo = PPO(recipe("ppo.inner_epochs=20", "ppo.target_kl_stop=0.001", "train.learning_rate=0.05"))
    experiences, _ = ppo.collect()
    row = ppo.update(experiences)
    assert 1 <= row["policy/minibatches"] < 20
    assert row["policy/stopped"] == 1
    assert all(p.grad is None for role in ("policy", "value") for p in ppo.backbone.parameters(role))
    free = PPO(recipe("ppo.inner_epochs=20", "train.learning_rate=0.05"))
    experiences, _ = free.collect()
    assert free.update(experiences)["policy/minibatches"] == 20


def test_the_entropy_bonus_raises_entropy():
    def entropy(coef):
        ppo = PPO(recipe("reward=tests.reward_functions:zero", "kl.coef=0", f"ppo.entropy_coef={coef}"))
        move(ppo, size=0.3)
        for _ in range(10):
            experiences, metrics = ppo.collect()
            ppo.update(experiences)
        return metrics["objective/entropy"] / metrics["objective/length"]

    assert entropy(1.0) > entropy(0.0) + 0.05


def test_entropy_has_no_gradient_without_a_bonus(monkeypatch):
    """It would cost all logits once more."""
    asked = []
    whole = logps_cpu._entropy_gradient
    monkeypatch.setattr(logps_cpu, "_entropy_gradient", lambda *args: asked.append(1) or whole(*args))
    for coef in (0, 0.1):
        ppo = PPO(recipe(f"ppo.entropy_coef={coef}", "base.device=cpu"))
        ppo.update(ppo.collect()[0])
        assert bool(asked) == bool(coef)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_pulls_the_policy_back(estimator):
    """No reward, a policy away from its reference: without the term nothing happens, with it KL falls."""

    def path(coef):
        ppo = PPO(
            recipe(
                "reward=tests.reward_functions:zero",
                f"kl.coef={coef}",
                f"kl.estimator={estimator}",
                "kl.in_reward=false",
                "train.batch_size=32",
                "train.micro_batch_size=32",
                "train.learning_rate=0.01",
                "ppo.inner_epochs=4",
            )
        )
        move(ppo, size=0.05)
        found = []
        for _ in range(12):
            experiences, metrics = ppo.collect()
            assert all(bool((e.rewards == 0).all()) for e in experiences)
            found.append(metrics["objective/kl"])
            ppo.update(experiences)
        return found[0], sum(found[-3:]) / 3

    first, last = path(1.0)
    assert first > 0.5
    assert last < first / 2
    first, last = path(0.0)
    assert last > first / 2


def test_the_coefficient_is_steered_to_the_target():
    ppo = PPO(recipe("kl.target=1", "kl.horizon=8", "kl.coef=0.1"))
    ppo.on_policy.end_iteration(1, kl=5.0)
    assert ppo.on_policy.kl.coef == pytest.approx(0.12)
    _, metrics = ppo.collect()
    assert metrics["objective/kl_coef"] == ppo.on_policy.kl.coef


def test_the_kl_of_a_token_is_clipped_in_the_reward_and_reported_as_it_is():
    plain, clipped = (
        PPO(recipe("reward=tests.reward_functions:zero")),
        PPO(recipe("reward=tests.reward_functions:zero", "kl.clip=0.01")),
    )
    rows = []
    for ppo in (plain, clipped):
        move(ppo)
        torch.manual_seed(1)
        rows.append(ppo.collect())
    (free, free_metrics), (held, held_metrics) = rows
    assert max(float(e.rewards.abs().max()) for e in free) > 0.01 * 0.05 * 1.01
    assert max(float(e.rewards.abs().max()) for e in held) <= 0.01 * 0.05 * 1.0001
    assert free_metrics["objective/kl"] == held_metrics["objective/kl"]


def test_the_reference_is_refreshed_and_frozen_between():
    ppo = PPO(recipe("kl.refresh_steps=2"))
    assert ppo.backbone.reference_role == "start"
    kls = []
    for step in (1, 2, 3):
        experiences, metrics = ppo.collect()
        kls.append(metrics["objective/kl"])
        frozen = weights(ppo, "start")
        ppo.update(experiences)
        assert all(torch.equal(a, b) for a, b in zip(frozen, weights(ppo, "start"), strict=True))
        ppo.on_policy.end_iteration(step, metrics["objective/kl"])
    assert kls[0] == 0.0
    assert kls[1] != 0.0
    assert kls[2] == 0.0, "the reference has just become the policy"


def test_the_value_head_can_sit_on_the_policys_own_adapter(tmp_path):
    settings = recipe("value_model.trunk=policy", f"run_dir={tmp_path}/run")
    run = Run(settings)
    ppo_stage.train(settings, run)
    assert run.metrics()[0]["objective/kl"] == 0.0
    assert run.metrics()[0]["val/ratio"] == 1.0
    assert sorted(path.name for path in (tmp_path / "run/adapters").iterdir()) == ["policy"]
    head = load_file(tmp_path / "run/adapters/policy/head.safetensors")["linear.weight"]
    assert float(head.norm()) > 0  # it began at zero
    again = PPO(recipe(f"policy_from={tmp_path}/run"))
    assert set(again.backbone.roles) == {"start", "policy", "value"}
    assert set(again.backbone.heads) == {"value"}, "the head of the other run's value is left behind"


def test_ptx_keeps_the_policy_at_the_demonstrations(tmp_path):
    """Their likelihood falls while PPO chases another text, and rises with the mix."""
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text('{"prompt": "abc", "completion": "XYZ"}\n{"prompt": "de", "completion": "XY"}\n')
    for coef, falls in ((5.0, True), (0.0, False)):
        ppo = PPO(recipe(f"ptx.data={demonstrations}", f"ptx.coef={coef}"))
        losses = []
        for _ in range(6):
            experiences, _ = ppo.collect()
            losses.append(ppo.update(experiences)["loss/ptx_avg"])
        assert (losses[-1] < 0.8 * losses[0]) is falls, losses


def test_a_step_without_finite_gradient_is_left_out_and_three_stop_the_run(monkeypatch, capsys):
    ppo = PPO(recipe())
    experiences, _ = ppo.collect()
    before = weights(ppo, "policy")
    bad = [type(e)(**{**vars(e), "advantages": e.advantages * math.nan}) for e in experiences]
    row = ppo.update(bad)
    assert row["policy/skipped"] == 1
    assert all(math.isfinite(value) for value in row.values())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ppo, "policy"), strict=True))
    assert "not finite" in capsys.readouterr().out
    ppo.update(experiences)
    assert ppo.updater.steps.nonfinite == 0, "a good step in between starts the count again"
    ppo.update(bad)
    ppo.update(bad)
    with pytest.raises(UserError, match="3 steps in a row"):
        ppo.update(bad)


def test_the_curriculum_goes_from_easy_to_hard_in_the_first_epoch(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    levels = [3, 1, 4, 1.5, 9, 2, 6, 5]
    prompts.write_text("".join(f'{{"prompt": "p{x}", "level": {x}}}\n' for x in levels))
    ppo = PPO(recipe(f"data.train={prompts}", "data.eval_fraction=0", "rollout.curriculum=level"))
    first, second = ppo.on_policy.order.take(8), ppo.on_policy.order.take(8)
    assert [e.columns["level"] for e in first] == sorted(levels)
    assert sorted(e.columns["level"] for e in second) == sorted(levels) != [e.columns["level"] for e in second]
    prompts.write_text('{"prompt": "a", "level": 1}\n{"prompt": "b", "level": "hard"}\n')
    with pytest.raises(UserError, match=r"row 2: rollout.curriculum: column 'level' holds 'hard', not a number"):
        PPO(recipe(f"data.train={prompts}", "data.eval_fraction=0", "rollout.curriculum=level"))


def test_dropout_of_the_sft_adapter_is_off_in_the_policy(tmp_path):
    """Two train-mode forwards of the same tokens agree, or the ratio of the first minibatch would not be 1."""
    from lowrank_rlhf.config import Lora

    backbone = Backbone(recipe().base)
    backbone.add_role("policy", Lora(dropout=0.5))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        for p in backbone.parameters("policy"):
            p.normal_()
        with backbone.use("policy", train=True):
            noisy = [backbone.hidden(ids, None) for _ in range(2)]
            backbone.without_dropout("policy")
            quiet = [backbone.hidden(ids, None) for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*quiet)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=6"], "train.batch_size: 6 prompts must be"),
        (["train.micro_batch_tokens=20"], "train.micro_batch_tokens: 20 do not hold one row"),
        (["kl.refresh_steps=1", "reference=base"], "kl.refresh_steps: moves the reference"),
        (["kl.in_reward=false"], "kl.estimator: k1 teaches nothing as a loss"),
        (["value_model.trunk=policy", "value_model.init=reward"], "value_model.init: reward is another trunk"),
        (["kl.target=1", "kl.coef=0"], "kl.target: a coefficient of 0"),
        (["lora.dropout=0.1"], "lora.dropout: log-probs of a policy"),
        (["ptx.data=none.jsonl"], "none.jsonl"),
    ],
)
def test_contradictions_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        PPO(recipe(*overrides))


def test_the_run_says_what_goes_wrong_and_what_the_policy_says(tmp_path, capsys):
    """Steps far too large for the clip range, and sampling that is not scoring: both are said in words, and kept."""
    settings = recipe(
        f"run_dir={tmp_path}/run",
        "rollout.top_p=0.95",
        "train.learning_rate=0.02",
        "ppo.clip_range=0.02",
        "ppo.inner_epochs=16",
        "train.max_steps=5",
    )
    ppo_stage.train(settings, Run(settings))
    printed = capsys.readouterr().out
    assert "warning: with rollout.top_p=0.95 the least likely tokens are never sampled" in printed
    assert "best of 8 at step 1" in printed
    warnings = [json.loads(line)["warning"] for line in (tmp_path / "run/warnings.jsonl").read_text().splitlines()]
    assert any("an update moves the policy by" in w or "the updates are too large" in w for w in warnings), warnings
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "completion", "score", "kl"} <= set(samples[0])
    row = Run(settings, resume=True).metrics()[-1]
    assert {"time/generate", "tokens_per_second/update", "memory/score_gib", "val/distinct_2"} <= set(row)


def test_a_callback_hears_every_iteration_and_may_stop_the_run(tmp_path):
    class Stop(TrainerCallback):
        heard: ClassVar[list[int]] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.heard.append(state.global_step)
            control.should_training_stop = state.global_step == 2
            assert "objective/kl" in logs

    settings = recipe(f"run_dir={tmp_path}/run", "train.max_steps=5")
    with pytest.raises(Interrupted, match="after step 2"):
        ppo_stage.train(settings, Run(settings), callbacks=[Stop()])
    assert Stop.heard == [1, 2]
    ppo_stage.train(settings, Run(settings, resume=True))
    assert [row["step"] for row in Run(settings, resume=True).metrics()] == [0, 1, 2, 3, 4, 5]


def test_a_reward_that_fails_later_costs_no_work(tmp_path, monkeypatch):
    """It raises in the third iteration and is named; mended, the run goes on behind the second."""
    settings = recipe(f"run_dir={tmp_path}/run", "save.steps=1")
    calls = []

    def fails(prompts, completions, **columns):
        calls.append(prompts)
        return [1 / (3 - len(calls))] * len(prompts)

    with monkeypatch.context() as patch:
        patch.setattr(reward_functions, "lowercase", fails)
        with pytest.raises(ZeroDivisionError) as caught:
            ppo_stage.train(settings, Run(settings))
    assert "tests.reward_functions:lowercase" in "".join(caught.value.__notes__)
    resumed = Run(settings, resume=True)
    assert resumed.checkpoint.name == "step-000002"
    ppo_stage.train(settings, resumed)
    assert [row["step"] for row in resumed.metrics()] == [0, 1, 2, 3]


def test_prompts_that_are_all_over_the_limit_are_cut_and_counted(tmp_path):
    settings = recipe(f"run_dir={tmp_path}/run", "data.max_prompt_tokens=2", "train.max_steps=1")
    ppo_stage.train(settings, run := Run(settings))
    report = run.info["data_report"]
    assert report["truncated"] == report["texts"] > 0
    assert run.finished


def test_answers_that_never_end_are_priced_and_counted():
    """Without a stop token and with no reward, each answer costs what a missing end costs."""
    ppo = PPO(recipe("reward=tests.reward_functions:zero", "rollout.missing_eos_penalty=2"))
    ppo.on_policy.renderer.stop_ids = []
    experiences, metrics = ppo.collect()
    assert (metrics["val/eos_rate"], metrics["val/num_eos_tokens"], metrics["objective/scores"]) == (0.0, 0.0, -2.0)
    assert metrics["objective/length"] == 8
    assert all(math.isfinite(value) for value in ppo.update(experiences).values())


def test_finite_means_leave_out_what_is_never_finite():
    assert finite_means([{"a": math.nan, "b": 1.0}, {"a": math.inf, "b": 2.0, "c": 4.0}]) == {"b": 1.5, "c": 4.0}
