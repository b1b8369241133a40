"""Modes cannot leak: who is on, who learns, what backward reaches, and what a mixed batch computes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.testing import assert_close

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.base import four_bit_weights
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.errors import UserError

LORA = Lora(r=4)


def fill(backbone, role, seed):
    """Give `role` weights that change the output visibly; a fresh adapter has B = 0 and changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def tokens(rows=2, columns=8, seed=0):
    return torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(seed))


def everything_attended(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def completion_from(ids, column):
    return (torch.arange(ids.shape[1]) >= column).expand_as(ids)


def logps(backbone, ids=None):
    ids = tokens() if ids is None else ids
    return backbone.token_logps(ids, everything_attended(ids), completion_from(ids, 3))[0]


def logits(backbone, ids):
    with torch.no_grad():
        return backbone.model(input_ids=ids, use_cache=False).logits


def bits(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def same_bits(before, parameters):
    return all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def learning(backbone):
    """The roles whose LoRA weights have requires_grad, read off the model by name; fails when one is half on."""
    found = {}
    for name, parameter in backbone.model.named_parameters():
        role = next((part for part in name.split(".") if part in backbone.roles), None)
        found.setdefault(role, set()).add(parameter.requires_grad)
    assert found.pop(None) == {False}, "the base must be frozen"
    assert set(found) == set(backbone.roles)
    assert all(len(states) == 1 for states in found.values()), found
    return {role for role, states in found.items() if states == {True}}


@pytest.fixture
def two(backbone):
    """Two roles with visible weights, and a head on the first."""
    for seed, role in enumerate(("policy", "reward")):
        backbone.add_role(role, LORA, head=role == "policy")
        fill(backbone, role, seed)
    return backbone


@pytest.fixture
def three(two):
    two.add_role("third", LORA)
    fill(two, "third", 2)
    return two


# Who learns (trap 4)


@pytest.mark.parametrize("trained", [(), ("policy",), ("reward",), ("policy", "reward")])
def test_no_switch_changes_who_learns(two, trained):
    two.train_only(*trained)
    for role in ("policy", "reward", None):
        with two.use(role, train=True):
            assert learning(two) == set(trained)
        assert learning(two) == set(trained)
    with two.reference():
        assert learning(two) == set(trained)
        with two.use("reward"):
            assert learning(two) == set(trained)
            with two.use("policy"), two.use(None):
                assert learning(two) == set(trained)
            assert learning(two) == set(trained)
    with two.mixed(["policy", "reward"]):
        assert learning(two) == set(trained)
    assert learning(two) == set(trained)
    assert all(parameter.requires_grad == ("policy" in trained) for parameter in two.heads["policy"].parameters())


@pytest.mark.parametrize("inside", ["use", "reference", "mixed"])
def test_an_exception_restores_everything(two, inside):
    two.train_only("policy")
    ids = tokens()
    with two.use("policy", train=True):
        expected = logits(two, ids)
        modes = {"use": two.use("reward"), "reference": two.reference(), "mixed": two.mixed(["reward", None])}
        with pytest.raises(ZeroDivisionError), modes[inside]:
            1 / 0  # noqa: B018
        assert (two.active, two.model.training, learning(two)) == ("policy", True, {"policy"})
        assert torch.equal(logits(two, ids), expected)
    assert (two.active, two.model.training) == (None, False)


def test_new_roles_copies_and_heads_are_frozen(two):
    two.train_only("policy")
    two.add_role("third", LORA, head=True)
    two.copy_role("policy", "copy")
    assert learning(two) == {"policy"}
    assert not any(parameter.requires_grad for role in ("third", "copy") for parameter in two.heads[role].parameters())


def test_an_optimizer_on_a_second_role_moves_it(two):
    """PEFT's switch freezes every adapter but the named one, and an optimizer steps silently over grad=None."""
    two.train_only("policy", "reward")
    optimizer = torch.optim.SGD(two.parameters("reward"), lr=1.0)
    before = bits(two.parameters("reward"))
    with two.use("policy", train=True):
        logps(two).sum().backward()
    with two.use("reward", train=True):
        logps(two).sum().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, two.parameters("reward"), strict=True))


