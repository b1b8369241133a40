"""Loading the base: gradients stay right on CPU, no sampling default survives, the logit path is checked."""

import json
from dataclasses import asdict, replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from lowrank_rlhf.backbone import Backbone, BaseInfo, linear, roles, tiny
from lowrank_rlhf.backbone.base import check_logit_path, four_bit_weights, load_base, pick_device
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.errors import UserError

NF4 = Base(model="tiny", quantization="nf4", device="cpu")
IDS = torch.arange(16).view(2, 8)


def four_bit_layers(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


# Generating must not break training (trap 1)


def lora_gradients(*, generate_first, repack=None):
    """LoRA gradients of one training pass on a new NF4 base, after an eval pass or as its very first forward."""
    backbone = Backbone(NF4)
    if repack is not None:
        for layer in four_bit_layers(backbone.model):
            layer.support_avx512bf16_for_cpu = repack
    backbone.add_role("policy", Lora(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters("policy"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    backbone.train_only("policy")
    if generate_first:
        with torch.no_grad(), backbone.use("policy") as model:
            model(input_ids=IDS)
    with backbone.use("policy", train=True) as model:
        model(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in backbone.parameters("policy")])


@pytest.fixture
def no_forward_while_loading(monkeypatch):
    """The logit check is an eval pass itself, so a base that saw it could not serve as the untouched one."""
    monkeypatch.setattr(roles, "check_logit_path", lambda model: None)


@pytest.mark.usefixtures("no_forward_while_loading")
def test_an_eval_pass_leaves_the_next_gradients_alone():
    fresh, after = lora_gradients(generate_first=False), lora_gradients(generate_first=True)
    assert fresh.count_nonzero() > 0.9 * fresh.numel()
    assert torch.equal(fresh, after)


@pytest.mark.usefixtures("no_forward_while_loading")
@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks 4-bit weights on AVX512-BF16 CPUs only")
def test_with_repacking_an_eval_pass_would_falsify_gradients(monkeypatch):
    """The reason for `keep_autograd_on_cpu`. When this fails, bitsandbytes was fixed and the workaround can go."""
    monkeypatch.setattr(linear, "LEAN", False)  # our own layers never get that far
    fresh = lora_gradients(generate_first=False, repack=True)
    after = lora_gradients(generate_first=True, repack=True)
    assert (after - fresh).norm() > 0.05 * fresh.norm()


def test_no_4bit_layer_may_repack(backbone, quantization):
    layers = four_bit_layers(backbone.model)
    assert len(layers) == (14 if quantization == "nf4" else 0)
    assert {layer.support_avx512bf16_for_cpu for layer in layers} <= {False}


# What is in memory


def test_each_4bit_layer_has_one_storage(backbone, quantization):
    weights = four_bit_weights(backbone.model)
    assert len(weights) == (14 if quantization == "nf4" else 0)
    assert len({weight.data_ptr() for weight in weights}) == len(weights)
    assert {weight.dtype for weight in weights} <= {torch.uint8}
    assert type(backbone.model.get_output_embeddings()) is torch.nn.Linear


def test_the_base_is_frozen_and_in_eval_mode(backbone):
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())


# Loading a folder


@pytest.fixture
def folder(tmp_path):
    """The tiny model as a local folder whose generation_config.json holds sampling defaults, as most hub models do."""
    tiny.tiny_model().save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    defaults = {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.5, "top_k": 7, "max_length": 11}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    return tmp_path


def test_sampling_defaults_of_the_file_are_dropped(folder, quantization):
    """They would make rollouts another distribution than the one that is scored."""
    model, tokenizer, _ = load_base(Base(model=str(folder), quantization=quantization, device="cpu"))
    kept = model.generation_config.to_diff_dict()
    kept.pop("transformers_version", None)
    assert kept == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    prompt = IDS[:1]
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12)
    expected = prompt
    for _ in range(12):  # plain greedy, with eos forbidden as min_new_tokens does
        logits = model(input_ids=expected).logits[:, -1].clone()
        logits[:, tokenizer.eos_token_id] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert found.tolist() == expected.tolist()


def test_a_folder_is_identified_by_its_content(folder, quantization):
    base = Base(model=str(folder), quantization=quantization, device="cpu")
    model, _, info = load_base(base)
    assert (info.model, info.quantization, info.dtype, info.device) == (str(folder), quantization, "float32", "cpu")
    assert (info.pad_token_id, info.eos_token_id) == (257, 257)
    assert info.revision is not None
    assert info.revision.startswith("folder-sha256-")
    assert {layer.support_avx512bf16_for_cpu for layer in four_bit_layers(model)} <= {False}
    assert len(four_bit_layers(model)) == (14 if quantization == "nf4" else 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1234.0}))
    other = load_base(base)[2]
    assert "another revision" in info.mismatch(asdict(other))


