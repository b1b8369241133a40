"""Speakers side by side in one batch say what each would say alone, and nothing stays behind whatever ends them."""

import gc
import shutil
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from chat_runs import TINY, edit, fill, write_run
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.chat import adapters as adapters_module
from lowrank_rlhf.arena.chat import decoding as decoding_module
from lowrank_rlhf.arena.chat import engine as engine_module
from lowrank_rlhf.arena.chat.catalog import DEFAULT_TEMPLATE, find
from lowrank_rlhf.arena.chat.decoding import Batch, Row
from lowrank_rlhf.arena.chat.engine import Engine, Progress, Request
from lowrank_rlhf.arena.options import Options
from lowrank_rlhf.arena.votes.records import Decoding
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.embedded import sha256_of
from lowrank_rlhf.backbone.store import save_role
from lowrank_rlhf.config import Lora, Rollout
from lowrank_rlhf.data.batches import pad_left
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rollout import generate

HI = [{"role": "user", "content": "Hi, who are you?"}]
GREEDY = Decoding(temperature=0, max_new_tokens=12)
SAMPLED = Decoding(temperature=1.0, top_p=1.0, max_new_tokens=12, seed=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "sft", seed=1)
    write_run(folder / "dpo", "dpo", seed=2, steps=(5,))
    write_run(folder / "ppo", "ppo", seed=3, head=True, steps=(7,))  # its policy shares its trunk with its value
    write_run(folder / "reward", "reward", roles=("reward", "reward_2"), seed=4)
    return folder


@pytest.fixture
def engine(runs):
    return Engine(find(runs), device="cpu")


def ask(engine, *speakers, decoding=SAMPLED, messages=HI, **options):
    return list(engine.stream([Request(name, messages, decoding) for name in speakers], **options))


def texts(engine, *speakers, **options):
    return [answer.text for answer in ask(engine, *speakers, **options)[-1]]


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def assert_nothing_is_left(engine):
    assert engine.waiting == 0
    assert engine.backbone.active is None
    assert hooks(engine.backbone.model) == 0
    assert not engine.backbone.model.training


# One batch


def test_a_row_of_a_mixed_batch_says_what_its_adapter_alone_says_at_the_same_padding():
    backbone = Backbone(TINY)
    for seed, role in enumerate(("one", "two"), start=1):
        backbone.add_role(role, Lora(r=4))
        fill(backbone, role, seed)
    prompts = [[5, 6, 7], list(range(20)), [9] * 11]
    roles = ["one", None, "two"]
    alone = []
    for role in roles:  # greedy, the whole batch through one adapter
        answers = generate(backbone, role, prompts, Rollout(batch_size=3), max_new_tokens=9, stop_ids=[], greedy=True)
        alone.append([answer.completion_ids for answer in answers])
    rows = [
        Row(role, ids, Decoding(temperature=0, max_new_tokens=9), []) for role, ids in zip(roles, prompts, strict=True)
    ]
    batch = Batch(backbone, rows)
    while batch.rows:
        batch.step()
    batch.close()
    assert [row.completion for row in rows] == [alone[i][i] for i in range(3)]
    assert len({tuple(a[0]) for a in alone}) == 3  # the adapters do say different things


def test_mixed_logits_equal_separate_ones_at_the_same_padded_shape(monkeypatch):
    backbone = Backbone(TINY)
    backbone.add_role("one", Lora(r=4))
    fill(backbone, "one", 1)
    seen, take = [], Row.take
    monkeypatch.setattr(Row, "take", lambda row, logits: seen.append(logits.clone()) or take(row, logits))
    prompts, roles = [[5, 6, 7], list(range(20))], ["one", None]
    batch = Batch(backbone, [Row(role, ids, GREEDY, []) for role, ids in zip(roles, prompts, strict=True)])
    batch.step()
    batch.close()
    ids, mask = pad_left(prompts, backbone.info.pad_token_id)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for row, role in enumerate(roles):
        with torch.no_grad(), backbone.use(role) as model:
            output = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        assert_close(seen[row], output.logits[row, -1].float(), rtol=0, atol=1e-6)


