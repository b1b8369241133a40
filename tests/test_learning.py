"""PPO and GRPO learn: the random tiny model is taught to write lower-case letters by a reward that counts them.

A step-0 law cannot see a wrong sign, a misaligned advantage or a lost gradient; this can, and the two controls at the
end show that it does.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.stages.grpo import GRPO
from lowrank_rlhf.stages.ppo import PPO
from tests.reward_functions import ASKED_TOKENS

ROOT = Path(__file__).parent.parent
STEPS = 60


PPO_ONLY = ["train.batch_size=64", "value_model.learning_rate=3e-3", "ppo.inner_epochs=4", "ppo.minibatches=1"]
GRPO_ONLY = ["train.batch_size=8", "grpo.group_size=8", "grpo.inner_epochs=4", "grpo.minibatches=1"]


def mean_scores(seed, change_advantages=lambda advantages, mask: advantages, method=PPO, options=()):
    """Mean reward of the rollouts before each update, on float32."""
    overrides = [
        f"seed={seed}",
        f"data.train={ROOT}/tests/learning_prompts.jsonl",
        "data.max_prompt_tokens=16",
        f"data.max_completion_tokens={ASKED_TOKENS}",
        "base.model=tiny",
        "base.quantization=none",
        "base.device=cpu",
        "reward=tests.reward_functions:lowercase",
        "train.micro_batch_size=64",
        "train.learning_rate=3e-3",
        f"train.max_steps={STEPS}",
        "rollout.batch_size=64",
        "rollout.temperature=0.75",  # the tiny model's logits are bounded: at 1 it cannot pass 0.8 or so
        "kl.coef=0",
        *(PPO_ONLY if method is PPO else GRPO_ONLY),
        *options,
    ]
    stage = method(load_recipe(PPORecipe if method is PPO else GRPORecipe, overrides=overrides))
    scores = []
    for _ in range(STEPS):
        experiences, metrics = stage.collect()
        scores.append(metrics["objective/scores"])
        stage.update([replace(e, advantages=change_advantages(e.advantages, e.mask)) for e in experiences])
    return scores


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_ppo_learns_a_programmatic_reward(seed):
    scores = mean_scores(seed)
    assert scores[0] <= 0.2
    assert sum(scores[-5:]) / 5 >= 0.9, scores


def flipped(advantages, mask):
    return -advantages


def shuffled(advantages, mask):
    """Every advantage goes to another token of the batch."""
    values = advantages[mask]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))
    return torch.zeros_like(advantages).masked_scatter(mask, values[order])


@pytest.mark.parametrize(
    "options",
    [
        [],
        *(
            pytest.param([option], marks=pytest.mark.slow)
            for option in ("grpo.advantage=rloo", "grpo.scale_by_std=false")
        ),
    ],
)
def test_grpo_learns_it_too(options):
    scores = mean_scores(0, method=GRPO, options=options)
    assert scores[0] <= 0.2
    assert sum(scores[-5:]) / 5 >= 0.85, scores


def test_grpo_does_not_learn_from_flipped_advantages():
    assert max(mean_scores(0, flipped, method=GRPO)) <= 0.2


@pytest.mark.parametrize("change_advantages", [flipped, shuffled])
def test_ppo_does_not_learn_from_wrong_advantages(change_advantages):
    """What the test above would report if the update looked at the wrong advantages."""
    assert max(mean_scores(0, change_advantages)) <= 0.2
