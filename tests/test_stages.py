"""The stages end to end on the tiny model: laws of step 0, who moved, and how many bases were in memory."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from lowrank_rlhf import config
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.cli import STAGES
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config import PPORecipe
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages import ppo as ppo_stage
from lowrank_rlhf.stages.ppo import PPO

ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "recipes/quickstart/data/prompts_train.jsonl"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def recipe_files() -> list[Path]:
    """Of stages; a pipeline's is in test_pipeline.py, those in folders are in test_gpu_recipes.py."""
    return sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("pipeline"))


def test_there_are_recipes():
    assert {path.stem for path in recipe_files()} >= {"sft", "reward", "ppo", "dpo", "orpo", "kto"}


def train(stage: str, run_dir: Path, *overrides: str) -> Path:
    recipe = f"recipes/{stage}.yaml"
    assert cli_main([stage, "--config", recipe, "--tiny", f"run_dir={run_dir}", *overrides]) == 0
    return run_dir


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_every_recipe_runs_two_real_steps_in_its_tiny_form(path, tmp_path):
    """With tiny runs in the place of those it goes on from."""
    stage, made = path.stem.partition("_")[0], []
    if "policy_from:" in (text := path.read_text(encoding="utf-8")):
        made.append(f"policy_from={train('sft', tmp_path / 'sft')}")
    if "reward_from:" in text:
        made.append(f"reward_from=[{{run: {train('reward', tmp_path / 'reward')}}}]")
    assert cli_main([stage, "--config", str(path), "--tiny", f"run_dir={tmp_path}/run", *made]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0
    assert rows[-1]["step"] == 2
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert info["base"]["model"] == "tiny"
    assert info["data_hash"]


@pytest.mark.parametrize("stage", ["dpo", "orpo", "kto"])
def test_nothing_need_be_held_out(stage, tmp_path):
    train(stage, tmp_path / "run", "data.eval_fraction=0")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 0}
    assert "loss" in rows[1]
    assert json.loads((tmp_path / "run/run.json").read_text())["final"] == {}


def test_one_base_in_memory_in_every_stage(tmp_path, bases_seen):
    """The tiny model has 2 layers × 7 quantised projections = 14 storages; a second copy would show as 28."""
    gc.collect()
    sft, reward = train("sft", tmp_path / "sft"), train("reward", tmp_path / "reward")
    for stage in ("ppo", "grpo"):
        train(stage, tmp_path / stage, f"policy_from={sft}", f"reward_from=[{{run: {reward}}}]", "reward=null")
    assert bases_seen == {(14, 14)}


def ppo_recipe(*overrides: str) -> PPORecipe:
    settings = [f"data.train={PROMPTS}", "reward=recipes.rewards:concise"]
    return load_recipe(PPORecipe, overrides=settings + list(overrides), tiny=True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("start", ["base", "sft"])
def test_kl_is_0_and_ratio_is_1_before_any_update(quantization, start, tmp_path):
    """The reference is the adapters-off base or the frozen start; on identical layout both are exact, NF4 included."""
    overrides = [f"base.quantization={quantization}"]
    if start == "sft":
        sft = train("sft", tmp_path / "sft", f"base.quantization={quantization}", "train.learning_rate=0.05")
        overrides.append(f"policy_from={sft}")
    run = Run(recipe := ppo_recipe(f"run_dir={tmp_path}/ppo", *overrides))
    ppo_stage.train(recipe, run)
    first = run.metrics()[0]
    assert first["step"] == 0
    assert first["objective/kl"] == 0.0
    assert first["val/ratio"] == 1.0
    assert run.info["reference"] == ("start" if start == "sft" else "base")


def test_reference_base_after_sft_starts_away_from_0(tmp_path, capsys):
    sft = train("sft", tmp_path / "sft", "train.learning_rate=0.05")
    run = Run(recipe := ppo_recipe(f"run_dir={tmp_path}/ppo", f"policy_from={sft}", "reference=base"))
    ppo_stage.train(recipe, run)
    assert abs(run.metrics()[0]["objective/kl"]) > 0.01
    assert "not 0" in capsys.readouterr().out


def test_ppo_moves_policy_and_value_and_nothing_else(tmp_path):
    sft, reward = train("sft", tmp_path / "sft"), train("reward", tmp_path / "reward")
    ppo = PPO(ppo_recipe(f"policy_from={sft}", f"reward_from=[{{run: {reward}}}]", "reward=null"))
    before = {role: [p.detach().clone() for p in ppo.backbone.parameters(role)] for role in ppo.backbone.roles}
    base = [
        w.data.clone() for w in ppo.backbone.model.modules() if isinstance(w, bnb.nn.Linear4bit) for w in [w.weight]
    ]
    experiences, _ = ppo.collect()
    ppo.update(experiences)
    moved = {
        role: any(not torch.equal(a, b) for a, b in zip(before[role], ppo.backbone.parameters(role), strict=True))
        for role in before
    }
    assert moved == {"start": False, "reward": False, "policy": True, "value": True}
    after = [w.weight.data for w in ppo.backbone.model.modules() if isinstance(w, bnb.nn.Linear4bit)]
    assert all(torch.equal(a, b) for a, b in zip(base, after, strict=True))


def test_gradients_are_not_zero_after_scoring():
    """Scoring is eval-mode forwards on NF4, which is what silently breaks gradients on AVX512-BF16 CPUs."""
    ppo = PPO(ppo_recipe())
    ones = [replace(e, advantages=e.mask.float(), returns=e.mask.float()) for e in ppo.collect()[0]]
    ppo.updater.policy_gradients(ones, kl_coef=0.0)
    ppo.updater.value_gradients(ones)
    for role in ("policy", "value"):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in ppo.backbone.parameters(role))