def test_long_prompts_are_read_in_pieces_between_which_a_stop_is_heard(engine, monkeypatch):
    prompts = [HI, [{"role": "user", "content": "a long one " * 40}]]
    requests = [Request("sft", prompts[0], GREEDY), Request("dpo", prompts[1], GREEDY)]
    whole = list(engine.stream(requests))
    monkeypatch.setattr(decoding_module, "PREFILL_COLUMNS", 64)  # of the short one the first are padding
    pieces = list(engine.stream(requests))
    assert [a.text for a in pieces[-1]] == [a.text for a in whole[-1]]
    assert len(pieces) == 12
    asked = iter(range(100))
    stopped = list(engine.stream(requests, lambda: next(asked) == 2))
    assert [[(a.tokens, a.stopped, a.text) for a in answers] for answers in stopped] == [[(0, True, "")] * 2]
    assert_nothing_is_left(engine)


def test_one_list_per_token_all_growing_together(engine):
    requests = [
        Request("sft", HI, Decoding(temperature=0, max_new_tokens=4)),
        Request("base", HI, Decoding(temperature=0, max_new_tokens=9)),
        Request("dpo", HI, Decoding(temperature=0, max_new_tokens=1)),
    ]
    lists = list(engine.stream(requests))
    assert len(lists) == 9
    for step, answers in enumerate(lists, start=1):
        assert [a.tokens for a in answers] == [min(step, 4), step, 1]
        assert [a.done for a in answers] == [step >= 4, step == 9, True]
    last = lists[-1]
    assert lists[4][0] == last[0]  # what is done is not touched again
    assert not any(answer.ended or answer.stopped for answer in last)
    assert last[0].milliseconds <= last[1].milliseconds
    assert 0 < last[1].first_token_milliseconds <= last[1].milliseconds
    assert [lists[-1][1].text.startswith(a[1].text) for a in lists] == [True] * 9
    assert_nothing_is_left(engine)


def test_an_answer_ends_at_its_end_of_turn_and_the_others_go_on(engine, monkeypatch):
    take, end = Row.take, engine.backbone.info.eos_token_id

    def ends_third(row, logits):
        if row.role is not None and len(row.completion) == 2:
            logits = torch.full_like(logits, -1e9)
            logits[end] = 0
        return take(row, logits)

    engine.load()
    monkeypatch.setattr(Row, "take", ends_third)
    last = ask(engine, "sft", "base", decoding=GREEDY)[-1]
    assert (last[0].tokens, last[0].ended, last[0].done) == (3, True, True)
    assert (last[1].tokens, last[1].ended) == (12, False)
    assert "<|im_end|>" not in last[0].text


def test_a_seed_draws_the_same_again_and_another_draws_otherwise(engine):
    first = texts(engine, "sft", "dpo")
    assert texts(engine, "sft", "dpo") == first
    assert texts(engine, "sft", "dpo", decoding=Decoding(1.0, 1.0, 12, seed=2)) != first


def test_what_a_row_draws_does_not_depend_on_its_neighbours_settings(engine):
    mine = Request("sft", HI, SAMPLED)
    others = [Decoding(0, 1.0, 12, 5), Decoding(0.7, 0.5, 3, 9), Decoding(2.0, 1.0, 40, 0), SAMPLED]
    said = {list(engine.stream([mine, Request("dpo", HI, other)]))[-1][0].text for other in others}
    assert len(said) == 1


def test_temperature_and_top_p_of_a_row():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))

    def share(decoding, draws=2000):
        row = Row(None, [1], decoding, [])
        for _ in range(draws):
            row.take(logits)
        return torch.bincount(torch.tensor(row.completion), minlength=4) / draws

    # Standard error of a share of 2,000 draws is at most 0.011
    assert_close(share(Decoding(1.0, 1.0)), torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.04)
    assert_close(share(Decoding(1.0, 0.75)), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.04)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert_close(share(Decoding(0.5, 1.0)), squared / squared.sum(), rtol=0, atol=0.04)
    assert share(Decoding(0, 1.0), 10)[0] == 1