def test_other_weights_under_the_same_config_are_another_revision(folder):
    before = load_base(Base(model=str(folder), quantization="none", device="cpu"))[2]
    model = tiny.tiny_model()
    with torch.no_grad():
        model.model.norm.weight[-1] += 0.5
    model.save_pretrained(folder)
    after = load_base(Base(model=str(folder), quantization="none", device="cpu"))[2]
    assert "another revision" in before.mismatch(asdict(after))


def test_a_tokenizer_without_pad_gets_eos(folder):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    _, loaded, info = load_base(Base(model=str(folder), quantization="none", device="cpu"))
    assert (loaded.pad_token, info.pad_token_id) == ("<|im_end|>", 257)


def test_a_missing_folder_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"base\.model: '.*nowhere' cannot be loaded"):
        load_base(Base(model=str(tmp_path / "nowhere"), quantization="none", device="cpu"))


def test_a_folder_without_a_model_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"base\.model: "):
        load_base(Base(model=str(tmp_path), quantization="none", device="cpu"))


def test_an_absent_device_names_the_key():
    with pytest.raises(UserError, match=r"base\.device: 'warp'"):
        pick_device("warp")


# Logits


def test_the_logit_path_of_the_tiny_model_passes(backbone):
    check_logit_path(backbone.model)


def triple_logits(model):
    """An architecture that post-processes its logits in a way its config does not tell."""
    forward = model.forward

    def tripled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = tripled


def test_unknown_logit_processing_is_refused(backbone):
    triple_logits(backbone.model)
    with pytest.raises(UserError, match=r"base\.model: llama changes its logits after lm_head"):
        check_logit_path(backbone.model)


def test_every_backbone_checks_its_logit_path(monkeypatch):
    def load(*arguments):
        loaded = load_base(*arguments)
        triple_logits(loaded[0])
        return loaded

    monkeypatch.setattr(roles, "load_base", load)
    with pytest.raises(UserError, match="changes its logits"):
        Backbone(NF4)


# Identity

INFO = BaseInfo(
    model="m",
    revision="r",
    quantization="nf4",
    dtype="float32",
    device="cpu",
    tokenizer_hash="t",
    template_hash="c",
    pad_token_id=1,
    eos_token_id=1,
)


def test_the_same_base_matches_on_any_device():
    assert INFO.mismatch(asdict(INFO)) is None
    assert INFO.mismatch(asdict(replace(INFO, device="cuda", dtype="bfloat16"))) is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model", "x", "another base model (model 'x', here 'm')"),
        ("revision", None, "another revision of the base (revision None, here 'r')"),
        ("quantization", "none", "another quantisation (quantization 'none', here 'nf4')"),
        ("template_hash", "x", "another chat template (template_hash 'x', here 'c')"),
    ],
)
def test_another_base_is_told_in_words(key, value, words):
    assert INFO.mismatch({**asdict(INFO), key: value}) == words


def test_a_record_without_the_keys_is_another_base():
    assert "another base model" in INFO.mismatch({})