def test_a_run_directory_is_never_overwritten_by_accident(tmp_path, capsys):
    train("sft", tmp_path / "run")
    arguments = ["sft", "--config", "recipes/sft.yaml", "--tiny", f"run_dir={tmp_path}/run"]
    assert cli_main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli_main([*arguments, "--overwrite"]) == 0


def test_a_role_trained_on_another_base_is_refused(tmp_path, capsys):
    sft = train("sft", tmp_path / "sft", "base.quantization=none")
    status = cli_main(["ppo", "--config", "recipes/ppo.yaml", "--tiny", f"run_dir={tmp_path}/p", f"policy_from={sft}"])
    assert status == 2
    assert "another quantisation" in capsys.readouterr().err


def test_dry_run_prints_the_resolved_recipe_and_leaves_nothing(tmp_path, capsys):
    arguments = ["sft", "--config", "recipes/sft.yaml", "--dry-run", f"run_dir={tmp_path}/run", "train.epochs=3"]
    assert cli_main(arguments) == 0
    assert "epochs: 3.0" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_saved_role_reloads_bit_equal(tmp_path):
    reward = train("reward", tmp_path / "reward", "train.learning_rate=0.01")
    ids = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)

    def scores() -> torch.Tensor:
        from lowrank_rlhf.runs import load_run_role

        backbone = Backbone(config.Base(model="tiny"))
        load_run_role(backbone, reward, "reward", "reward", key="test")
        with torch.no_grad(), backbone.use("reward"):
            return backbone.scores("reward", ids, mask)

    first = scores()
    assert first.abs().sum() > 0
    assert torch.equal(first, scores())


def test_sft_trains_its_lora_weights_in_float32(tmp_path):
    """Given a 4-bit base, trl casts trainable LoRA weights to bf16 (trap 13b), where small steps round to nothing."""
    weights = load_file(train("sft", tmp_path / "sft", "train.max_steps=5") / "adapters/sft/adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for name, tensor in weights.items():
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} holds only what bf16 can hold"


def test_the_card_says_how_a_role_was_trained_and_judged(tmp_path):
    run = train("reward", tmp_path / "reward")
    card, info = (run / "adapters/reward/README.md").read_text(), json.loads((run / "run.json").read_text())
    assert card.startswith("---\nbase_model: tiny\nlibrary_name: peft\n")
    assert f"| eval_accuracy | {info['final']['eval_accuracy']:.4g} |" in card
    assert info["data_hash"] in card
    assert "learning_rate 0.0005" in card
    assert str(tmp_path) not in card


def test_stage_table_matches_modules():
    assert set(STAGES) == {"sft", "reward", "ppo", "grpo", "dpo", "orpo", "kto"}