def test_a_system_prompt_is_the_rows_own(engine):
    plain, told = Decoding(0, max_new_tokens=12), Decoding(0, max_new_tokens=12, system="Answer in capitals.")
    beside = list(engine.stream([Request("sft", HI, plain), Request("sft", HI, told)]))[-1]
    written = [{"role": "system", "content": "Answer in capitals."}, *HI]
    by_hand = list(engine.stream([Request("sft", HI, plain), Request("sft", written, plain)]))[-1]
    assert [a.text for a in beside] == [a.text for a in by_hand]
    assert beside[0].text != beside[1].text
    with pytest.raises(UserError, match="two system prompts"):
        list(engine.stream([Request("sft", written, told)]))


def test_characters_of_several_bytes_appear_whole(engine, monkeypatch):
    said = engine.backbone.tokenizer("aé€😀b", add_special_tokens=False)["input_ids"]
    assert len(said) == 1 + 2 + 3 + 4 + 1

    def recite(row, logits):
        row.completion.append(said[len(row.completion)])
        return row.completion[-1]

    monkeypatch.setattr(Row, "take", recite)
    shown = [answers[0].text for answers in ask(engine, "base", decoding=Decoding(max_new_tokens=len(said)))]
    assert shown == ["a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€", "aé€", "aé€😀", "aé€😀b"]
    cut = [answers[0].text for answers in ask(engine, "base", decoding=Decoding(max_new_tokens=5))]
    assert cut[-1] == "aé"  # half a character that the limit cut is none


def test_tokens_per_second_is_of_writing():
    assert Progress("x", tokens=11, milliseconds=3000, first_token_milliseconds=1000).tokens_per_second == 5
    assert Progress("x", tokens=1, milliseconds=10, first_token_milliseconds=10).tokens_per_second == 0


# Ends


def test_a_stop_keeps_what_was_written_and_leaves_nothing_behind(engine):
    asked = iter(range(100))
    lists = ask(engine, "sft", "base", decoding=GREEDY, stop=lambda: next(asked) == 3)
    assert len(lists) == 4  # three tokens, then the last word
    assert [(a.tokens, a.done, a.stopped, a.ended) for a in lists[-1]] == [(3, True, True, False)] * 2
    assert lists[-1][0].text == lists[-2][0].text
    assert_nothing_is_left(engine)
    whole = texts(engine, "sft", "base", decoding=GREEDY)
    assert whole == texts(Engine(engine.catalog, device="cpu"), "sft", "base", decoding=GREEDY)


def test_an_iterator_closed_early_leaves_nothing_behind(engine):
    answers = engine.stream([Request("sft", HI, GREEDY), Request("dpo", HI, GREEDY)])
    next(answers)
    assert engine.waiting == 1
    answers.close()
    assert_nothing_is_left(engine)


