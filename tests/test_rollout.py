"""Rollouts: what transformers' own generation says, from the distribution that is scored, whoever leaves the batch."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base, Lora, Rollout
from lowrank_rlhf.data import pad_batch
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.rollout import generate, sampling_mismatch

PROMPTS = [[9, 41, 17, 33, 5, 62, 20, 48, 11], [7], [50, 3, 3, 29, 60], [13, 44, 8, 25, 31, 6, 52]]
NEW_TOKENS = 12
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
# What is carried from token to token: keys and values, also of a window shorter than the longest prompt; convolution
# states in other layers, or in the same; recurrent states alone.
CONFIGS = {
    "full attention": {"model_type": "llama", **ATTENTION},
    "sliding window": {"model_type": "gemma2", **ATTENTION, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "hybrid": {"model_type": "lfm2", **ATTENTION, "layer_types": ["conv", "full_attention"]},
    "hybrid layer": {"model_type": "falcon_h1", **ATTENTION, **MAMBA, "mamba_chunk_size": 8},
    "recurrent": {"model_type": "mamba", "state_size": 4},
    "absolute positions": {"model_type": "gpt2", "num_attention_heads": 2},
}


def around(model, pad_token_id=0):
    """A base of any architecture with no role, as far as rollouts look."""
    info = SimpleNamespace(pad_token_id=pad_token_id)
    modes = {"generating": lambda role: nullcontext(model)}
    return SimpleNamespace(model=model, info=info, most_rows=MostRows(), **modes)


@pytest.fixture(scope="module", params=CONFIGS)
def any_model(request):
    """Two random float32 layers whose greedy answers vary."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(**CONFIGS[request.param], **sizes, **special, initializer_range=0.3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def base():
    return Backbone(Base(model="tiny", quantization="none", device="cpu"))


class Says:
    """A model without weights: logits of step t are `logits[t]` for every row; notes the rows of each forward."""

    device = torch.device("cpu")
    config = LlamaConfig(num_hidden_layers=1)

    def __init__(self, logits):
        self.logits, self.rows = logits, []

    def forward(self, input_ids, past_key_values=None, **inputs):
        logits = self.logits[len(self.rows)]
        self.rows.append(len(input_ids))
        states = torch.zeros(len(input_ids), 1, input_ids.shape[1], 2)
        past_key_values.update(states, states, 0)
        return CausalLMOutputWithPast(logits=logits.expand(len(input_ids), 1, -1))

    __call__ = forward


def says(*tokens):
    return Says(torch.nn.functional.one_hot(torch.tensor(tokens), 10) * 100.0)


def greedy(backbone, prompts, stop_ids=(), max_new_tokens=NEW_TOKENS, batch_size=16):
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": list(stop_ids), "greedy": True}
    return [s.completion_ids for s in generate(backbone, None, prompts, Rollout(batch_size), **settings)]


def stops_apart(model):
    """Two stop tokens that end the four prompts at different steps, one of them never."""
    free = greedy(around(model), PROMPTS)
    return [free[0][2], free[2][6]]


# The same tokens as transformers


def test_greedy_is_transformers_generate_token_for_token(any_model):
    """On left-padded prompts, one of a single token, with two stop ids; transformers pads what has ended."""
    stop_ids = stops_apart(any_model)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": stop_ids, "pad_token_id": 0}
    wanted = any_model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()
    found = greedy(around(any_model), PROMPTS, stop_ids)
    lengths = [len(completion) for completion in found]
    assert len(set(lengths)) >= 3, "the rows must end at different steps"
    assert found == [row[:length] for row, length in zip(wanted, lengths, strict=True)]
    assert all(c[-1] in stop_ids or len(c) == NEW_TOKENS for c in found)


def test_who_is_beside_a_row_and_who_leaves_changes_nothing_for_it(any_model):
    """Alone and unpadded, in pairs, or beside rows that end before it; in the order of the prompts."""
    stop_ids = stops_apart(any_model)
    backbone = around(any_model)
    alone = [greedy(backbone, [prompt], stop_ids)[0] for prompt in PROMPTS]
    for batch_size in (1, 2, 3, 4):
        assert greedy(backbone, PROMPTS, stop_ids, batch_size=batch_size) == alone
    backwards = greedy(backbone, PROMPTS[::-1], stop_ids, batch_size=2)
    assert backwards == alone[::-1] != alone
    assert greedy(backbone, []) == []


