"""The SFT trainer: its loss is trl's, packing and micro-batches change nothing, and a base that leaks is refused."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import BloomConfig, BloomForCausalLM
from trl import SFTTrainer

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config import Base, SFTRecipe
from lowrank_rlhf.data import Renderer, load_demonstrations, tokenize_demonstrations
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.runs import Run
from lowrank_rlhf.stages import sft_trainer
from lowrank_rlhf.stages.sft_trainer import build_trainer, refuse_leaking

ROWS = [{"prompt": "Hi" * i, "completion": "Hello" * (5 - i)} for i in range(1, 5)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2))
    return path


@pytest.fixture
def make_trainer(data, tmp_path):
    """A trainer on the float32 tiny model, whose B matrices are not zero, so that every weight has a gradient."""

    def make(*overrides):
        settings = ["base.quantization=none", "base.device=cpu", f"data.train={data}", f"data.eval={data}"]
        settings += [f"run_dir={tmp_path}/run", "train.batch_size=8", "train.micro_batch_size=8"]
        recipe = load_recipe(SFTRecipe, overrides=settings + list(overrides), tiny=True)
        backbone = Backbone(recipe.base)
        backbone.add_role("sft", recipe.lora)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in backbone.parameters("sft"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        backbone.train_only("sft")
        renderer = Renderer(backbone.tokenizer, recipe.data)
        train_set, eval_set = (tokenize_demonstrations(part, renderer)[0] for part in load_demonstrations(recipe.data))
        return build_trainer(recipe, backbone, Run(recipe, overwrite=True), train_set, eval_set)

    return make


def gradient(trainer, compute_loss=None):
    """Loss and LoRA gradient of the whole train set, accumulated over its micro-batches."""
    batches = list(trainer.get_train_dataloader())
    learned = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    total = 0.0
    with trainer.backbone.use("sft", train=True):
        for batch in batches:
            loss = (compute_loss or trainer.compute_loss)(trainer.model, batch, num_items_in_batch=learned)
            loss.backward()
            total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in trainer.role_parameters])


def assert_same(ours, theirs):
    """Loss and gradient, whose float32 sums are taken in another order: their norm over norm is far below a rounding
    of every entry, single entries are off by some 1e-5 of them, as either is from float64."""
    assert_close(ours, theirs, rtol=0, atol=5e-6)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < 2e-6


def test_the_loss_is_trls(make_trainer):
    ours = gradient(make_trainer())
    trainer = make_trainer()
    trls = gradient(trainer, lambda *args, **kwargs: SFTTrainer.compute_loss(trainer, *args, **kwargs))
    assert ours[1].norm() > 0.01
    assert_same(ours, trls)


def test_the_training_figures_are_trls(make_trainer):
    def figures(compute_loss):
        trainer = make_trainer()
        with trainer.backbone.use("sft", train=True):
            for batch in trainer.get_train_dataloader():
                compute_loss(trainer, trainer.model, batch, num_items_in_batch=torch.tensor(1))
        return dict(trainer._metrics["train"])

    ours, trls = figures(sft_trainer.RunTrainer.compute_loss), figures(SFTTrainer.compute_loss)
    assert ours.keys() == trls.keys()
    for name in ours:
        assert ours[name] == pytest.approx(trls[name], abs=1e-6), name


def test_micro_batches_of_one_are_a_batch_of_eight(make_trainer):
    assert_same(gradient(make_trainer("train.micro_batch_size=1")), gradient(make_trainer()))


def test_the_held_out_loss_is_that_of_all_tokens_whatever_the_micro_batch(make_trainer):
    """By hand: the mean over tokens, not over batches, which would depend on how many there are."""
    found = [make_trainer(f"train.micro_batch_size={size}").evaluate() for size in (1, 2, 8)]
    for metrics in found:
        assert metrics == pytest.approx(found[0], abs=1e-6)
    trainer = make_trainer()
    loss, _ = gradient(trainer)
    assert found[0]["eval_loss"] == pytest.approx(loss, abs=1e-6)


# Packing


def test_packed_rows_have_the_gradient_of_rows_alone(make_trainer):
    """Documents see themselves alone and count from 0, so that packing is only another layout."""
    packed = make_trainer("train.packing=true")
    (batch,) = packed.get_train_dataloader()
    assert "attention_mask" not in batch
    assert int((batch["position_ids"] == 0).sum()) == 8
    assert_same(gradient(packed), gradient(make_trainer()))


def test_rows_are_packed_up_to_the_token_limits_and_none_is_cut(make_trainer):
    limits = ("data.max_prompt_tokens=100", "data.max_completion_tokens=30")
    packed, alone = (
        list(make_trainer(*limits, f"train.packing={flag}").train_dataset["input_ids"]) for flag in ("true", "false")
    )
    assert len(packed) <= 4 < len(alone) == 8
    assert max(map(len, packed)) <= 130
    assert sum(map(len, packed)) == sum(map(len, alone))


def test_a_base_whose_attention_knows_no_packed_rows_is_refused(tmp_path):
    """BLOOM's position bias follows from the attention mask, which packed rows do not have."""
    config = BloomConfig(vocab_size=258, hidden_size=64, n_layer=2, n_head=4, pad_token_id=257, eos_token_id=257)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match=r"train.packing: .*bloom lets packed rows see each other"):
        refuse_leaking(Backbone(Base(model=str(tmp_path / "bloom"), quantization="none", device="cpu")))
    refuse_leaking(Backbone(Base(model="tiny", device="cpu")))


def test_a_packed_run_trains_and_says_so(data, tmp_path, capsys):
    arguments = [f"data.train={data}", f"data.eval={data}", f"run_dir={tmp_path}/run", "train.packing=true"]
    assert cli_main(["sft", "--config", "recipes/sft.yaml", "--tiny", *arguments]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["recipe"]["train"]["packing"] is True
    assert "sft step 2/2" in capsys.readouterr().out