def test_an_iterator_that_is_dropped_in_another_thread_leaves_nothing_behind(engine):
    held = [engine.stream([Request("sft", HI, GREEDY)])]
    next(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert_nothing_is_left(engine)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu"])
def test_out_of_memory_in_mid_generation_is_told_and_the_next_equals_a_fresh_engines(engine, monkeypatch, error):
    ask(engine, "ppo", "base")  # something was loaded before
    layer, calls = engine.backbone.model.model.layers[1], iter(range(100))
    forward = layer.forward

    def fails(*args, **kwargs):
        if next(calls) == 4:
            raise error
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", fails)
        lists = engine.stream([Request("sft", HI, SAMPLED), Request("dpo", HI, SAMPLED)])
        for _ in range(4):
            next(lists)
        with pytest.raises(UserError, match=r"memory of this machine is used up.*fewer columns"):
            next(lists)
    assert_nothing_is_left(engine)
    fresh = Engine(engine.catalog, device="cpu")
    assert texts(engine, "sft", "dpo") == texts(fresh, "sft", "dpo")


def test_the_cache_of_what_ran_out_of_memory_is_freed(engine, monkeypatch):
    engine.load()
    made = []
    init = Batch.__init__

    def remember(batch, *args):
        init(batch, *args)
        made.append(torch.zeros(10))
        batch.weight = made[-1]

    monkeypatch.setattr(Batch, "__init__", remember)
    monkeypatch.setattr(Row, "take", lambda row, logits: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="memory"):
        ask(engine, "base")
    kept = weakref.ref(made.pop())
    gc.collect()
    assert kept() is None


def test_another_error_in_a_step_keeps_its_traceback_and_leaves_nothing_behind(engine, monkeypatch):
    engine.load()
    with monkeypatch.context() as patch:
        patch.setattr(Row, "take", lambda row, logits: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(engine, "sft", "base")
    assert_nothing_is_left(engine)
    assert texts(engine, "sft") == texts(Engine(engine.catalog, device="cpu"), "sft")


# Refusals


@pytest.mark.parametrize(
    ("messages", "decoding", "match"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([{"role": "user", "content": " \n"}], GREEDY, "the prompt is empty"),
        ([*HI, {"role": "assistant", "content": "I am"}], GREEDY, "the prompt is empty"),
        ([{"role": "user", "content": "half \ud83d"}], GREEDY, "half of a character"),
        (HI, Decoding(temperature=-1), "temperature: must be"),
        (HI, Decoding(temperature=float("nan")), "temperature: must be"),
        (HI, Decoding(temperature=float("inf")), "temperature: must be"),
        (HI, Decoding(top_p=0), "top_p: must be"),
        (HI, Decoding(max_new_tokens=0), "max tokens: must be"),
        (HI, Decoding(max_new_tokens=2048), "leaves no room for a prompt, this base attends to 2048"),
        (HI, Decoding(seed=-1), "seed: must be"),
        (HI, Decoding(seed=2**64), "seed: must be"),
    ],
)
def test_what_cannot_be_asked_is_told(engine, messages, decoding, match):
    with pytest.raises(UserError, match=match):
        ask(engine, "base", messages=messages, decoding=decoding)
    assert_nothing_is_left(engine)


def test_nobody_and_somebody_unknown(engine):
    with pytest.raises(UserError, match="choose a model"):
        list(engine.stream([]))
    with pytest.raises(UserError, match=r"no model '../../etc' here; there are: base, .*sft.*Refresh"):
        ask(engine, "../../etc")
    assert not engine.loaded


def test_a_model_whose_run_is_broken_is_told_with_the_reason(tmp_path):
    write_run(tmp_path / "cut")
    (tmp_path / "cut/run.json").write_text("{")
    with pytest.raises(UserError, match=r"no model 'cut' here: .*cut run.json cannot be read"):
        ask(Engine(find(tmp_path), device="cpu"), "cut")


def test_the_prompt_and_its_answer_fill_the_context_to_the_last_token(engine):
    frame = len(engine.backbone.tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True))
    markers = frame - len(HI[0]["content"])
    ids = engine.backbone.tokenizer.apply_chat_template(HI, add_generation_prompt=True)["input_ids"]
    rest = len(ids) - len(HI[0]["content"])  # the template's own tokens; one byte of content is one token
    assert rest < markers
    fits = [{"role": "user", "content": "x" * (2048 - 2 - rest)}]
    decoding = Decoding(temperature=0, max_new_tokens=2)
    assert ask(engine, "base", messages=fits, decoding=decoding)[-1][0].tokens == 2
    longer = [{"role": "user", "content": "x" * (2048 - 2 - rest + 1)}]
    with pytest.raises(UserError, match=r"2,047 tokens, and there is room for 2,046 \(the 2,048 .* less the 2 of the"):
        ask(engine, "base", messages=longer, decoding=decoding)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "🙂 word " * 130_000, "a\n" * 500_000])