# Which rows are computed


def test_prompts_of_like_length_share_a_batch_and_the_longest_come_first(base):
    read = []
    embeddings = base.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: read.append(tuple(args[0].shape)))
    prompts = [[1] * length for length in (3, 20, 4, 19, 5)]
    greedy(base, prompts, max_new_tokens=2, batch_size=2)
    assert read == [(2, 20), (2, 1), (2, 5), (2, 1), (1, 3), (1, 1)]


def test_an_ended_row_is_not_computed_again(any_model):
    rows = []
    hook = any_model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(tuple(out.shape)))
    found = greedy(around(any_model), PROMPTS, stops_apart(any_model))
    hook.remove()
    rows = rows[NEW_TOKENS:]  # behind those of `stops_apart`
    going_on = [sum(len(completion) > step for completion in found) for step in range(max(map(len, found)))]
    assert rows == [(count, 1, 64) for count in going_on], "and logits of the last token only"
    assert len(set(going_on)) >= 3


# What is kept


def test_a_completion_keeps_the_first_stop_token_and_says_whether_it_was_cut():
    def one(tokens, max_new_tokens):
        model = says(*tokens)
        settings = {"max_new_tokens": max_new_tokens, "stop_ids": [7, 8], "greedy": True}
        (sequence,) = generate(around(model), None, [[1, 2]], Rollout(), **settings)
        assert sequence.prompt_ids == [1, 2]
        return sequence.completion_ids, sequence.cut, len(model.rows)

    assert one([3, 8, 7, 3], 4) == ([3, 8], False, 2)
    assert one([7, 3], 2) == ([7], False, 1)
    assert one([3, 4, 7], 3) == ([3, 4, 7], False, 3)  # at the limit, by itself
    assert one([3, 4, 7], 2) == ([3, 4], True, 2)


# The distribution

SHARP = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0])


@pytest.mark.parametrize(
    ("rollout", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0, "top_k": 3}, [0, 1, 3]),
        ({"top_p": 0.8}, [0, 1, 3]),  # 0.56, 0.21, 0.13: the third passes 0.8
        ({"temperature": 2.0, "top_p": 0.6, "top_k": 2}, [0]),  # 0.37 of all, 0.62 of the two
    ],
)
def test_samples_are_as_frequent_as_the_softmax_says(rollout, kept):
    """χ² of 5,000 first tokens; 18.5 is its 99.9th percentile at 4 degrees of freedom, and less at fewer."""
    n = 5_000
    model = Says(SHARP.reshape(1, 1, 1, -1))
    torch.manual_seed(0)
    found = generate(around(model), None, [[1]] * n, Rollout(batch_size=n, **rollout), max_new_tokens=1, stop_ids=[])
    counts = torch.bincount(torch.tensor([s.completion_ids[0] for s in found]), minlength=5)
    expected = torch.zeros(5).index_copy(
        0, torch.tensor(kept), n * (SHARP[kept] / rollout.get("temperature", 1.0)).softmax(dim=0)
    )
    assert counts[expected == 0].sum() == 0
    assert (((counts - expected) ** 2)[kept] / expected[kept]).sum() < 18.5


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_samples_are_from_the_distribution_that_is_scored(base, temperature):
    """−log p − entropy has mean zero over sampled tokens: z-score below 4; at another temperature it is far off."""
    prompts = [[i, i + 1, 70] for i in range(100)]
    torch.manual_seed(0)
    sequences = generate(base, None, prompts, Rollout(100, temperature=temperature), max_new_tokens=30, stop_ids=[])
    batch = pad_batch(sequences, 0)

    def z_score(at):
        with torch.no_grad():
            logps, entropy = base.token_logps(
                batch.input_ids, batch.attention_mask, batch.completion_mask, temperature=at
            )
        surprise = (-logps - entropy)[batch.completion_mask]
        return abs(float(surprise.mean() / surprise.std() * len(surprise) ** 0.5))

    assert z_score(temperature) < 4
    assert z_score(0.9 * temperature) > 8


def test_the_global_seed_drives_sampling(base):
    def drawn(seed):
        torch.manual_seed(seed)
        return generate(base, None, PROMPTS, Rollout(), max_new_tokens=NEW_TOKENS, stop_ids=[])

    assert drawn(0) == drawn(0) != drawn(1)


