"""Reward sources: what a function is given, what it may return, how sources add up, what cannot be loaded."""

import re
import sys
import traceback
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.base import four_bit_weights
from lowrank_rlhf.backbone.store import HEAD, WEIGHTS
from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.config import Base, Data, Lora, PPORecipe, RewardSource
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards import (
    AdapterReward,
    Scored,
    Weighted,
    WeightedSum,
    load_members,
    load_rewards,
    member_names,
    members_line,
    reward_function,
)
from lowrank_rlhf.runs import Run

DATA = Data(train="unused")
RENDERER = Renderer(tiny_tokenizer(), DATA)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "2+2?"}]
EXAMPLES = [
    Example("row 1", TALK, columns={"answer": "4", "level": 1}),
    Example("row 2", [{"role": "user", "content": "é?"}], columns={"answer": "e", "level": None}),
]

KNOWN = "exact_match, exact_number, pattern, math_verify, reasoning_gym"


def sequences(*answers):
    """Whole completions, ended by the end-of-turn token, except the last, which a limit cut."""
    pairs = zip(EXAMPLES, answers, strict=True)
    whole = [RENDERER.sequence(e.prompt, [{"role": "assistant", "content": answer}]) for e, answer in pairs]
    return [*whole[:-1], Sequence(whole[-1].prompt_ids, whole[-1].completion_ids[:-1], cut=True)]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a Python module into the working directory; its functions become importable rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source, name="my_rewards"):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    sys.modules.pop("my_rewards", None)


def call(module, body):
    """The result of a reward function with this body."""
    module(f"def fn(prompts, completions, **columns):\n    {body}\n")
    return reward_function("my_rewards:fn", RENDERER)(EXAMPLES, sequences("It is 4.", "Oui ça"))


# Functions


def test_a_function_gets_plain_texts_and_the_other_columns(module):
    """The last turn of each prompt, completions without their end-of-turn token, one list per column."""
    module("seen = {}\ndef fn(prompts, completions, **columns):\n    seen.update(locals())\n    return [1, 0.5]\n")
    reward = reward_function("my_rewards:fn", RENDERER)
    assert reward(EXAMPLES, sequences("It is 4.", "Oui ça")).scores == [1.0, 0.5]
    assert sys.modules["my_rewards"].seen == {
        "prompts": ["2+2?", "é?"],
        "completions": ["It is 4.", "Oui ça"],
        "columns": {"answer": ["4", "e"], "level": [1, None]},
    }


def test_scores_keep_their_order_and_become_floats(module):
    scores = call(module, "return [len(completion) for completion in completions]").scores
    assert scores == [8.0, 6.0]
    assert {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[1.0]", "must return a list of 2 numbers, got [1.0]"),
        ("[1.0, 2.0, 3.0]", "must return a list of 2 numbers, got [1.0, 2.0, 3.0]"),
        ("[]", "must return a list of 2 numbers, got []"),
        ("None", "must return a list of 2 numbers, got None"),
        ("(1.0, 2.0)", "must return a list of 2 numbers, got (1.0, 2.0)"),
        ("1.0", "must return a list of 2 numbers, got 1.0"),
        ("'ab'", "must return a list of 2 numbers, got 'ab'"),
        ("[1.0, float('nan')]", "returned nan for completion 2: not a finite number"),
        ("[float('-inf'), 1.0]", "returned -inf for completion 1: not a finite number"),
        ("[1.0, True]", "returned True for completion 2: not a finite number"),
        ("['0.5', 1.0]", "returned '0.5' for completion 1: not a finite number"),
        ("[1.0, None]", "returned None for completion 2: not a finite number"),
        ("[[1.0], 1.0]", "returned [1.0] for completion 1: not a finite number"),
        ("[0, 10**400]", f"returned 1{'0' * 79} for completion 2: not a finite number"),
    ],
)
def test_a_wrong_return_names_the_function_and_the_completion(returned, words, module):
    with pytest.raises(UserError) as caught:
        call(module, f"return {returned}")
    assert str(caught.value) == f"reward: my_rewards:fn {words}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_rewards", f"or a verifier ({KNOWN})"),
        ("my_rewards:", "write it module:function"),
        (
            "my_rewards.fn",
            f"or a verifier ({KNOWN}); did you mean my_rewards:fn?",
        ),
        (
            "exact_numbers",
            f"or a verifier ({KNOWN}); did you mean exact_number?",
        ),
        (
            "patern",
            f"or a verifier ({KNOWN}); did you mean pattern?",
        ),
        ("", f"or a verifier ({KNOWN})"),
        ("missing_module:fn", "cannot be imported: No module named 'missing_module'"),
        ("my_rewards:gn", "cannot be imported: module 'my_rewards' has no attribute 'gn'"),
        ("my_rewards:number", "is not a function"),
    ],
)
def test_a_name_that_is_not_a_function_is_told(name, words, module):
    module("number = 5\ndef fn(prompts, completions):\n    return []\n")
    with pytest.raises(UserError, match=r"^reward: " + re.escape(f"'{name}'")) as caught:
        reward_function(name, RENDERER)
    assert str(caught.value).endswith(words)


