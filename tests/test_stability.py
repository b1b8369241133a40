"""Warnings about a PPO run: none of a healthy one, exactly its own of each trouble, each once, whatever the noise."""

import dataclasses
import json
import math
import random
import re

import pytest

from lowrank_rlhf.config import PPORecipe, RewardRecipe
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.stability import START, WINDOW, Watch, figures, halves, rises
from lowrank_rlhf.stability_rules import KL_BUDGET, RULES

STEPS = 60
# Relative, from batch to batch of 16 completions, as the quickstart's runs show it or a little more
NOISE = {
    "objective/length": 0.15,
    "objective/disagreement": 0.15,
    "val/distinct_2": 0.05,
    "val/repetition": 0.4,
    "policy/clipfrac_avg": 0.6,
    "policy/approxkl_avg": 0.8,
}


def watch(**changes):
    return Watch(**{"completions": 16, "max_tokens": 64, **changes})


def healthy(step, noise=None):
    """A run that learns: score up, KL up to 5 nats and no further, a little shorter, a little less random."""
    done = step / STEPS
    row = {
        "objective/scores": 0.2 + 0.8 * min(1.0, 1.5 * done),
        "objective/kl": 5.0 * (1 - math.exp(-4 * done)),
        "objective/length": 40 - 12 * done,
        "val/num_eos_tokens": 9 + 6 * done,
        "val/distinct_2": 0.8 - 0.1 * done,
        "val/repetition": 0.05,
        "objective/disagreement": 0.3 + 0.1 * done,
        "policy/clipfrac_avg": 0.08,
        "policy/approxkl_avg": 0.008,
        "val/explained_variance": -0.5 if step < 3 else 0.4 * done,
        "val/ratio": 1.005,
        "loss/policy_avg": -0.03,
    }
    row["objective/entropy"] = (3.5 - 0.8 * done) * row["objective/length"]
    if noise:
        for name, spread in NOISE.items():
            row[name] *= noise.lognormvariate(0, spread)
        row["objective/entropy"] = (3.5 - 0.8 * done) * row["objective/length"] * noise.lognormvariate(0, 0.1)
        row["objective/scores"] += noise.gauss(0, 0.3)
        row["objective/kl"] += noise.gauss(0, 0.3)
        row["val/explained_variance"] += noise.gauss(0, 0.2)
        row["val/ratio"] += noise.gauss(0, 0.05)
        row["val/num_eos_tokens"] = sum(noise.random() < (9 + 6 * done) / 16 for _ in range(16))
    return row


def warnings_of(series, watch):
    """(step, words) of every warning of a run whose metrics at a step are `series(step)`."""
    return [(step, words) for step in range(1, STEPS + 1) for words in watch.update(step, series(step))]


def late(step, start, end):
    """`start` until a third of the run, then straight to `end` at two thirds."""
    return start + (end - start) * min(1.0, max(0.0, (step - STEPS / 3) / (STEPS / 3)))


# A change of the healthy run, and how its one warning begins
TROUBLES = {
    "kl": (lambda step: {"objective/kl": 0.8 * step}, "KL to the reference is 16.8 nats"),
    "length": (lambda step: longer(step, 20, 55), "completions grew from 20 to 4"),
    "limit": (lambda step: longer(step, 40, 64), "completions fill 9"),
    "short": (lambda step: longer(step, 40, 4), "completions shrank from 40 to 1"),
    "repetition": (lambda step: {"val/repetition": late(step, 0.05, 0.6)}, "2"),
    "disagreement": (
        lambda step: {"objective/disagreement": late(step, 0.3, 0.9)},
        "the reward's members disagree by ",
    ),
    "entropy": (lambda step: entropy(step, 3.5, 0.2), "the entropy per token fell from 3.5"),
    "noise": (lambda step: entropy(step, 3.5, 9.0), "the entropy per token grew from 3.5"),
    "distinct": (
        lambda step: {"val/distinct_2": late(step, 0.8, 0.1)},
        "distinct-2 of the answers fell from 0.80 to 0.",
    ),
    "eos": (lambda step: {"val/num_eos_tokens": late(step, 14, 2)}, "43% of the answers end by themselves (88%"),
    "clip": (lambda step: {"policy/clipfrac_avg": late(step, 0.1, 0.7)}, "the clipped share of tokens is 0.4"),
    "approxkl": (lambda step: {"policy/approxkl_avg": late(step, 0.01, 0.3)}, "an update moves the policy by 0.1"),
    "ratio": (lambda step: {"val/ratio": late(step, 1.0, 40.0)}, "π/π_old is "),
    "value": (lambda step: {"val/explained_variance": late(step, 0.3, -2.0)}, "the values explain -"),
    "groups": (lambda step: {"frac_reward_zero_std": late(step, 0.5, 1.0)}, "in 9"),
    "negative": (lambda step: {"objective/kl": late(step, 0.0, -6.0)}, "KL to the reference is -1."),
    "finite": (lambda step: {"objective/scores": math.nan if step > 30 else 0.5}, "objective/scores is not a number"),
}


