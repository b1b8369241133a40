"""Training, scoring and generation read the same tokens: whole texts end at the end-of-turn token, cuts are told."""

from contextlib import nullcontext
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.embedded import embedded_model
from lowrank_rlhf.backbone.tiny import CHAT_TEMPLATE, tiny_tokenizer
from lowrank_rlhf.config import Base, Data, Lora, Rollout
from lowrank_rlhf.data import Renderer, pad_batch
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.rollout import generate

SYSTEM = {"role": "system", "content": "Be terse."}
ASK = [{"role": "user", "content": "How are you, é?"}]
TALK = [SYSTEM, *ASK, {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "Tea?\n"}]
ANSWER = [{"role": "assistant", "content": "Yes, please: green."}]
TWO_TURNS = [*ANSWER, {"role": "user", "content": "Sugar?"}, {"role": "assistant", "content": "No."}]


@pytest.fixture(scope="module")
def tokenizers():
    """Byte tokens of the tiny model, and the embedded model's own; its first use on a machine fetches 93 MB."""
    return {"tiny": tiny_tokenizer(), "smollm2": AutoTokenizer.from_pretrained(embedded_model())}


@pytest.fixture(params=["tiny", "smollm2"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def renderer(tokenizer, **data):
    return Renderer(tokenizer, Data(train="unused", **data))


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# One text, the same tokens


@pytest.mark.parametrize("answer", [ANSWER, TWO_TURNS], ids=["one answer", "two turns"])
@pytest.mark.parametrize("prompt", [ASK, TALK], ids=["question", "dialogue"])
def test_prompt_and_completion_are_the_template_cut_at_the_end_of_turn(tokenizer, prompt, answer):
    sequence = renderer(tokenizer).sequence(prompt, answer)
    text = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
    assert text.endswith("<|im_end|>\n")
    assert sequence.ids == tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert sequence.prompt_ids == renderer(tokenizer).prompt(prompt)[0]
    assert not sequence.cut


def test_a_completion_ends_at_its_only_end_of_turn_token(tokenizer):
    render = renderer(tokenizer)
    completion = render.sequence(TALK, ANSWER).completion_ids
    assert render.end_of_turn == "<|im_end|>"
    assert completion[-1] == render.end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert completion.count(render.end_of_turn_id) == 1
    assert tokenizer.decode(completion[:-1]) == render.decode(completion) == "Yes, please: green."
    assert tokenizer.decode(render.sequence(TALK, ANSWER).prompt_ids).endswith("<|im_start|>assistant\n")


def rollout_of(tokens, prompt_ids, render):
    """What a rollout keeps when the model says `tokens` after the prompt, beside a prompt one token longer."""
    said = iter(torch.tensor(tokens))
    size = len(render.tokenizer)

    def say(input_ids, past_key_values=None, **inputs):
        states = torch.zeros(len(input_ids), 1, input_ids.shape[1], 2)
        past_key_values.update(states, states, 0)
        logits = torch.nn.functional.one_hot(next(said), size) * 1e4
        return SimpleNamespace(logits=logits.expand(len(input_ids), 1, -1))

    class Model(SimpleNamespace):
        __call__ = staticmethod(say)

    model = Model(forward=say, config=LlamaConfig(num_hidden_layers=1), device=torch.device("cpu"))
    pad = SimpleNamespace(pad_token_id=render.tokenizer.pad_token_id)
    modes = {"generating": lambda role: nullcontext(model)}
    backbone = SimpleNamespace(model=model, info=pad, most_rows=MostRows(), **modes)
    prompts = [prompt_ids, [*prompt_ids, 0]]
    return generate(backbone, None, prompts, Rollout(), max_new_tokens=len(tokens), stop_ids=render.stop_ids)[0]


def test_training_reads_exactly_what_a_rollout_of_the_same_answer_would_have_left(tokenizer):
    """The rollout is made to say the whole answer, the newline behind it, and padding; it keeps what training reads."""
    render = renderer(tokenizer)
    trained = render.sequence(TALK, ANSWER)
    text = tokenizer.apply_chat_template(TALK + ANSWER, tokenize=False)
    said = tokenizer(text, add_special_tokens=False)["input_ids"][len(trained.prompt_ids) :]
    assert said != trained.completion_ids
    rolled_out = rollout_of([*said, tokenizer.pad_token_id], trained.prompt_ids, render)
    assert rolled_out == trained
    cut = renderer(tokenizer, max_completion_tokens=3).sequence(TALK, ANSWER)  # what a rollout that never stops leaves
    assert rollout_of(cut.completion_ids, cut.prompt_ids, render) == cut
    assert cut.cut


# Limits


def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_answer(tokenizer):
    whole = renderer(tokenizer).sequence(TALK, ANSWER)
    for limit in (1, 4, len(whole.prompt_ids) - 1, len(whole.prompt_ids), 999):
        render = renderer(tokenizer, max_prompt_tokens=limit)
        was_cut = limit < len(whole.prompt_ids)
        assert render.prompt(TALK) == (whole.prompt_ids[-limit:], was_cut)
        sequence = render.sequence(TALK, ANSWER)
        assert sequence.ids == whole.prompt_ids[-limit:] + whole.completion_ids
        assert sequence.cut == was_cut


def test_a_cut_answer_has_no_end_of_turn_and_says_so(tokenizer):
    whole = renderer(tokenizer).sequence(ASK, ANSWER)
    length = len(whole.completion_ids)
    for limit in (1, length - 1, length, length + 1):
        render = renderer(tokenizer, max_completion_tokens=limit)
        sequence = render.sequence(ASK, ANSWER)
        assert sequence.completion_ids == whole.completion_ids[:limit]
        assert sequence.cut == (limit < length) == (render.end_of_turn_id not in sequence.completion_ids)


# Special tokens


def test_the_first_token_is_not_doubled():
    """A tokenizer that puts a BOS in front by itself, and a template that writes one too, as Llama's do."""
    tokenizer = with_template("{{ bos_token }}" + CHAT_TEMPLATE)
    plain = renderer(tokenizer).sequence(ASK, ANSWER)
    assert [token == 256 for token in plain.ids[:3]] == [True, True, False]  # the template's BOS, then its first turn
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)]
    )
    assert tokenizer("a")["input_ids"][0] == 256
    assert renderer(tokenizer).sequence(ASK, ANSWER) == plain