# Columns


def test_a_verifier_is_a_reward_by_its_name_alone():
    reward = reward_function("exact_number", RENDERER)
    examples = [Example("row 1", TALK, columns={"answer": "4"}), Example("row 2", TALK, columns={"answer": 5.0})]
    assert reward(examples, sequences("It is 4.", "4")).scores == [1.0, 0.0]


@pytest.mark.parametrize("call", ["check", "__call__"])
def test_a_column_that_the_data_lacks_is_told_with_those_it_has(call, module):
    module("def fn(prompts, completions, *, gold, **columns):\n    return [0.0] * len(prompts)\n")
    for name, column in (("my_rewards:fn", "gold"), ("pattern", "pattern")):
        arguments = [EXAMPLES] if call == "check" else [EXAMPLES, sequences("a", "b")]
        with pytest.raises(UserError) as caught:
            getattr(reward_function(name, RENDERER), call)(*arguments)
        assert str(caught.value).startswith(f"reward: {name}: missing a required ")
        assert str(caught.value).endswith(f"argument: '{column}'; columns of the prompts: answer, level")


def test_a_function_that_takes_no_columns_is_told_which_there_are(module):
    module("def fn(prompts, completions):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(UserError, match=r"my_rewards:fn: got an unexpected keyword argument 'answer'; columns of the"):
        reward_function("my_rewards:fn", RENDERER).check(EXAMPLES)
    reward_function("my_rewards:fn", RENDERER).check([Example("row 1", TALK)])


def test_a_verifier_reads_every_row_before_any_rollout():
    """And says which row it cannot read; a function of somebody's own is not called with made-up completions."""
    examples = [Example("f.jsonl, row 1", TALK, columns={"answer": "4"}), Example("f.jsonl, row 2", TALK)]
    reward_function("exact_number", RENDERER).check(examples[:1])
    with pytest.raises(UserError) as caught:
        reward_function("exact_number", RENDERER).check(examples)
    assert str(caught.value) == "f.jsonl, row 2: exact_number: the column 'answer' holds no number: None"


def test_a_recipe_whose_prompts_do_not_fit_its_reward_is_refused_when_it_is_loaded():
    with pytest.raises(UserError, match=r"^row 2: exact_number: the column 'answer' holds no number: 'e'"):
        load_rewards(recipe(reward="exact_number"), tiny_backbone(), RENDERER, EXAMPLES)
    load_rewards(recipe(reward="exact_number"), tiny_backbone(), RENDERER, EXAMPLES[:1])


# Sums and adapters


def source(scores, disagreement):
    return lambda examples, sequences: Scored(scores, disagreement)


def test_a_sum_weighs_each_source():
    """2·1 − ½·10 and 2·2 + ½·10; disagreements 2·1 + ½·4: doubt has no sign. Parts are unweighted."""
    terms = [
        Weighted("a", source([1.0, 2.0], [1.0, 0.0]), 2.0),
        Weighted("b", source([10.0, -10.0], [4.0, 0.0]), -0.5),
    ]
    total = WeightedSum(terms)(EXAMPLES, [])
    assert total == Scored([2.0 - 5.0, 4.0 + 5.0], [4.0, 0.0], {"a": [1.0, 2.0], "b": [10.0, -10.0]})
    with pytest.raises(ValueError, match="zip"):
        WeightedSum([*terms, Weighted("c", source([1.0], [0.0]))])(EXAMPLES, [])


def test_a_single_source_has_no_parts():
    assert WeightedSum([Weighted("a", source([1.0], [0.5]), 3.0)])(EXAMPLES, []) == Scored([3.0], [1.5])


def test_sources_of_one_name_stay_apart_in_the_parts():
    terms = [Weighted("a", source([float(i)], [0.0])) for i in range(3)]
    assert WeightedSum(terms)(EXAMPLES, []).parts == {"a": [0.0], "a-2": [1.0], "a-3": [2.0]}


def recipe(**settings):
    return PPORecipe(base=Base(model="tiny", quantization="none", device="cpu"), data=DATA, **settings)


def tiny_backbone():
    return Backbone(Base(model="tiny", quantization="none", device="cpu"))


def trained_run(folder, slope, *, head=True):
    """A run that saved a reward role whose head is `slope` in every place."""
    backbone = tiny_backbone()
    backbone.add_role("reward", Lora(r=4), head=head)
    if head:
        torch.nn.init.constant_(backbone.heads["reward"].linear.weight, slope)
    Run(recipe(run_dir=str(folder))).save_role(backbone, "reward", {})
    return str(folder)


def test_adapters_and_a_function_add_up_with_their_weights(module, tmp_path):
    """Heads h and 3h on adapters that change nothing score s and 3s; 2·s − 1·3s + fn = fn − s."""
    module("def fn(prompts, completions):\n    return [100.0, 200.0]\n")
    runs = [RewardSource(trained_run(tmp_path / "a", 0.01), 2.0), RewardSource(trained_run(tmp_path / "b", 0.03), -1.0)]
    examples, completions = [Example("", e.prompt) for e in EXAMPLES], sequences("It is 4.", "Oui ça")
    backbone = tiny_backbone()
    total = load_rewards(recipe(reward_from=runs, reward="my_rewards:fn"), backbone, RENDERER)(examples, completions)
    assert backbone.roles == ["reward", "reward-2"]
    one = AdapterReward(backbone, ["reward"], RewardSource("unused"), 1)(examples, completions).scores
    assert min(map(abs, one)) > 1e-3
    assert total.scores == pytest.approx([100.0 - one[0], 200.0 - one[1]], abs=1e-5)
    assert {name: pytest.approx(part, abs=1e-5) for name, part in total.parts.items()} == {
        "a": one,
        "b": [3 * score for score in one],
        "fn": [100.0, 200.0],
    }


# What an ensemble costs


def ensemble(quantization, members):
    """A backbone with the members of an ensemble, and their reward in micro-batches of two."""
    backbone = Backbone(Base(model="tiny", quantization=quantization, device="cpu"))
    roles = member_names("reward", members)
    for role in roles:
        backbone.add_role(role, Lora(r=4), head=True)
    return backbone, AdapterReward(backbone, roles, RewardSource("unused"), 2)


def resident(backbone):
    """Bytes of every tensor that the backbone holds, a shared storage once."""
    tensors = [*backbone.model.parameters(), *backbone.model.buffers(), *backbone.heads.parameters()]
    states = [p.quant_state for p in tensors if isinstance(p, bnb.nn.Params4bit)]
    tensors += [part for state in states for part in (state.absmax, state.code, state.state2.absmax)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_members_add_their_adapters_and_no_second_base(quantization):
    """14 projections of rank 4 and a head of 64, all fp32; three more members add exactly three times that."""
    (one, _), (four, _) = ensemble(quantization, 1), ensemble(quantization, 4)
    assert len({weight.data_ptr() for weight in four_bit_weights(four.model)}) == len(four_bit_weights(one.model))
    each = 4 * sum(parameter.numel() for parameter in four.parameters("reward_4"))
    assert each / 1e6 == four.megabytes("reward_4") == one.megabytes("reward") > 0
    assert resident(four) - resident(one) == 3 * each
    shown = f"{each / 1e6:.2f} MB of adapter and head each, {4 * each / 1e6:.2f} MB in all"
    assert members_line(four, member_names("reward", 4)) == f"4 members, {shown}"


def test_a_saved_member_is_as_large_as_it_is_said_to_be(tmp_path):
    run = trained_run(tmp_path / "run", 1.0)
    backbone = tiny_backbone()
    load_members(backbone, run, "reward", key="RUN")
    saved = [t for name in (WEIGHTS, HEAD) for t in load_file(Path(run, "adapters/reward", name)).values()]
    assert sum(tensor.nbytes for tensor in saved) / 1e6 == backbone.megabytes("reward")


def test_members_score_one_after_the_other_in_the_batches_of_one(monkeypatch):
    """So the activations of four members are those of one: one adapter is on at a time, in forwards of equal shape."""
    forwards = []
    real = Backbone.scores

    def counting(self, role, input_ids, attention_mask):
        forwards.append((role, self.active, tuple(input_ids.shape)))
        return real(self, role, input_ids, attention_mask)

    monkeypatch.setattr(Backbone, "scores", counting)
    texts = [text for answer in ("a", "It is 4.", "No " * 9) for text in sequences(answer, answer)]
    seen = {}
    for members in (1, 4):
        _, reward = ensemble("none", members)
        reward([Example("", TALK)] * len(texts), texts)
        seen[members], forwards = forwards, []
    shapes = [shape for _, _, shape in seen[1]]
    assert len(shapes) == 3
    assert {rows for rows, _ in shapes} == {2}
    assert len(set(shapes)) > 1
    assert seen[4] == [(role, role, shape) for role in member_names("reward", 4) for shape in shapes]


def test_a_recipe_without_any_reward_is_told_both_keys():
    with pytest.raises(UserError, match=r"^reward_from or reward: PPO needs a reward run, a module:function"):
        load_rewards(recipe(), tiny_backbone(), RENDERER)


def test_what_is_not_a_reward_run_is_named_by_its_key(tmp_path):
    good, headless = trained_run(tmp_path / "good", 1.0), trained_run(tmp_path / "headless", 0.0, head=False)
    empty = Run(recipe(run_dir=str(tmp_path / "empty")))
    empty.record(base=tiny_backbone().info.__dict__)
    for bad, words in (
        (str(tmp_path), "reward_from[1].run: {bad} is not a run directory"),
        (headless, "reward_from[1].run: {bad} has no head.safetensors; is it a reward run?"),
        (str(empty.dir), "{bad}/adapters/reward: no adapter here"),
    ):
        with pytest.raises(UserError) as caught:
            load_rewards(recipe(reward_from=[RewardSource(good), RewardSource(bad)]), tiny_backbone(), RENDERER)
        assert str(caught.value).startswith(words.format(bad=bad))


def test_an_error_inside_a_function_names_the_function(module):
    with pytest.raises((UserError, ZeroDivisionError)) as caught:
        call(module, "return [1 / 0]")
    assert "my_rewards:fn" in "".join(traceback.format_exception_only(caught.value))


@pytest.mark.parametrize("name", [":fn", ".my_rewards:fn"])
def test_a_name_without_an_absolute_module_is_told(name):
    with pytest.raises(UserError, match=r"^reward: "):
        reward_function(name, RENDERER)


def test_a_column_that_the_first_row_lacks_is_passed_too(module):
    module("def fn(prompts, completions, **columns):\n    return [float(a or 0) for a in columns['answer']]\n")
    reward = reward_function("my_rewards:fn", RENDERER)
    examples = [Example("row 1", TALK), Example("row 2", TALK, columns={"answer": "4"})]
    assert reward(examples, sequences("a", "b")).scores == [0.0, 4.0]