def test_one_optimizer_over_two_roles_moves_both(two):
    two.train_only("policy", "reward")
    roles = {role: two._switch.parameters(role) for role in ("policy", "reward")}
    optimizer = torch.optim.SGD(roles["policy"] + roles["reward"], lr=1.0)
    before = {role: bits(parameters) for role, parameters in roles.items()}
    for role in ("policy", "reward"):
        with two.use(role, train=True):
            logps(two).sum().backward()
    optimizer.step()
    for role in ("policy", "reward"):
        assert not any(torch.equal(old, new) for old, new in zip(before[role], roles[role], strict=True))


def test_training_the_policy_leaves_the_rest_bit_identical(three):
    """Weight decay would move a parameter with a zero gradient, so AdamW is given every role."""
    three.train_only("policy")
    frozen = [parameter for name, parameter in three.model.named_parameters() if "policy" not in name.split(".")]
    before, policy = bits(frozen), bits(three.parameters("policy"))
    every = [parameter for role in three.roles for parameter in three.parameters(role)]
    optimizer = torch.optim.AdamW(every, lr=0.1, weight_decay=0.1)
    ids = tokens()
    for _ in range(2):
        with three.reference(), torch.no_grad():
            logps(three, ids)
        with three.use("policy", train=True):
            (logps(three, ids).sum() + three.scores("policy", ids, everything_attended(ids)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(before, frozen)
    assert not any(torch.equal(old, new) for old, new in zip(policy, three.parameters("policy"), strict=True))


# What backward reaches (trap 5)


def gradients(backbone, where):
    """LoRA gradients of one policy pass whose backward runs `where`, then cleared."""
    if where == "inside":
        with backbone.use("policy", train=True):
            logps(backbone).sum().backward()
    else:
        with backbone.use("policy", train=True):
            loss = logps(backbone).sum()
        if where == "after":
            loss.backward()
        elif where == "under another role":
            with backbone.use("reward", train=True):
                loss.backward()
        elif where == "under the base":
            with backbone.use(None):
                loss.backward()
    found = [parameter.grad for parameter in backbone._switch.parameters("policy")]
    assert all(gradient is not None and bool(gradient.any()) for gradient in found)
    assert all(parameter.grad is None for parameter in backbone._switch.parameters("reward"))
    for parameter in backbone._switch.parameters("policy"):
        parameter.grad = None
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_backward_reaches_the_role_of_its_forward(two, checkpointing):
    two.train_only("policy", "reward")
    expected = gradients(two, "inside")
    if checkpointing:
        two.enable_gradient_checkpointing()
    for where in ("inside", "after", "under another role", "under the base"):
        assert same_bits(expected, gradients(two, where)), where


def test_two_forwards_then_two_backwards_with_checkpointing(two):
    """Actor and critic in one step: both losses exist before either backward runs."""
    two.train_only("policy", "reward")
    expected = {}
    for role in ("policy", "reward"):
        with two.use(role, train=True):
            logps(two).sum().backward()
        expected[role] = bits(parameter.grad for parameter in two._switch.parameters(role))
        for parameter in two._switch.parameters(role):
            parameter.grad = None
    two.enable_gradient_checkpointing()
    losses = []
    for role in ("policy", "reward"):
        with two.use(role, train=True):
            losses.append(logps(two).sum())
    sum(losses).backward()
    for role in ("policy", "reward"):
        assert same_bits(expected[role], [parameter.grad for parameter in two._switch.parameters(role)])
    assert (two.active, learning(two)) == (None, {"policy", "reward"})


def test_checkpointing_recomputes(two):
    """Otherwise the tests above would compare plain backward with itself."""
    two.train_only("policy")
    two.enable_gradient_checkpointing()
    forwards = []
    two.model.model.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(two.active))
    with two.use("policy", train=True):
        loss = logps(two).sum()
    loss.backward()
    assert forwards == ["policy", "policy"]
    assert two.active is None


# The reference (trap 6)


def test_reference_is_the_bare_base_bit_for_bit(two, quantization):
    bare = Backbone(Base(model="tiny", quantization=quantization, device="cpu"))
    with torch.no_grad(), two.use("policy"):
        policy = logps(two)
        with two.reference():
            assert torch.equal(logps(two), logps(bare))
        assert not torch.equal(policy, logps(bare))
        assert torch.equal(logps(two), policy)


def test_reference_after_sft_is_the_sft_role(backbone):
    """Adapters off would be the raw base: the KL of step 0 would not be 0."""
    backbone.add_role("sft", LORA)
    fill(backbone, "sft", 0)
    backbone.copy_role("sft", "start")
    backbone.reference_role = "start"
    with torch.no_grad():
        with backbone.use("sft"):
            sft = logps(backbone)
        with backbone.reference():
            assert torch.equal(logps(backbone), sft)
        with backbone.use(None):
            assert not torch.equal(logps(backbone), sft)


# One role per row (trap 7)

ROWS = ["policy", None, "reward", "policy"]


def test_mixed_rows_equal_separate_passes(two):
    ids = tokens(4)
    attention = everything_attended(ids)
    attention[1, :3] = False
    separate = {}
    with torch.no_grad():
        for role in dict.fromkeys(ROWS):
            with two.use(role):
                separate[role] = two.hidden(ids, attention)
        assert not torch.equal(separate["policy"], separate["reward"])
        assert not torch.equal(separate["policy"], separate[None])
        with two.mixed(ROWS):
            found = two.hidden(ids, attention)
    assert torch.equal(found, torch.stack([separate[role][i] for i, role in enumerate(ROWS)]))


@pytest.mark.parametrize("beams", [1, 2])
def test_mixed_generation_equals_separate_generation(two, beams):
    ids = tokens(4)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    separate = {}
    for role in dict.fromkeys(ROWS):
        with two.use(role) as model:
            separate[role] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert len({tuple(found[3].tolist()) for found in separate.values()}) == 3, "the roles must differ"
    with two.mixed(ROWS) as model:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(found, torch.stack([separate[role][i] for i, role in enumerate(ROWS)]))


@pytest.mark.parametrize("role", ["policy", None])
def test_an_exception_in_a_mixed_forward_leaves_nothing_behind(two, role):
    ids = tokens(4)
    with two.use(role):
        before, hooks_before = logits(two, ids), hooks(two.model)
        with pytest.raises(UserError, match="3 roles met an input of 4 rows"), two.mixed([None, None, "reward"]):
            logits(two, ids)
        assert hooks(two.model) == hooks_before
        assert torch.equal(logits(two, ids), before)
        with pytest.raises(IndexError), two.mixed(ROWS):
            logits(two, ids + 1000)
        assert hooks(two.model) == hooks_before
        assert torch.equal(logits(two, ids), before)
    assert not any(module._forward_pre_hooks for module in two.model.modules() if isinstance(module, LoraLayer))


def test_mixed_works_while_adapters_are_off(two):
    """PEFT ignores the names under disabled adapters: every row would silently be the base."""
    ids = tokens()
    with two.use("policy"):
        policy = logits(two, ids)
    with two.use(None):
        base = logits(two, ids)
        with two.mixed([None, "policy"]):
            assert torch.equal(logits(two, ids), torch.stack([base[0], policy[1]]))
        assert torch.equal(logits(two, ids), base)


def test_mixed_runs_in_eval_mode(backbone):
    """PEFT refuses names in train mode; dropout would change the rows."""
    backbone.add_role("policy", Lora(r=4, dropout=0.5))
    fill(backbone, "policy", 0)
    ids = tokens()
    with backbone.use("policy"):
        expected = logits(backbone, ids)
    with backbone.use("policy", train=True):
        assert not torch.equal(logits(backbone, ids), expected), "dropout must be on here"
        with backbone.mixed(["policy", "policy"]) as model:
            assert not any(module.training for module in model.modules())
            assert torch.equal(logits(backbone, ids), expected)
        assert all(module.training for module in backbone.model.modules())


def test_mixed_batch_of_base_rows_needs_no_role(backbone):
    ids = tokens()
    expected = logits(backbone, ids)
    with backbone.mixed([None, None]):
        assert torch.equal(logits(backbone, ids), expected)


def test_mixed_refuses_dora_by_name(two):
    two.add_adapter("directional", LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="'directional' uses DoRA"), two.mixed(["policy", "directional"]):
        pytest.fail("the block must not run")
    with two.mixed(["policy", None]):
        logits(two, tokens())


@pytest.mark.parametrize("enter", [lambda b: b.use("polcy"), lambda b: b.mixed(["policy", "polcy"])])
def test_unknown_role_is_refused_and_the_known_ones_are_named(two, enter):
    with pytest.raises(UserError, match="no role 'polcy' on this base; there are: policy, reward"), enter(two):
        pytest.fail("the block must not run")
    assert two.active is None


def test_unknown_role_is_refused_everywhere(two):
    for call in (two.train_only, two.parameters, lambda role: two.copy_role(role, "new")):
        with pytest.raises(UserError, match="no role 'polcy'"):
            call("polcy")
    with pytest.raises(UserError, match="role 'policy' is already on this base"):
        two.add_role("policy", LORA)
    with pytest.raises(UserError, match="role 'policy' is already on this base"):
        two.copy_role("reward", "policy")


# Heads (trap 8) and copies


def test_heads_are_plain_fp32_outside_peft(two):
    head = two.heads["policy"]
    assert [type(module) for module in head.modules() if isinstance(module, nn.Linear)] == [nn.Linear]
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    in_model = {id(parameter) for parameter in two.model.parameters()}
    assert not any(id(parameter) in in_model for parameter in head.parameters())
    state = get_peft_model_state_dict(two.peft, adapter_name="policy")
    assert state
    assert all("lora_A" in name or "lora_B" in name for name in state)
    assert two.peft.peft_config["policy"].modules_to_save is None


def test_a_new_role_changes_nothing_and_its_head_gives_zero(backbone):
    ids = tokens()
    with torch.no_grad():
        before = logps(backbone)
        backbone.add_role("policy", LORA, head=True)
        with backbone.use("policy"):
            assert torch.equal(logps(backbone), before)
            assert backbone.scores("policy", ids, everything_attended(ids)).tolist() == [0.0, 0.0]


def test_copy_role_is_exact_and_independent(backbone):
    backbone.add_role("sft", Lora(r=3, alpha=5.0, dropout=0.1, target_modules=["q_proj", "down_proj"], rslora=True))
    backbone.add_head("sft")
    fill(backbone, "sft", 0)
    backbone.copy_role("sft", "policy")
    assert len(backbone.parameters("policy")) == 2 * 4 + 1
    assert same_bits(backbone.parameters("sft"), backbone.parameters("policy"))
    ids = tokens()
    outputs = []
    for role in ("sft", "policy"):
        with torch.no_grad(), backbone.use(role):
            outputs.append((logps(backbone), backbone.scores(role, ids, everything_attended(ids))))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert outputs[0][1].all()
    before = bits(backbone.parameters("sft"))
    fill(backbone, "policy", 1)
    assert same_bits(before, backbone.parameters("sft"))


def test_all_roles_share_one_packed_base(backbone, quantization):
    packed = four_bit_weights(backbone.model)
    assert len(packed) == (14 if quantization == "nf4" else 0)
    base = dict(backbone.model.named_parameters())
    storages = {parameter.data_ptr() for parameter in base.values()}
    assert len(storages) == len(base)
    before = bits(base.values())
    for role in ("policy", "reward", "third"):
        backbone.add_role(role, LORA)
    backbone.train_only("policy")
    optimizer = torch.optim.AdamW([p for p in backbone.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        with backbone.use("policy", train=True):
            logps(backbone).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(before, base.values())
    assert {weight.data_ptr() for weight in four_bit_weights(backbone.model)} <= storages
    assert len(four_bit_weights(backbone.model)) == len(packed)
    now = [p for name, p in backbone.model.named_parameters() if "lora_" not in name]
    assert {parameter.data_ptr() for parameter in now} == storages


# Passes


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_equal_log_softmax_of_the_full_logits(two, temperature):
    ids = tokens(3, 10)
    completion = completion_from(ids, 4).clone()
    completion[1, 7:] = False
    with torch.no_grad(), two.use("policy"):
        found, entropy = two.token_logps(ids, everything_attended(ids), completion, temperature=temperature)
        full = torch.log_softmax(logits(two, ids).float() / temperature, dim=-1)
    expected = full[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    expected_entropy = -(full.exp() * full).sum(-1)[:, :-1]
    assert_close(found[:, 1:], expected * completion[:, 1:], atol=1e-5, rtol=0)
    assert_close(entropy[:, 1:], expected_entropy * completion[:, 1:], atol=1e-5, rtol=0)
    assert not found[~completion].any()


@pytest.fixture
def exact():
    """Float32 only: in NF4 with bf16 matmuls another layout of the same tokens gives other numbers."""
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"))
    backbone.add_role("reward", LORA, head=True)
    fill(backbone, "reward", 0)
    return backbone


def test_right_padding_changes_nothing(exact):
    """The trunk in float64, so that what another width does to the order of its sums stays below 1e-6."""
    exact.model.double()
    ids = tokens(2, 8)
    padded = torch.cat([ids, tokens(2, 5, seed=1)], dim=1)
    attention = torch.arange(13).expand_as(padded) < 8
    completion = completion_from(padded, 3) & attention
    with torch.no_grad(), exact.use("reward"):
        for plain, more in zip(
            (
                *exact.token_logps(ids, everything_attended(ids), completion_from(ids, 3)),
                exact.values("reward", ids, everything_attended(ids), completion_from(ids, 3)),
            ),
            (*exact.token_logps(padded, attention, completion), exact.values("reward", padded, attention, completion)),
            strict=True,
        ):
            assert plain.any()
            assert_close(more[:, :8], plain, atol=1e-6, rtol=0)
            assert not more[:, 8:].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_read_at_the_last_attended_token(exact, side):
    lengths = [3, 7, 9]
    rows = [tokens(1, length, seed=length) for length in lengths]
    padded, attention = tokens(3, 9, seed=99), torch.zeros(3, 9, dtype=torch.bool)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(9 - length, 9) if side == "left" else slice(0, length)
        padded[i, place], attention[i, place] = row[0], True
    with torch.no_grad(), exact.use("reward"):
        found = exact.scores("reward", padded, attention)
        alone = [exact.hidden(row, everything_attended(row))[0, -1] for row in rows]
    expected = torch.stack([exact.heads["reward"].linear.weight[0] @ state for state in alone])
    assert len({round(score, 3) for score in expected.tolist()}) == 3
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_values_are_read_before_each_completion_token(exact):
    ids = tokens(2, 8)
    completion = completion_from(ids, 5)
    with torch.no_grad(), exact.use("reward"):
        found = exact.values("reward", ids, everything_attended(ids), completion)
        every = exact.hidden(ids, everything_attended(ids)) @ exact.heads["reward"].linear.weight[0]
    assert_close(found[:, 5:], every[:, 4:7], atol=1e-5, rtol=1e-5)
    assert not found[:, :5].any()


# Generation (trap 20)


def test_the_cache_is_on_in_generation_after_checkpointing(two):
    """One token per forward after the prompt; without the cache every step would read the whole text again."""
    two.train_only("policy")
    two.enable_gradient_checkpointing()
    read = []
    two.model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    ids = tokens()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with two.use("policy", train=True):
        logps(two, ids).sum().backward()
        read.clear()
        with two.use("policy") as model:
            model.generate(ids, **settings)
        assert read == [8, 1, 1, 1, 1]
        read.clear()
        with two.mixed(["policy", "reward"]) as model:
            model.generate(ids, **settings)
        assert read == [8, 1, 1, 1, 1]


@pytest.mark.filterwarnings("error:Adapter")
def test_a_dropped_role_leaves_no_weights_and_the_others_as_they_were(backbone):
    for seed, role in enumerate(("policy", "other", "reward")):
        backbone.add_role(role, LORA, head=role == "reward")
        fill(backbone, role, seed)
    with backbone.use("other"):
        expected = logits(backbone, tokens())
    bare = logits(backbone, tokens())
    weights, size = bits(backbone.parameters("other")), len(list(backbone.model.parameters()))
    backbone.train_only("policy", "other")
    with backbone.use("other"):
        backbone.drop_role("policy")
        backbone.drop_role("reward")
        assert torch.equal(logits(backbone, tokens()), expected)
        with pytest.raises(UserError, match="'other' is on"):
            backbone.drop_role("other")
    assert (backbone.roles, len(backbone.heads)) == (["other"], 0)
    assert same_bits(weights, backbone.parameters("other"))
    assert size - len(list(backbone.model.parameters())) == 2 * len(weights)
    assert torch.equal(logits(backbone, tokens()), bare)
    assert [p.requires_grad for p in backbone.parameters("other")] == [True] * len(weights)


@pytest.mark.filterwarnings("error:Adapter")
def test_the_last_role_can_leave_and_another_come(backbone):
    bare = logits(backbone, tokens())
    backbone.add_role("policy", LORA)
    fill(backbone, "policy", 0)
    with backbone.use("policy"):
        expected = logits(backbone, tokens())
    weights = bits(backbone.parameters("policy"))
    backbone.drop_role("policy")
    assert (backbone.roles, backbone.active) == ([], None)
    assert torch.equal(logits(backbone, tokens()), bare)
    with backbone.mixed([None, None]):
        assert torch.equal(logits(backbone, tokens()), bare)
    backbone.add_role("again", LORA)
    for ours, saved in zip(backbone.parameters("again"), weights, strict=True):
        ours.data.copy_(saved)
    with backbone.mixed([None, "again"]):
        assert_close(logits(backbone, tokens()), torch.stack([bare[0], expected[1]]), rtol=0, atol=0)


def test_the_reference_is_not_dropped(backbone):
    backbone.add_role("start", LORA)
    backbone.reference_role = "start"
    with pytest.raises(UserError, match="is the reference"):
        backbone.drop_role("start")
    with pytest.raises(UserError, match="no role 'policy'"):
        backbone.drop_role("policy")


def test_switching_is_pefts_set_adapter_without_its_side_effects(backbone):
    """The same flags on every layer and on PEFT's own models; what learns stays as it is."""
    for role in ("policy", "value"):
        backbone.add_role(role, Lora(r=4))
    backbone.train_only("policy")
    layers = [module for module in backbone.model.modules() if isinstance(module, LoraLayer)]
    assert layers

    def flags():
        return [(layer.active_adapters, layer.disable_adapters, layer.merged) for layer in layers]

    for role in ("value", "policy", "value"):
        with backbone.use(role):
            ours, named = flags(), (backbone.peft.active_adapter, backbone.peft.base_model.active_adapter)
            learning = [p.requires_grad for p in backbone.model.parameters()]
            backbone.peft.set_adapter(role)
            assert ours == flags()
            assert named == (role, role)
            backbone.train_only("policy")
            assert learning == [p.requires_grad for p in backbone.model.parameters()]
    with backbone.use(None):
        assert all(layer.disable_adapters for layer in layers)
