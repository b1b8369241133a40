"""Which tokens SFT learns, stated token for token. The byte tokenizer of the tiny model: one token a letter."""

from itertools import groupby

import pytest
from transformers import AutoTokenizer

from lowrank_rlhf.backbone.embedded import embedded_model
from lowrank_rlhf.backbone.tiny import CHAT_TEMPLATE, tiny_tokenizer
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import Example, Renderer, load_demonstrations, tokenize_demonstrations
from lowrank_rlhf.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(template=CHAT_TEMPLATE):
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def renderer(template=CHAT_TEMPLATE, **data):
    return Renderer(tokenizer(template), Data(train="unused", **data))


def shown(render, prompt, answer):
    """The text, with what is learned in brackets."""
    row = render.demonstration(prompt, answer, "data.jsonl, row 1")
    assert len(row.input_ids) == len(row.completion_mask)
    parts = groupby(zip(row.input_ids, row.completion_mask, strict=True), key=lambda token: token[1])
    text = ""
    for learned, tokens in parts:
        said = render.text([i for i, _ in tokens])
        text += f"[{said}]" if learned else said
    return text.replace("<|im_start|>", "<").replace("<|im_end|>", ">")


TALK = [user("Hi"), bot("Hello"), user("Tea?")]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION], ids=["plain", "generation marks"])
@pytest.mark.parametrize(
    ("loss_on", "prompt", "answer", "expected"),
    [
        ("last", [user("Hi")], [bot("Hello")], "<user\nHi>\n<assistant\n[Hello>]"),
        ("all", [user("Hi")], [bot("Hello")], "<user\nHi>\n<assistant\n[Hello>]"),
        ("last", TALK, [bot("Yes")], "<user\nHi>\n<assistant\nHello>\n<user\nTea?>\n<assistant\n[Yes>]"),
        ("all", TALK, [bot("Yes")], "<user\nHi>\n<assistant\n[Hello>]\n<user\nTea?>\n<assistant\n[Yes>]"),
        # A system prompt is never learned
        ("all", [SYSTEM, user("Hi")], [bot("Yo")], "<system\nBe brief.>\n<user\nHi>\n<assistant\n[Yo>]"),
        # An answer of several turns, as HH-RLHF has them: the user's turn inside it is not learned
        ("last", TALK[:1], [*TALK[1:], bot("Yes")], "<user\nHi>\n<assistant\nHello>\n<user\nTea?>\n<assistant\n[Yes>]"),
        (
            "all",
            TALK[:1],
            [*TALK[1:], bot("Yes")],
            "<user\nHi>\n<assistant\n[Hello>]\n<user\nTea?>\n<assistant\n[Yes>]",
        ),
    ],
)
def test_learned_are_answers_with_their_end_of_turn_and_nothing_else(template, loss_on, prompt, answer, expected):
    """The newline behind an end of turn is the template's and is not learned; the text ends at the last end of turn."""
    assert shown(renderer(template, loss_on=loss_on), prompt, answer) == expected


def test_the_mask_is_the_one_of_templates_that_mark_generation():
    """transformers reads the marks; we read none and learn the same tokens."""
    made, turns = tokenizer(GENERATION), [*TALK, bot("Yes")]
    marked = made.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    row = renderer(GENERATION, loss_on="all").demonstration(TALK, turns[3:])
    assert [*row.input_ids, *made("\n")["input_ids"]] == marked["input_ids"]
    assert [*row.completion_mask, False] == list(map(bool, marked["assistant_masks"]))


def test_a_base_without_a_chat_template_learns_each_answer_and_its_eos():
    render = renderer(None, prompt_template="Q: {prompt}\nA: ", loss_on="all")
    expected = "<Q: Be brief.\n\nHi\nA: [Hello>]Q: Tea?\nA: [Yes>]"
    assert shown(render, [SYSTEM, *TALK], [bot("Yes")]) == expected
    last = renderer(None, prompt_template="Q: {prompt}\nA: ")
    assert shown(last, TALK, [bot("Yes")]) == "<Q: Hi\nA: Hello>Q: Tea?\nA: [Yes>]"
    assert last.sequence(TALK, [bot("Yes")]).ids == last.demonstration(TALK, [bot("Yes")]).input_ids


# Limits: the prompt keeps its end, the answer its beginning


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_prompt_tokens": 11}, "<assistant\n[Yes>]"),
        ({"max_prompt_tokens": 13}, ">\n<assistant\n[Yes>]"),
        ({"max_prompt_tokens": 26}, "[o>]\n<user\nTea?>\n<assistant\n[Yes>]"),
        ({"max_completion_tokens": 3}, "<user\nHi>\n<assistant\n[Hello>]\n<user\nTea?>\n<assistant\n[Yes]"),
        ({"max_prompt_tokens": 1, "max_completion_tokens": 1}, "\n[Y]"),
    ],
)
def test_a_truncated_prompt_keeps_its_end(limits, expected):
    """All turns are learned here; a turn that the cut goes through is learned from there on."""
    render = renderer(loss_on="all", **limits)
    assert shown(render, TALK, [bot("Yes")]) == expected
    assert render.demonstration(TALK, [bot("Yes")]).cut