def test_a_megabyte_is_refused_at_once(engine, text):
    engine.load()
    started = time.process_time()
    with pytest.raises(UserError, match=r"too long: about [\d,]+ tokens, and there is room for 2,036"):
        ask(engine, "base", messages=[{"role": "user", "content": text}], decoding=GREEDY)
    assert time.process_time() - started < 2


def test_two_hundred_turns_are_answered_until_they_fill_the_context(engine):
    decoding = Decoding(temperature=0, max_new_tokens=1)
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids = engine.backbone.tokenizer.apply_chat_template(turn)["input_ids"]
    last = [{"role": "user", "content": "?"}]
    fit = (2048 - 64) // len(ids)
    answer = ask(engine, "sft", "base", messages=turn * fit + last, decoding=decoding)[-1]
    assert [a.tokens for a in answer] == [1, 1]
    with pytest.raises(UserError, match=r"too long: 4,\d+ tokens, and there is room for 2,047 .* clear the conv"):
        ask(engine, "sft", "base", messages=turn * 200 + last, decoding=decoding)
    assert_nothing_is_left(engine)
    assert texts(engine, "sft") == texts(Engine(engine.catalog, device="cpu"), "sft")


def test_diverged_weights_are_told(engine, runs, tmp_path):
    run = write_run(tmp_path / "runs" / "nan")
    backbone = Backbone(TINY)
    backbone.add_role("sft", Lora(r=4))
    fill(backbone, "sft", 0, size=float("nan"))
    save_role(backbone, "sft", run / "adapters/sft", "")
    broken = Engine(find(tmp_path / "runs"), device="cpu")
    with pytest.raises(UserError, match="not numbers"):
        ask(broken, "nan", "base")
    assert_nothing_is_left(broken)


# Adapters


def test_the_least_recently_used_leave_and_come_back_the_same(runs):
    engine = Engine(find(runs), device="cpu", max_adapters=2)
    first = texts(engine, "sft")
    bare = sum(1 for _ in engine.backbone.model.parameters())
    texts(engine, "dpo")
    texts(engine, "sft")
    assert len(engine.backbone.roles) == 2
    texts(engine, "ppo")  # dpo was not used for longest
    assert [key[0].split("/")[-4] for key in engine._adapters.loaded] == ["sft", "ppo"]
    assert len(engine.backbone.roles) == 2
    assert sum(1 for _ in engine.backbone.model.parameters()) < 2 * bare
    texts(engine, "dpo")
    assert texts(engine, "sft") == first


def test_adapters_that_one_call_needs_stay_together(runs):
    engine = Engine(find(runs), device="cpu", max_adapters=1)
    assert len(set(texts(engine, "sft", "dpo", "ppo", "dpo step 5"))) == 4
    assert len(engine.backbone.roles) == 4
    texts(engine, "sft", "base")
    texts(engine, "ppo step 7")
    assert len(engine.backbone.roles) == 1


def test_a_checkpoint_says_what_its_weights_say(engine, runs):
    backbone = Backbone(TINY)
    backbone.add_role("policy", Lora(r=4))
    fill(backbone, "policy", 2005)
    ids = engine.backbone.tokenizer.apply_chat_template(HI, add_generation_prompt=True)["input_ids"]
    found = generate(
        backbone,
        "policy",
        [ids],
        Rollout(),
        max_new_tokens=12,
        stop_ids=[engine.backbone.info.eos_token_id],
        greedy=True,
    )
    expected = backbone.tokenizer.decode(found[0].completion_ids, skip_special_tokens=True)
    assert texts(engine, "dpo step 5", decoding=GREEDY) == [expected.rstrip("\N{REPLACEMENT CHARACTER}")]
    assert texts(engine, "dpo", decoding=GREEDY) != [expected]
    assert len(set(texts(engine, "ppo", "ppo step 7", "base"))) == 3


