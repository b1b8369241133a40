"""Padding changes nothing that counts, and how a batch is cut into micro-batches changes no gradient."""

import pytest
import torch
from torch.testing import assert_close

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base, Lora, RewardModel
from lowrank_rlhf.data import Sequence, pad_batch
from lowrank_rlhf.data.batches import chunks, pad_left
from lowrank_rlhf.scoring import policy_logps, score_sequences
from lowrank_rlhf.stages.comparisons import Comparison
from lowrank_rlhf.stages.reward import step_gradients

PAD = 257
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def backbone():
    """The tiny base in float32 with a reward role that is not at its start: LoRA and head are random."""
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"))
    backbone.add_role("reward", Lora(r=4), head=True)
    backbone.train_only("reward")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters("reward"):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone


def texts(n, seed=0):
    """Sequences of 3 to 12 tokens each side; some hold the pad token, and some end in it."""
    generator = torch.Generator().manual_seed(seed)

    def tokens():
        length = int(torch.randint(3, 13, (1,), generator=generator))
        return torch.randint(0, 250, (length,), generator=generator).tolist()

    return [Sequence([*tokens(), PAD], tokens() + [PAD] * (i % 3)) for i in range(n)]


# By hand


def test_right_padding_by_hand():
    batch = pad_batch([Sequence([5, 6], [7]), Sequence([8], [9, 0, 0]), Sequence([], [4])], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [4, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4, [True, False, False, False]]
    assert batch.completion_mask.tolist() == [
        [False, False, True, False],
        [False, True, True, True],
        [True, False, False, False],
    ]


def test_left_padding_by_hand():
    input_ids, attention_mask = pad_left([[5, 0], [6, 7, 8]], pad_token_id=0)
    assert input_ids.tolist() == [[0, 5, 0], [6, 7, 8]]
    assert attention_mask.tolist() == [[False, True, True], [True, True, True]]
    assert attention_mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("n", "size", "sizes"), [(0, 3, []), (1, 3, [1]), (6, 3, [3, 3]), (7, 3, [3, 3, 1]), (3, 9, [3]), (3, 1, [1, 1, 1])]
)
def test_chunks_keep_every_item_in_order(n, size, sizes):
    groups = chunks(range(10, 10 + n), size)
    assert [len(group) for group in groups] == sizes
    assert [item for group in groups for item in group] == list(range(10, 10 + n))
    assert chunks(iter(range(10, 10 + n)), size) == groups


# Laws


@pytest.mark.parametrize("extra", [0, 1, 20])
def test_masks_select_exactly_the_tokens_of_each_sequence(extra):
    sequences = texts(6)
    longest = max(len(s.ids) for s in sequences)
    batch = pad_batch(sequences, PAD, width=longest + extra)
    assert batch.input_ids.shape == (6, longest + extra)
    for row, sequence in enumerate(sequences):
        assert batch.input_ids[row][batch.attention_mask[row]].tolist() == sequence.ids
        assert batch.input_ids[row][batch.completion_mask[row]].tolist() == sequence.completion_ids
        assert (batch.input_ids[row][~batch.attention_mask[row]] == PAD).all()
    input_ids, mask = pad_left([s.prompt_ids for s in sequences], PAD)
    assert [ids[attended].tolist() for ids, attended in zip(input_ids, mask, strict=True)] == [
        s.prompt_ids for s in sequences
    ]
    assert mask[:, -1].all()


def test_more_padding_changes_no_log_probability(backbone):
    sequences = texts(4)
    tight = pad_batch(sequences, PAD)
    width = tight.input_ids.shape[1]
    logps, entropy = policy_logps(backbone, "reward", tight)
    assert (logps[tight.completion_mask] < -1).all()
    assert (logps[~tight.completion_mask] == 0).all()
    for wide, pad in ((width + 1, PAD), (width + 30, PAD), (width + 30, 65)):
        wide_logps, wide_entropy = policy_logps(backbone, "reward", pad_batch(sequences, pad, width=wide))
        assert_close(wide_logps[:, :width], logps, **CLOSE)
        assert_close(wide_entropy[:, :width], entropy, **CLOSE)
        assert (wide_logps[:, width:] == 0).all()


def test_the_neighbours_in_a_batch_change_no_log_probability(backbone):
    sequences = texts(4)
    logps, _ = policy_logps(backbone, "reward", batch := pad_batch(sequences, PAD))
    for row, sequence in enumerate(sequences):
        alone, _ = policy_logps(backbone, "reward", one := pad_batch([sequence], PAD))
        assert_close(alone[one.completion_mask], logps[row][batch.completion_mask[row]], **CLOSE)


def test_the_micro_batch_changes_no_score_and_no_order(backbone):
    sequences = texts(7)
    one_by_one = torch.tensor(score_sequences(backbone, "reward", sequences, 1))
    assert one_by_one.unique().numel() == 7
    for size in (2, 3, 7, 50):
        assert_close(torch.tensor(score_sequences(backbone, "reward", sequences, size)), one_by_one, **CLOSE)


def gradients(backbone, pairs, micro_batch_size):
    for parameter in backbone.parameters("reward"):
        parameter.grad = None
    comparisons = [Comparison(f"prompt {i}", list(pair), [(0, 1)], [0.0]) for i, pair in enumerate(pairs)]
    result = step_gradients(backbone, "reward", comparisons, micro_batch_size, RewardModel())
    return result, [parameter.grad.clone() for parameter in backbone.parameters("reward")]


def test_accumulated_gradients_are_those_of_the_whole_batch(backbone):
    """Also where the last micro-batch is smaller: every pair weighs 1/5, whatever group it is in."""
    pairs = list(zip(texts(5, seed=5), texts(5, seed=25), strict=True))
    (metrics, tokens), whole = gradients(backbone, pairs, 5)
    assert max(float(g.abs().max()) for g in whole) > 1e-2
    chosen, rejected = (score_sequences(backbone, "reward", side, 5) for side in zip(*pairs, strict=True))
    wins = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    assert metrics["rewards/accuracies"] == pytest.approx(wins / 5)
    assert wins == 2
    assert metrics["rewards/mean"] == pytest.approx(sum(chosen + rejected) / 10, abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected)) / 5, abs=1e-6)
    assert tokens == sum(len(s.ids) for pair in pairs for s in pair)
    for size in (1, 2, 3, 4):
        result, accumulated = gradients(backbone, pairs, size)
        assert_close(accumulated, whole, **CLOSE)
        assert result == (pytest.approx(metrics, abs=1e-6), tokens)


def test_gradients_of_a_batch_are_the_mean_over_its_pairs(backbone):
    pairs = list(zip(texts(3, seed=3), texts(3, seed=4), strict=True))
    (metrics, _), whole = gradients(backbone, pairs, 3)
    alone = [gradients(backbone, [pair], 1) for pair in pairs]
    assert_close(whole, [sum(parts) / 3 for parts in zip(*(g for _, g in alone), strict=True)], **CLOSE)
    assert metrics["loss"] == pytest.approx(sum(result[0]["loss"] for result, _ in alone) / 3, abs=1e-6)