def test_limits_that_fit_exactly_cut_nothing():
    whole = renderer().demonstration(TALK, [bot("Yes")])
    prompt, answer = whole.completion_mask.count(False), whole.completion_mask.count(True)
    exact = renderer(max_prompt_tokens=prompt, max_completion_tokens=answer).demonstration(TALK, [bot("Yes")])
    assert exact == whole
    assert not whole.cut


# What cannot be learned


@pytest.mark.parametrize(
    ("loss_on", "turns", "refused"),
    [
        ("last", [user("Hi"), bot("")], True),
        ("last", [user("Hi"), bot(" \n")], True),
        ("last", [user("Hi"), bot(""), user("Hm?"), bot("Yes")], False),
        ("all", [user("Hi"), bot(""), user("Hm?"), bot("Yes")], True),
        ("all", [user("Hi")], True),
    ],
)
def test_an_empty_turn_that_would_be_learned_is_refused(loss_on, turns, refused, tmp_path):
    import json

    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    data = Data(train=str(path), loss_on=loss_on, eval_fraction=0)
    if refused:
        with pytest.raises(UserError, match=r"row 1: a demonstration needs an answer that is not empty$"):
            load_demonstrations(data)
    else:
        assert len(load_demonstrations(data)[0]) == 1


FORGETFUL = (  # as templates do that drop the reasoning of earlier turns
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.last or m['role'] == 'user' "
    "else m['content'][:2]) + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_told_by_row_and_still_learns_the_last():
    words = r"^data.jsonl, row 1: the chat template renders the messages before number 4 differ.*data.loss_on: last$"
    with pytest.raises(UserError, match=words):
        shown(renderer(FORGETFUL, loss_on="all"), TALK, [bot("Yes")])
    assert shown(renderer(FORGETFUL), TALK, [bot("Yes")]).endswith("<assistant\nHe>\n<user\nTea?>\n<assistant\n[Yes>]")


def test_a_template_that_does_not_end_an_answer_is_told_by_row():
    unfinished = CHAT_TEMPLATE.replace("+ '<|im_end|>'", "+ ('' if message['content'] == 'Yes' else '<|im_end|>')")
    with pytest.raises(
        UserError, match=r"^data.jsonl, row 1: the chat template does not end this answer with <\|im_end"
    ):
        shown(renderer(unfinished), TALK, [bot("Yes")])


# Laws


def test_with_one_answer_the_demonstration_is_the_sequence_that_rewards_and_rollouts_read():
    made = AutoTokenizer.from_pretrained(embedded_model())
    for limits in ({}, {"max_prompt_tokens": 9}, {"max_completion_tokens": 2}):
        render = Renderer(made, Data(train="unused", **limits))
        for prompt in (TALK[:1], [SYSTEM, *TALK]):
            row, sequence = (f(prompt, [bot("Yes, é!")]) for f in (render.demonstration, render.sequence))
            assert row.input_ids == sequence.ids
            assert row.completion_mask == [False] * len(sequence.prompt_ids) + [True] * len(sequence.completion_ids)
            assert row.cut == sequence.cut


def test_all_turns_of_the_embedded_model_are_learned_with_their_ends():
    made = AutoTokenizer.from_pretrained(embedded_model())
    render = Renderer(made, Data(train="unused", loss_on="all"))
    assert shown(render, TALK, [bot("Yes")]).endswith(
        "<user\nHi>\n<assistant\n[Hello>]\n<user\nTea?>\n<assistant\n[Yes>]"
    )
    row = render.demonstration(TALK, [bot("Yes")])
    whole = made.apply_chat_template([*TALK, bot("Yes")], tokenize=False).removesuffix("\n")
    assert row.input_ids == made(whole, add_special_tokens=False)["input_ids"]


def test_the_data_set_on_disk_holds_the_same_rows():
    render = renderer(max_completion_tokens=4)
    examples = [Example(f"row {i}", TALK[:1], [bot("y" * i)]) for i in range(1, 1203)]
    dataset, sizes = tokenize_demonstrations(examples, render)
    assert len(dataset) == 1202
    for i in (0, 2, 999, 1000, 1201):
        row = render.demonstration(examples[i].prompt, examples[i].chosen)
        assert dataset[i] == {"input_ids": row.input_ids, "completion_mask": list(map(int, row.completion_mask))}
    assert (sizes.prompt[5], list(sizes.completion[:5]), sizes.cut) == (21, [2, 3, 4, 4, 4], 1199)
    assert len(tokenize_demonstrations([], render)[0]) == 0