def test_nothing_of_the_models_generation_config_reaches_a_rollout(base):
    """Settings that each change transformers' own greedy or sampled answer."""
    settings = {"max_new_tokens": NEW_TOKENS, "stop_ids": [3]}

    def answers():
        torch.manual_seed(0)
        sampled = generate(base, None, PROMPTS, Rollout(), **settings)
        return sampled, generate(base, None, PROMPTS, Rollout(), **settings, greedy=True)

    def transformers_own():
        return GenerationMixin.generate(base.model, torch.tensor([[9, 41]]), max_new_tokens=NEW_TOKENS).tolist()

    before, theirs = answers(), transformers_own()
    leak = {"repetition_penalty": 5.0, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "do_sample": True}
    base.model.generation_config.update(**leak, suppress_tokens=before[1][0].completion_ids, use_cache=False)
    assert transformers_own() != theirs
    assert answers() == before


# Modes


def test_checkpointing_and_train_mode_are_off_inside_and_as_before_after(base):
    """One token a forward after the prompt: the cache is on (it is off in silence where checkpointing is on)."""
    base.add_role("policy", Lora(r=4, dropout=0.5))
    base.train_only("policy")
    base.enable_gradient_checkpointing()
    seen = []

    def note(module, args, out):
        seen.append((args[0].shape[1], base.model.training))

    def checkpointing():
        return [m.gradient_checkpointing for m in base.model.modules() if hasattr(m, "gradient_checkpointing")]

    base.model.get_input_embeddings().register_forward_hook(note)
    before = checkpointing()
    assert any(before)

    def check_restored():
        assert base.active == "policy"
        assert all(module.training for module in base.model.modules())
        assert checkpointing() == before
        assert torch.is_grad_enabled()

    with base.use("policy", train=True):
        generate(base, None, [[5, 6, 7]], Rollout(), max_new_tokens=4, stop_ids=[])
        assert seen == [(3, False), (1, False), (1, False), (1, False)]
        check_restored()
        with pytest.raises(IndexError):
            generate(base, None, [[5], [6, 100_000]], Rollout(), max_new_tokens=4, stop_ids=[])
        check_restored()


def test_a_model_that_carries_no_cache_is_refused():
    model = SimpleNamespace(device=torch.device("cpu"), config=Says.config, forward=lambda input_ids, **inputs: None)
    with pytest.raises(UserError, match="SimpleNamespace carries no KV cache"):
        greedy(around(model), [[1]])


# What is told


def test_sampling_that_is_not_what_is_scored_is_told_with_its_fix():
    assert sampling_mismatch(Rollout()) is None
    assert sampling_mismatch(Rollout(temperature=0.3)) is None
    told = sampling_mismatch(Rollout(top_p=0.9))
    assert told.startswith("with rollout.top_p=0.9 the least likely tokens are never sampled")
    assert "set rollout.top_p=1 to" in told
    assert "set rollout.top_k=0 to" in sampling_mismatch(Rollout(top_k=40))
    both = sampling_mismatch(Rollout(top_p=0.9, top_k=40))
    assert "with rollout.top_p=0.9 and rollout.top_k=40 the" in both
    assert "set rollout.top_p=1 rollout.top_k=0 to" in both


def test_each_finished_batch_is_told_by_the_places_of_its_prompts(base):
    """Prompts of 9, 1, 5 and 7 tokens, two at a time, the longest first."""
    told = []
    settings = {"max_new_tokens": 3, "stop_ids": [5]}
    found = generate(base, None, PROMPTS, Rollout(2), **settings, finished=told.append)
    assert [sorted(part) for part in told] == [[0, 3], [1, 2]]
    assert [(told[0] | told[1])[i] for i in range(4)] == found


def test_a_label_shows_the_batches(base, monkeypatch, capsys):
    monkeypatch.setattr("lowrank_rlhf.progress.QUIET_SECONDS", 0)
    settings = {"max_new_tokens": 1, "stop_ids": []}
    generate(base, None, PROMPTS, Rollout(2), **settings)
    assert capsys.readouterr().err == ""
    generate(base, None, PROMPTS, Rollout(2), **settings, label="answering")
    assert "answering [" in capsys.readouterr().err
