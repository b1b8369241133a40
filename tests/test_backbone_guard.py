"""What would silently break "one base, many adapters" is refused by name, and the base stays as it was."""

import pytest
import torch
from peft import IA3Config, LoraConfig

from lowrank_rlhf.config import Lora
from lowrank_rlhf.errors import UserError


def base_bits(backbone):
    """Every base tensor, packed bytes and quantisation constants included."""
    state = backbone.model.state_dict()
    return {name.replace("base_layer.", ""): tensor.clone() for name, tensor in state.items() if "lora_" not in name}


def assert_base_unchanged(before, backbone):
    after = base_bits(backbone)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def refused(backbone, config, words):
    """`add_adapter` raises with `words` and leaves no trace on the base."""
    before = base_bits(backbone)
    with pytest.raises(UserError, match=words):
        backbone.add_adapter("bad", config)
    assert_base_unchanged(before, backbone)


# Initialisations that rewrite the base (trap 9)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_base_rewriting_initialisations_are_refused_by_name(backbone, init):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    config.init_lora_weights = init  # set afterwards: PEFT asks for data of some of these while constructing
    refused(backbone, config, f"role 'bad': init_lora_weights='{init}' rewrites the base")
    assert backbone.roles == []


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initialisations_that_leave_the_base_alone_are_accepted(backbone, init):
    before = base_bits(backbone)
    backbone.add_adapter("good", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    assert backbone.roles == ["good"]
    assert_base_unchanged(before, backbone)


def test_an_initialisation_that_fails_on_packed_weights_is_refused(backbone):
    """PEFT casts an orthogonal adapter to the dtype of the base weight, which is uint8 in NF4."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
    refused(backbone, config, "init_lora_weights='orthogonal' is not known to work")


# Options that touch shared modules (trap 8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "modules_to_save"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "trainable_token_indices"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "bias='all'"),
        (LoraConfig(target_modules=["q_proj"], bias="lora_only"), "bias='lora_only'"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "only LoRA is"),
    ],
    ids=["modules_to_save", "trainable_token_indices", "bias-all", "bias-lora_only", "ia3"],
)
def test_options_that_touch_shared_modules_are_refused(backbone, config, words):
    refused(backbone, config, words)
    assert backbone.roles == []


# lm_head


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ["model.lm_head"]])
def test_lm_head_in_a_list_is_refused(backbone, targets):
    refused(backbone, LoraConfig(r=4, target_modules=targets), "LoRA on lm_head is refused")
    assert backbone.roles == []


def test_lm_head_in_a_pattern_is_refused(backbone):
    config = LoraConfig(r=4, target_modules=".*lm_head")
    with pytest.raises(UserError, match="role 'bad': LoRA on lm_head is refused"):
        backbone.add_adapter("bad", config)


def test_lm_head_is_refused_from_a_recipe_too(backbone):
    with pytest.raises(UserError, match="LoRA on lm_head is refused"):
        backbone.add_role("bad", Lora(r=4, target_modules=["lm_head"]))


def test_all_linear_leaves_lm_head_out(backbone):
    backbone.add_role("policy", Lora(r=4))
    wrapped = {name.split(".")[-4] for name, _ in backbone.model.named_parameters() if "lora_A" in name}
    assert wrapped == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_targets_that_match_nothing_name_the_key(backbone):
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        backbone.add_role("bad", Lora(r=4, target_modules=["c_attn"]))
    assert backbone.roles == []


# Merging (trap 2)


@pytest.mark.parametrize("quantization", ["nf4"], indirect=True)
@pytest.mark.parametrize("ask", ["merge_adapter", "merge_and_unload"])
def test_merging_into_the_4bit_base_is_refused(backbone, ask):
    before = base_bits(backbone)
    for role in ("policy", "reward"):
        backbone.add_role(role, Lora(r=4))
        with torch.no_grad():
            for parameter in backbone.parameters(role):
                parameter.fill_(0.1)
        with backbone.use(role), pytest.raises(UserError, match="merging a LoRA into the 4-bit base is refused"):
            getattr(backbone.peft, ask)()
        assert_base_unchanged(before, backbone)
    assert all(not module.merged for module in backbone.model.modules() if hasattr(module, "merged"))