def test_answers_carry_the_hash_of_their_weights_and_the_base(engine, runs):
    requests = [Request(name, HI, GREEDY) for name in ("base", "sft", "dpo step 5")]
    base, sft, step = (answer.speaker for answer in list(engine.stream(requests))[-1])
    assert (base.name, base.adapter_hash) == ("base", "")
    assert sft.adapter_hash == sha256_of(runs / "sft/adapters/sft/adapter_model.safetensors")
    assert (sft.name, sft.run, sft.base, sft.revision, sft.quantization) == ("sft", "sft", "tiny", "seed-0", "none")
    assert step.adapter_hash == sha256_of(runs / "dpo/checkpoints/step-000005/state.pt")


def test_an_answer_carries_who_wrote_it_whatever_happens_to_the_files_meanwhile(tmp_path):
    write_run(tmp_path / "sft", seed=1)
    engine = Engine(find(tmp_path), device="cpu")
    weights = tmp_path / "sft/adapters/sft/adapter_model.safetensors"
    before, answers = sha256_of(weights), engine.stream([Request("sft", HI, GREEDY), Request("base", HI, GREEDY)])
    first = next(answers)
    shutil.rmtree(tmp_path / "sft")
    write_run(tmp_path / "sft", seed=2)
    last = list(answers)[-1]
    assert [answer.speaker for answer in last] == [answer.speaker for answer in first]
    assert [(one.name, one.adapter_hash) for one in (a.speaker for a in last)] == [("sft", before), ("base", "")]
    assert {(a.speaker.base, a.speaker.revision, a.speaker.quantization) for a in last} == {("tiny", "seed-0", "none")}
    assert ask(engine, "sft")[-1][0].speaker.adapter_hash == sha256_of(weights) != before
    shutil.rmtree(tmp_path / "sft")  # what is loaded goes on answering, and knows from what
    assert ask(engine, "sft")[-1][0].speaker.adapter_hash != before


def test_a_run_that_is_written_again_is_loaded_again(tmp_path):
    write_run(tmp_path / "sft", seed=1)
    engine = Engine(find(tmp_path), device="cpu")
    [before] = ask(engine, "sft")[-1]
    shutil.rmtree(tmp_path / "sft")
    write_run(tmp_path / "sft", seed=2)
    [after] = ask(engine, "sft")[-1]
    assert after.text != before.text
    assert after.speaker.adapter_hash != before.speaker.adapter_hash
    assert len(engine.backbone.roles) == 1


def test_a_file_that_vanished_is_told_where_it_is_needed(tmp_path):
    write_run(tmp_path / "dpo", "dpo", steps=(5,))
    write_run(tmp_path / "sft")
    engine = Engine(find(tmp_path), device="cpu")
    said = texts(engine, "dpo step 5")
    shutil.rmtree(tmp_path / "dpo/checkpoints")
    shutil.rmtree(tmp_path / "sft/adapters")
    assert texts(engine, "dpo step 5") == said  # loaded: it goes on answering
    with pytest.raises(UserError, match="has vanished since the runs were scanned; press Refresh"):
        ask(engine, "sft", "base")
    assert_nothing_is_left(engine)


def damaged(path):
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)


def test_files_that_are_damaged_after_the_scan_are_told_and_leave_no_role(tmp_path):
    for name in ("one", "two", "three"):
        write_run(tmp_path / name, "dpo", steps=(5,))
    engine = Engine(find(tmp_path), device="cpu")
    damaged(tmp_path / "one/adapters/policy/adapter_model.safetensors")
    (tmp_path / "two/checkpoints/step-000005/state.pt").write_bytes(b"no zip")
    (tmp_path / "three/adapters/policy/adapter_config.json").unlink()
    for name in ("one", "two step 5", "three"):
        with pytest.raises(UserError, match="damaged or not of this version"):
            ask(engine, name)
        assert engine.backbone.roles == []
        assert_nothing_is_left(engine)