def test_masks_count_end_of_turn_and_pad_tokens_that_belong_to_the_text(tokenizer):
    """Pad is the end-of-turn token in both tokenizers, so a mask by token id would lose every turn's end."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sequences = [renderer(tokenizer).sequence(p, a) for p, a in ((TALK, ANSWER), (ASK, TWO_TURNS), (ASK, ANSWER))]
    batch = pad_batch(sequences, tokenizer.pad_token_id)
    for ids, attended, completed, sequence in zip(*vars(batch).values(), sequences, strict=True):
        assert (ids[attended].tolist(), ids[completed].tolist()) == (sequence.ids, sequence.completion_ids)


# Templates


def test_a_base_without_a_chat_template_uses_the_recipes():
    """ChatML's markers are the tiny tokenizer's BOS and EOS: ids 256 and 257."""
    tokenizer = with_template(None)
    sequence = renderer(tokenizer).sequence([SYSTEM, {"role": "user", "content": "Use {prompt}!"}], ANSWER)
    assert tokenizer.decode(sequence.prompt_ids[1:]) == "Instruction: Be terse.\n\nUse {prompt}!\nResponse: "
    assert tokenizer.decode(sequence.completion_ids[:-1]) == "Yes, please: green."
    assert (sequence.prompt_ids[0], sequence.completion_ids[-1]) == (256, 257)
    other = renderer(tokenizer, prompt_template="Q: {prompt}\nA:").prompt(ASK)[0]
    assert tokenizer.decode(other[1:]) == "Q: How are you, é?\nA:"


def test_a_prompt_template_without_a_place_for_the_prompt_is_refused_where_it_is_used():
    with pytest.raises(UserError, match=r"^data\.prompt_template: must contain \{prompt\}"):
        renderer(with_template(None), prompt_template="Answer: ")
    renderer(tiny_tokenizer(), prompt_template="Answer: ")  # this base has a chat template: not used


DATED = """{% if strftime_now is defined %}
    {% set today = strftime_now("%d %b %Y") %}
{% else %}
    {% set today = "never" %}
{% endif %}
{% macro month() %}{{ strftime_now("%B, %Y-%m-%d") }}{% endmacro %}
<|im_start|>system
Today: {{ today }}, {{ month() }}<|im_end|>
"""


def test_a_template_that_writes_the_date_writes_the_same_one_on_every_day(monkeypatch):
    """As SmolLM3's and Llama 3.2's do; a text has the same tokens whenever it is read, and all else is as it was."""
    dated, texts = with_template("\n  " + DATED + CHAT_TEMPLATE), []
    for day in (1, 2):
        clock = SimpleNamespace(now=lambda day=day: datetime(2031, 5, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        theirs = dated.apply_chat_template(TALK + ANSWER, tokenize=False)
        assert f"Today: 0{day} May 2031, May, 2031-05-0{day}<" in theirs
        render = renderer(dated)
        texts.append(render.text(render.sequence(TALK, ANSWER).ids) + "\n")
        assert render.prompt(TALK)[0] == render.sequence(TALK, ANSWER).prompt_ids
        ours = theirs.replace(f"0{day} May 2031, May, 2031-05-0{day}", "26 Jul 2024, July, 2024-07-26")
        assert texts[-1] == ours != theirs
    assert texts[0] == texts[1]
    assert (render.template_date, renderer(with_template(CHAT_TEMPLATE)).template_date) == ("2024-07-26", None)


def test_a_template_that_changes_the_prompt_once_it_is_answered_is_refused_with_the_row():
    answered = "{% if messages[-1]['role'] == 'assistant' %}Answered. {% endif %}"
    render = renderer(with_template(answered + CHAT_TEMPLATE))
    with pytest.raises(UserError, match=r"^data\.jsonl, row 3: the chat template renders the prompt differently"):
        render.sequence(ASK, ANSWER, "data.jsonl, row 3")


def test_what_a_template_refuses_names_the_row_and_its_reason():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    render = renderer(with_template(strict + CHAT_TEMPLATE))
    words = r"^data\.jsonl, row 5: the chat template refuses this dialogue: no system role$"
    for action in (
        lambda: render.prompt(TALK, "data.jsonl, row 5"),
        lambda: render.sequence(TALK, ANSWER, "data.jsonl, row 5"),
    ):
        with pytest.raises(UserError, match=words):
            action()
    render.sequence(ASK, ANSWER)


@pytest.mark.parametrize("behind", ["", "\n", " END<|im_end|>"])
def test_a_template_that_does_not_end_a_turn_with_a_special_token_is_refused(behind):
    loop = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}" + behind + "{% endfor %}"
    with pytest.raises(UserError, match=r"^base\.model: the chat template does not end an assistant turn"):
        renderer(with_template(loop))


def test_a_turn_may_end_with_another_token_than_eos():
    """As in models whose eos is `<|endoftext|>`: a rollout stops at either, a training text ends with the turn's."""
    tokenizer = with_template(CHAT_TEMPLATE.replace("<|im_end|>", "<|turn|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    render = renderer(tokenizer)
    assert (render.end_of_turn, render.stop_ids) == ("<|turn|>", [257, 258])
    assert render.sequence(ASK, ANSWER).completion_ids[-1] == 258


# Where the score is read


@pytest.fixture(scope="module")
def scorer():
    """The tiny base in float32 with a head that is not zero."""
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"))
    backbone.add_role("reward", Lora(r=4), head=True)
    with torch.no_grad():
        backbone.heads["reward"].linear.weight.copy_(torch.linspace(-0.1, 0.1, 64))
    return backbone


@torch.no_grad()
def score(backbone, ids, mask):
    with backbone.use("reward"):
        return backbone.scores("reward", torch.tensor([ids]), torch.tensor([mask], dtype=torch.bool)).item()


@torch.no_grad()
@pytest.mark.parametrize("ending", [[257], [257, 257], [65]], ids=["pad token", "two pad tokens", "letter"])
def test_the_score_is_read_at_the_last_attended_token(scorer, ending):
    """Pooling by token id would read a text that ends in the pad token one or two tokens early."""
    ids = [72, 105, 33, *ending]
    with scorer.use("reward"):
        hidden = scorer.hidden(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        by_hand = scorer.heads["reward"](hidden)[0]
    ones = [1] * len(ids)
    assert (by_hand[:-1] - by_hand[-1]).abs().min() > 1e-3  # another column would be another score
    expected = pytest.approx(by_hand[-1].item(), rel=1e-5)
    assert score(scorer, ids, ones) == expected
    assert score(scorer, ids + [257] * 3, ones + [0] * 3) == expected
    assert score(scorer, [257] * 3 + ids, [0] * 3 + ones) == expected
    assert score(scorer, [257, *ids, 257], [0, *ones, 0]) == expected
