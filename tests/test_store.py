"""One role to a folder and back, bit for bit: into this library, and into plain transformers + PEFT."""

import json

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from lowrank_rlhf.backbone import Backbone, embedded, linear, tiny
from lowrank_rlhf.backbone.base import BaseInfo
from lowrank_rlhf.backbone.store import load_role, save_role
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.errors import UserError

CARD = "---\nbase_model: tiny\n---\n\n# a card of ours\n"


def fill(backbone, role):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def saved_role(base, folder):
    """A base with two roles, of which the second, with a head, is saved; its logits and scores on random tokens."""
    backbone = Backbone(base)
    for role in ("sft", "reward"):
        backbone.add_role(role, Lora(r=4, rslora=role == "reward"), head=role == "reward")
    fill(backbone, "reward")
    save_role(backbone, "reward", folder, CARD)
    return backbone


def tokens():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(backbone, role):
    ids = tokens()
    with backbone.use(role) as model:
        attention_mask = torch.ones_like(ids)
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        return logits, backbone.scores(role, ids, attention_mask.bool())


def plain_model(source, quantization):
    """As a user without this library would load it, with the one flag that keeps 4-bit weights as they are."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=config if quantization == "nf4" else None,
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture(params=["tiny in float32", "tiny in NF4", "smollm2-135m-instruct in NF4"])
def base_and_source(request, tmp_path):
    model, _, quantization = request.param.partition(" in ")
    quantization = "nf4" if quantization == "NF4" else "none"
    if model != "tiny":
        return Base(quantization=quantization, device="cpu"), embedded.embedded_model()
    folder = tmp_path / "base"
    tiny.tiny_model().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return Base(model=str(folder), quantization=quantization, device="cpu"), folder


def test_a_saved_role_loads_with_plain_transformers_and_peft(base_and_source, tmp_path, monkeypatch):
    """To the bit where ours takes no fast path of a CPU, and to its rounding where it does."""
    base, source = base_and_source
    fast, _ = outputs(saved_role(base, tmp_path / "reward"), "reward")
    monkeypatch.setattr(BaseInfo, "fast_products", False)
    monkeypatch.setattr(linear, "LEAN", False)
    ours, our_scores = outputs(saved_role(base, tmp_path / "plain"), "reward")
    model = PeftModel.from_pretrained(plain_model(source, base.quantization), str(tmp_path / "reward")).eval()
    with torch.no_grad():
        inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "use_cache": False}
        theirs = model(**inputs, output_hidden_states=True)
        bare = plain_model(source, base.quantization)(**inputs).logits
    assert torch.equal(theirs.logits, ours)
    assert float((fast - ours).norm() / ours.norm()) <= 4 * 2**-8  # a few roundings to bf16
    assert not torch.equal(bare, ours), "the adapter must change something"
    head = load_file(tmp_path / "reward/head.safetensors")["linear.weight"]
    # The last bits of this dot product, whose terms nearly cancel, depend on how its inputs are aligned in memory
    assert_close(theirs.hidden_states[-1][:, -1].float() @ head[0], our_scores, atol=1e-7, rtol=1e-6)


def test_a_saved_role_loads_here_bit_for_bit(quantization, tmp_path):
    base = Base(model="tiny", quantization=quantization, device="cpu")
    saved = outputs(saved_role(base, tmp_path / "reward"), "reward")
    backbone = Backbone(base)
    backbone.add_role("policy", Lora(r=2))
    load_role(backbone, tmp_path / "reward", "value")
    assert backbone.roles == ["policy", "value"]
    for before, after in zip(saved, outputs(backbone, "value"), strict=True):
        assert torch.equal(before, after)
    assert not any(parameter.requires_grad for parameter in backbone.parameters("value"))


def test_the_card_is_ours_and_names_no_path_of_this_machine(tmp_path):
    saved_role(Base(model="tiny", device="cpu"), tmp_path / "reward")
    assert (tmp_path / "reward/README.md").read_text() == CARD
    config = json.loads((tmp_path / "reward/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["inference_mode"] is True
    assert sorted(path.name for path in (tmp_path / "reward").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "probe.json",
    ]


def test_saving_again_replaces_the_folder_whole(tmp_path):
    backbone = saved_role(Base(model="tiny", device="cpu"), tmp_path / "reward")
    (tmp_path / "reward/stale.txt").write_text("of an earlier save")
    save_role(backbone, "sft", tmp_path / "reward", CARD)
    names = {path.name for path in (tmp_path / "reward").iterdir()}
    assert not names & {"stale.txt", "head.safetensors", "probe.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


def test_a_kill_while_saving_leaves_the_old_folder(tmp_path, monkeypatch):
    backbone = saved_role(Base(model="tiny", device="cpu"), tmp_path / "reward")
    before = (tmp_path / "reward/adapter_model.safetensors").read_bytes()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank_rlhf.backbone.store.LoraConfig.save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        save_role(backbone, "sft", tmp_path / "reward", CARD)
    assert (tmp_path / "reward/adapter_model.safetensors").read_bytes() == before


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing-here: no adapter here \(adapter_model.safetensors is missing\)"):
        load_role(Backbone(Base(model="tiny", device="cpu")), tmp_path / "nothing-here", "policy")


def test_an_adapter_with_missing_weights_is_refused(tmp_path):
    from safetensors.torch import save_file

    base = Base(model="tiny", device="cpu")
    saved_role(base, tmp_path / "reward")
    path = tmp_path / "reward/adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(iter(weights)))
    save_file(weights, path)
    with pytest.raises(UserError, match="the adapter does not fit tiny"):
        load_role(Backbone(base), tmp_path / "reward", "policy")


@pytest.mark.parametrize("what", ["head", "adapter"])
def test_a_role_that_scores_otherwise_than_when_it_was_saved_is_refused(what, tmp_path):
    from safetensors.torch import save_file

    base = Base(model="tiny", device="cpu")
    saved_role(base, tmp_path / "reward")
    path = tmp_path / "reward" / ("head.safetensors" if what == "head" else "adapter_model.safetensors")
    axis = 1 if what == "head" else 0
    save_file({name: tensor.flip(axis).contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match="scores of the stored probe are"):
        load_role(Backbone(base), tmp_path / "reward", "policy")


# A reward model of transformers' own kind (trap 11)


def classifier_adapter(folder, labels):
    """A one-label sequence classifier on the tiny base, its LoRA and score layer at random, saved by PEFT."""
    tiny.tiny_model().save_pretrained(folder / "base")
    tiny.tiny_tokenizer().save_pretrained(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=labels, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "score" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def test_a_reward_adapter_of_a_sequence_classifier_loads_onto_the_causal_base(tmp_path):
    classifier = classifier_adapter(tmp_path, labels=1)
    backbone = Backbone(Base(model=str(tmp_path / "base"), quantization="none", device="cpu"))
    load_role(backbone, tmp_path / "adapter", "reward")
    ids = tokens()  # no pad token in them, so the classifier reads the last one as we do
    with torch.no_grad(), backbone.use("reward"):
        scores = backbone.scores("reward", ids, torch.ones_like(ids).bool())
        assert_close(scores, classifier(input_ids=ids).logits[:, 0], atol=1e-5, rtol=1e-5)
    assert scores.abs().min() > 1e-3


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    classifier_adapter(tmp_path, labels=3)
    backbone = Backbone(Base(model=str(tmp_path / "base"), quantization="none", device="cpu"))
    with pytest.raises(UserError, match="a classifier of 3 labels is not a reward model"):
        load_role(backbone, tmp_path / "adapter", "reward")