def test_weights_that_cannot_be_hashed_are_told_and_leave_no_role(tmp_path, monkeypatch):
    write_run(tmp_path / "sft")
    engine = Engine(find(tmp_path), device="cpu")

    def fail(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(adapters_module, "sha256_of", fail)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors: cannot be read, .*Input/output error"):
            ask(engine, "sft")
    assert engine.backbone.roles == []
    assert_nothing_is_left(engine)
    assert ask(engine, "sft")[-1][0].tokens > 0
    assert len(engine.backbone.roles) == 1


def test_an_adapter_of_another_base_is_refused_in_words(tmp_path):
    write_run(tmp_path / "mine")
    engine = Engine(find(tmp_path, base=TINY), device="cpu")
    found = engine.catalog.speakers["mine"]
    object.__setattr__(found, "base", dict(found.base) | {"model": "other-1b"})
    with pytest.raises(UserError, match=r"mine: was trained on another base model .* means nothing here"):
        ask(engine, "mine", "base")
    assert engine.backbone.roles == []


def test_an_adapter_of_a_base_of_another_size_is_refused_in_words(tmp_path):
    write_run(tmp_path / "elsewhere")
    path = tmp_path / "elsewhere/adapters/sft/adapter_model.safetensors"
    save_file({name: weight.repeat(2, 2) for name, weight in load_file(path).items()}, path)
    (tmp_path / "elsewhere/run.json").unlink()
    engine = Engine(find(tmp_path / "runs", {"mine": path.parent}, TINY), device="cpu")
    with pytest.raises(UserError, match=r"does not fit tiny; was it trained on another base\?"):
        ask(engine, "mine")
    assert engine.backbone.roles == []
    assert_nothing_is_left(engine)


# Rewards


def test_a_reward_run_scores_what_was_said_and_an_ensemble_takes_the_mean(engine):
    scores = [engine.score("reward", HI, text) for text in ("I am a model.", "No.")]
    assert scores[0] != scores[1]
    assert engine.score("reward", HI[0]["content"], "No.") == scores[1]
    assert engine.score("reward", HI, "No.", system="Be brief.") != scores[1]
    assert len(engine.backbone.roles) == 2
    backbone = engine.backbone
    ids = torch.tensor([engine._prompts.sequence(HI, "No.", "").ids])
    members = []
    for role in backbone.roles:
        with torch.no_grad(), backbone.use(role):
            members.append(float(backbone.scores(role, ids, torch.ones_like(ids, dtype=torch.bool))))
    assert scores[1] == pytest.approx(sum(members) / 2, abs=1e-6)
    assert members[0] != members[1]
    assert_nothing_is_left(engine)


def test_what_cannot_be_scored_is_told(engine):
    with pytest.raises(UserError, match="no reward run 'sft' here; there are: reward"):
        engine.score("sft", HI, "yes")
    with pytest.raises(UserError, match="too long"):
        engine.score("reward", HI, "y" * 3000)


# The base

NO_CHAT = "74234e98afe7498f"  # the first 16 digits of sha256("null")


def of_another_base(run, **base):
    """Make it a run of the tiny base with these facts changed, as if it had been trained elsewhere."""
    edit(run, lambda info: info["base"].update(base))
    edit(run, lambda info: info["recipe"]["base"].update({k: v for k, v in base.items() if k == "model"}))


def two_more(runs, **base):
    """The majority of the runs is of another base from now on."""
    for name in ("new", "newer"):
        shutil.copytree(runs / "sft", runs / name)
        of_another_base(runs / name, **base)


@pytest.fixture
def arena(tmp_path):
    write_run(tmp_path / "runs" / "sft", seed=1)
    return Arena(Options(tmp_path / "runs", tmp_path / "votes.db"))


def while_loading(monkeypatch, happens, fails=False):
    """Let something happen after the loading of the base has started and before it has ended."""

    class Slow(Backbone):
        def __init__(self, base):
            happens()
            if fails:
                raise UserError("no such base")
            super().__init__(base)

    monkeypatch.setattr(engine_module, "Backbone", Slow)


@pytest.mark.parametrize("change", [{"model": "other-1b"}, {"template_hash": "another"}])
def test_a_scan_while_the_base_is_loading_and_after_stays_on_it(arena, monkeypatch, change):
    runs, seen = arena.options.runs, []
    two_more(runs, **change)
    while_loading(monkeypatch, lambda: seen.append(arena.rescan()))
    said = texts(arena.engine, "sft")
    for catalog in (*seen, arena.rescan(), arena.engine.catalog):
        assert list(catalog.speakers) == ["base", "sft"]
        assert catalog.base.model == "tiny"
        assert sorted(problem.path.name for problem in catalog.problems) == ["new", "newer"]
    assert len(seen) == 1
    assert texts(arena.engine, "sft") == said


def test_a_reward_run_elsewhere_must_be_on_the_base_as_the_others(arena, tmp_path):
    elsewhere = write_run(tmp_path / "elsewhere" / "rm", "reward")
    options = replace(arena.options, reward=str(elsewhere))
    assert Arena(options).reward == "rm"
    of_another_base(elsewhere, template_hash="another")
    with pytest.raises(UserError, match="is no reward run on the base tiny: it is on another chat template"):
        Arena(options)


def test_before_the_base_is_loading_and_after_it_failed_the_scan_chooses(arena, monkeypatch):
    two_more(arena.options.runs, model="other-1b")
    while_loading(monkeypatch, lambda: None, fails=True)
    with pytest.raises(UserError, match="no such base"):
        arena.engine.load()
    assert not arena.engine.loaded
    assert arena.rescan().base.model == "other-1b"
    assert sorted(arena.catalog.speakers) == ["base", "new", "newer"]


def test_the_template_of_a_base_that_was_loaded_before_there_were_runs_stays(tmp_path):
    arena = Arena(Options(tmp_path / "runs", tmp_path / "votes.db", base="tiny"))
    arena.engine.load()
    for name, template in (("right", DEFAULT_TEMPLATE), ("wrong", "Q: {prompt}"), ("newest", "Q: {prompt}")):
        run = write_run(tmp_path / "runs" / name)
        edit(run, lambda info: info["base"].update(template_hash=NO_CHAT, quantization=arena.catalog.base.quantization))
        edit(run, lambda info, template=template: info["recipe"]["data"].update(prompt_template=template))
    catalog = arena.rescan()
    assert list(catalog.speakers) == ["base", "right"]
    assert catalog.prompt_template == DEFAULT_TEMPLATE
    assert ["another data.prompt_template" in problem.reason for problem in catalog.problems] == [True, True]


# Several callers


def test_a_second_caller_waits_its_turn_and_gets_what_it_would_alone(engine):
    alone = {name: texts(engine, name) for name in ("sft", "dpo", "ppo", "base")}
    found, order = {}, []

    def call(name):
        found[name] = texts(engine, name)
        order.append(name)

    first = engine.stream([Request("base", HI, SAMPLED)])
    next(first)
    threads = []
    for waiting, name in enumerate(("ppo", "sft", "dpo"), start=2):
        threads.append(threading.Thread(target=call, args=(name,)))
        threads[-1].start()
        while engine.waiting < waiting:
            time.sleep(0.001)
    assert found == {}
    rest = list(first)
    for thread in threads:
        thread.join()
    assert order == ["ppo", "sft", "dpo"]
    assert {**found, "base": [rest[-1][0].text]} == alone
    assert_nothing_is_left(engine)


def test_who_stops_while_waiting_leaves_the_queue_and_stops_nobody_else(engine):
    first = engine.stream([Request("sft", HI, GREEDY)])
    next(first)
    stopped = ask(engine, "base", "dpo", stop=lambda: True)
    assert stopped == [[Progress(done=True, stopped=True)] * 2]
    assert engine.waiting == 1
    assert list(first)[-1][0].tokens == 12
    assert_nothing_is_left(engine)