def longer(step, start, end):
    length = late(step, start, end)
    return {"objective/length": length, "objective/entropy": 3.0 * length}


def entropy(step, start, end):
    return {"objective/entropy": late(step, start, end) * healthy(step)["objective/length"]}


def test_every_cause_has_a_trouble_here():
    assert set(TROUBLES) == set(RULES) | {"kl", "finite"}


@pytest.mark.parametrize("cause", TROUBLES)
def test_a_trouble_gives_exactly_its_warning_once(cause):
    change, beginning = TROUBLES[cause]
    seen = watch()
    found = warnings_of(lambda step: healthy(step) | change(step), seen)
    assert len(found) == 1, found
    ((step, words),) = found
    assert words.startswith(beginning), words
    assert STEPS / 3 < step < STEPS, "after it began and before the end"
    assert list(seen.active) == [cause]


@pytest.mark.parametrize(
    ("cause", "recipe"),
    [
        (cause, recipe)
        for cause in TROUBLES
        for recipe in (PPORecipe, GRPORecipe)
        if (cause, recipe) not in (("groups", PPORecipe), ("value", GRPORecipe))
    ],
)
def test_a_warning_says_what_to_do_in_keys_that_recipes_have(cause, recipe):
    """Every dotted word of a warning is a key of its recipe or of the reward's. PPO has no groups, GRPO no values."""
    change, _ = TROUBLES[cause]
    ((_, words),) = warnings_of(lambda step: healthy(step) | change(step), watch(stage=recipe.stage))
    keys = {f"{group}.{name}" for group, name in re.findall(r"([a-z_]+)\.([a-z_]+)", words)} - {"samples.jsonl"}
    groups = [field for cls in (recipe, RewardRecipe) for field in dataclasses.fields(cls)]
    assert keys
    assert keys <= {
        f"{group.name}.{key}" for group in groups for key in getattr(group.type, "__dataclass_fields__", ())
    }


def test_a_healthy_run_gives_none():
    assert warnings_of(healthy, watch()) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_gives_none_in_noise(seed):
    """Of batches of 16: the score is off by a third of its whole rise."""
    noise = random.Random(seed)
    assert warnings_of(lambda step: healthy(step, noise), watch()) == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_about_a_threshold_does_not_flap(seed):
    """A clip fraction of 0.4 ± 0.04, exactly at its threshold: at most one warning, not one a crossing."""
    noise = random.Random(seed)
    found = warnings_of(lambda step: healthy(step) | {"policy/clipfrac_avg": noise.gauss(0.4, 0.04)}, watch())
    assert len(found) <= 1


def test_two_bad_iterations_say_nothing():
    spikes = {20: 0.9, 21: 0.9, 40: 0.9}
    assert warnings_of(lambda step: healthy(step) | {"policy/clipfrac_avg": spikes.get(step, 0.1)}, watch()) == []


