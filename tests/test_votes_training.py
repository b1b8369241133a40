"""Votes to weights: an export trains one real step in each of our stages, and in TRL's own trainers on plain models."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.exports import export
from lowrank_rlhf.backbone.tiny import tiny_model, tiny_tokenizer
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import Renderer, load_demonstrations
from tests.vote_records import answer, asked, cast, compared, vote

ROOT = Path(__file__).parent.parent
STAGES = {
    "sft": "demonstrations",
    "reward": "preference",
    "dpo": "preference",
    "orpo": "preference",
    "kto": "unpaired",
    "ppo": "prompts",
    "grpo": "prompts",
}

REWARDS = {"ppo": "one", "grpo": "lowercase"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Votes of every kind on 24 prompts, half of the answers with a system prompt; a few conversations."""
    folder = tmp_path_factory.mktemp("votes")
    store = Store(folder / "votes.db")
    for i in range(24):
        prompt = asked(f"Say {i}")
        if i % 6 == 0:
            prompt = (*prompt, {"role": "assistant", "content": f"{i}"}, *asked("Again"))
        system = "Be kind." if i % 2 else ""
        texts = ("yes" * (1 + i % 3), "nope", "maybe")
        answers = [answer(f"m{k}", text, prompt, system=system) for k, text in enumerate(texts)]
        pair = compared(*answers[:2])
        cast(store, pair, "a", strength=1 + i % 4)
        store.save_vote(vote(pair, up=True))
        store.save_vote(vote(pair, text="Yes, certainly.", answer=pair.answers[1].id))
        cast(store, compared("bad", "worse", prompt=prompt), "both_bad")
        cast(store, compared(*answers), ranking=(1, 3, 2))
    export(store, folder / "data", eval_fraction=0.25)
    return folder / "data"


# Our stages


@pytest.mark.parametrize(("stage", "kind"), [*STAGES.items(), ("reward", "ranking"), ("dpo", "ranking")])
def test_our_stages_train_on_an_export(stage, kind, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    settings = [
        f"run_dir={run}",
        f"data.train={exported}/{kind}_train.jsonl",
        f"data.eval={exported}/{kind}_test.jsonl",
        "base.device=cpu",
        "base.quantization=none",
        "data.max_prompt_tokens=64",
        "train.max_steps=1",
        "train.warmup_ratio=0",
    ]
    settings += [f"reward=tests.reward_functions:{REWARDS[stage]}"] if stage in REWARDS else []
    assert cli_main([stage, "--config", f"recipes/{stage}.yaml", "--tiny", *settings]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [value for row in rows if row["step"] == 1 for name, value in row.items() if "loss" in name]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    role = {"sft": "sft", "reward": "reward"}.get(stage, "policy")
    # What is zero at the start; a reward model's head alone has a gradient in the first step
    moved = "head.safetensors" if stage == "reward" else "adapter_model.safetensors"
    weights = load_file(run / "adapters" / role / moved)
    assert any(bool(value.any()) for name, value in weights.items() if stage == "reward" or "lora_B" in name)


# TRL alone


def trl_data(folder, kind):
    files = {side: str(folder / f"{kind}_{side}.jsonl") for side in ("train", "test")}
    return load_dataset("json", data_files=files, cache_dir=str(folder.parent / "cache"))


def classifier():
    config = tiny_model().config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("trainer", "config", "kind", "task"),
    [
        (SFTTrainer, SFTConfig, "demonstrations", None),
        (RewardTrainer, RewardConfig, "preference", "SEQ_CLS"),
        (DPOTrainer, DPOConfig, "preference", None),
        (KTOTrainer, KTOConfig, "unpaired", None),
    ],
)
def test_trl_trains_on_an_export(trainer, config, kind, task, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    data = trl_data(exported, kind)
    settings = config(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
    )
    made = trainer(
        model=classifier() if task else tiny_model(),
        args=settings,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task or "CAUSAL_LM"),
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters() if "lora_B" in name}
    loss = made.train().training_loss
    assert math.isfinite(loss)
    if trainer is DPOTrainer:
        assert loss == pytest.approx(math.log(2), abs=1e-5)
    if trainer is KTOTrainer:
        assert loss == pytest.approx(0.5, abs=1e-5)
    assert before
    assert all(not torch.equal(before[name], p) for name, p in made.model.named_parameters() if name in before)
    assert math.isfinite(made.evaluate()["eval_loss"])


def test_trl_reads_prompt_and_answer_as_our_renderer_does(exported, tmp_path):
    """The tokens of a demonstration, up to the line break that templates write after the last turn (TRAPS 17c)."""
    path = exported / "demonstrations_train.jsonl"
    tokenizer = tiny_tokenizer()
    ours, _ = load_demonstrations(Data(train=str(path), eval_fraction=0))
    renderer = Renderer(tokenizer, Data(train=str(path)))
    settings = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    rows = trl_data(exported, "demonstrations")["train"]
    trls = SFTTrainer(model=tiny_model(), args=settings, train_dataset=rows, processing_class=tokenizer).train_dataset
    assert len(ours) == len(trls) > 10
    for example, row in zip(ours, trls, strict=True):
        mine = renderer.demonstration(example.prompt, example.chosen, example.where)
        text = tokenizer.decode(row["input_ids"]).removesuffix("\n")
        assert tokenizer.decode(mine.input_ids) == text
        assert sum(mine.completion_mask) == sum(label != -100 for label in row["labels"]) - 1