def test_a_cause_that_goes_away_and_comes_back_is_told_again():
    """0.6, 0.1, 0.6: 20 iterations each."""
    series = {0: 0.6, 1: 0.1, 2: 0.6}
    found = warnings_of(lambda step: healthy(step) | {"policy/clipfrac_avg": series[(step - 1) // 20]}, watch())
    assert [step for step, _ in found] == [3, 43]


def test_a_cause_that_stays_away_for_less_than_a_window_is_the_same_cause():
    away = range(20, 20 + WINDOW - 1)
    found = warnings_of(lambda step: healthy(step) | {"policy/clipfrac_avg": 0.1 if step in away else 0.6}, watch())
    assert len(found) == 1


# KL and the score


def test_kl_beyond_its_budget_with_a_rising_score_is_called_over_optimisation():
    ((_, words),) = warnings_of(lambda s: healthy(s) | {"objective/kl": 0.8 * s, "objective/scores": 0.1 * s}, watch())
    assert "while the score rises from" in words
    assert "over-optimisation" in words
    assert "kl.coef" in words


def test_kl_beyond_its_budget_without_a_rising_score_is_called_drift():
    ((_, words),) = warnings_of(lambda s: healthy(s) | {"objective/kl": 0.8 * s, "objective/scores": 1.0}, watch())
    assert "gains nothing" in words


def test_a_kl_that_stands_is_not_warned_of():
    """Far from the reference because it starts there: `reference: base` after SFT."""
    assert warnings_of(lambda step: healthy(step) | {"objective/kl": 40.0}, watch()) == []


def test_the_budget_counts_from_the_start():
    """From 40 nats the warning comes above 55, from 0 above 15."""
    ((near, _),) = warnings_of(lambda step: healthy(step) | {"objective/kl": 0.4 * step}, watch())
    ((far, _),) = warnings_of(lambda step: healthy(step) | {"objective/kl": 40 + 0.4 * step}, watch())
    assert near == far


def test_the_budget_can_be_set():
    def first_warning(budget):
        return warnings_of(lambda s: healthy(s) | {"objective/kl": 0.5 * s}, watch(kl_budget=budget))[0][0]

    assert first_warning(5.0) < first_warning(KL_BUDGET)


def test_a_short_run_is_judged_too():
    """8 iterations that leave the reference at 10 nats each."""
    seen = watch()
    found = [
        w for step in range(1, 9) for w in seen.update(step, {"objective/kl": 10.0 * step, "objective/scores": step})
    ]
    assert len(found) == 1


# Figures


def test_the_ended_share_comes_from_either_metric():
    """12 of 16 completions."""
    assert figures({"val/num_eos_tokens": 12}, 16, 64) == {"ended": 0.75}
    assert figures({"val/num_eos_tokens": 12, "val/eos_rate": 0.5}, 16, 64) == {"ended": 0.5}


def test_a_share_of_few_completions_must_fall_further():
    """From 7 of 8 to 3 of 8: half, which 256 completions would prove and 8 do not."""

    def found(completions):
        return warnings_of(
            lambda s: healthy(s) | {"val/num_eos_tokens": late(s, 0.875, 0.375) * completions},
            watch(completions=completions),
        )

    assert len(found(256)) == 1
    assert found(8) == []


def test_no_metric_no_judgement():
    assert warnings_of(lambda step: {"lr": 1e-4, "seconds": 3.0}, watch()) == []


def test_row_0_is_left_out():
    """It is the rollout of row 1: counted twice, it would be two thirds of the start."""
    seen = watch()
    seen.update(0, healthy(0))
    assert seen.starts == {}


def test_a_number_that_is_missing_once_is_left_out_of_the_medians():
    seen = watch()
    for step in range(1, 10):
        seen.update(step, {"val/explained_variance": math.nan if step == 4 else 0.5})
    assert seen.recent["val/explained_variance"] == [0.5] * 8
    assert seen.starts["val/explained_variance"] == [0.5] * START


def test_rising_is_a_matter_of_most_pairs():
    """3 of 9 pairs do not rise in the second: below 84 %."""
    assert rises([1, 2, 3, 4, 5, 6])
    assert not rises([1, 2, 6, 3, 4, 5])
    assert not rises([1, 2, 3, 4])
    assert halves([]) == ([], [])


# Going on


@pytest.mark.parametrize("stop", [2, 25, 33, 50])
def test_a_resumed_run_warns_as_the_unbroken_one(stop):
    def series(step):
        change, _ = TROUBLES["clip"]
        return healthy(step, random.Random(step)) | change(step) | {"objective/kl": 0.8 * step}

    whole, first = watch(), watch()
    expected = {step: whole.update(step, series(step)) for step in range(1, STEPS + 1)}
    for step in range(1, stop + 1):
        assert first.update(step, series(step)) == expected[step]
    second = watch()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(stop + 1, STEPS + 1):
        assert second.update(step, series(step)) == expected[step]
    assert second.state_dict() == whole.state_dict()


def test_a_state_is_a_copy():
    seen = watch()
    seen.update(1, healthy(1))
    state = seen.state_dict()
    seen.update(2, healthy(2))
    assert state != seen.state_dict()
