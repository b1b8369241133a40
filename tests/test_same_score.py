"""One completion, one score: in training's evaluation, in a scored file, in PPO, reloaded and exported.

In float32 to 1e-6 at any padding and batch size, and exactly where the layout is the same. In NF4 a score depends on
the texts beside it in the last digits: the largest difference is measured and printed (`pytest -rP`).
"""

import json

import pytest
import torch
from reward_run import LIMITS, write_run

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Base, Data, RewardSource
from lowrank_rlhf.data import Example, Renderer, pad_batch
from lowrank_rlhf.data.batches import pad_left
from lowrank_rlhf.export import Export, export
from lowrank_rlhf.rewards import AdapterReward, load_members
from lowrank_rlhf.score_file import ScoreFile, score_file
from lowrank_rlhf.scoring import score_sequences
from lowrank_rlhf.stages.comparisons import Comparison
from lowrank_rlhf.stages.reward import evaluate

PAIRS = [
    ("Name a fruit.", "An apple.", "Stone."),
    ("Why is the sky blue?", "Because air scatters blue light more than red light.", ""),
    ("2 + 2?", "4", "It is five, or seven, who knows; nobody ever counted them so far, did they?"),
    ("Ça va?", "Très bien, merci – et vous?", "<|im_end|>"),
    ("Tell me a very long story about a very long road, please, and do not stop.", "No.", "Once upon a time"),
]


@pytest.fixture(params=["last", "mean"])
def pooling(request):
    return request.param


def tiny(quantization):
    return Base(model="tiny", quantization=quantization, device="cpu")


class Scorer:
    """A run loaded anew, and the sequences of PAIRS: chosen, rejected, chosen, …"""

    def __init__(self, run, base):
        self.backbone = Backbone(base)
        self.roles = load_members(self.backbone, run, "reward", key="RUN")
        self.renderer = Renderer(self.backbone.tokenizer, Data("unused", **LIMITS))
        self.examples = [Example("", [{"role": "user", "content": p}]) for p, *_ in PAIRS for _ in range(2)]
        answers = [[{"role": "assistant", "content": text}] for _, *both in PAIRS for text in both]
        self.sequences = [
            self.renderer.sequence(e.prompt, answer) for e, answer in zip(self.examples, answers, strict=True)
        ]

    def ppo(self, run, micro_batch_size):
        reward = AdapterReward(self.backbone, self.roles, RewardSource(run), micro_batch_size)
        return reward(self.examples, self.sequences).scores

    def margins(self, micro_batch_size):
        """Chosen minus rejected of each pair, as training evaluates it."""
        pairs = zip(self.sequences[::2], self.sequences[1::2], strict=True)
        rows = [Comparison("p", list(pair), [(0, 1)], [0.0]) for pair in pairs]
        return [evaluate(self.backbone, ["reward"], [row], micro_batch_size)["eval_margin"] for row in rows]

    @torch.no_grad()
    def padded(self, side, width):
        """All texts in a batch of this many columns, padded with the token they end in."""
        pad = self.backbone.info.pad_token_id
        assert self.sequences[0].ids[-1] == pad
        if side == "right":
            batch = pad_batch(self.sequences, pad, width)
            input_ids, mask = batch.input_ids, batch.attention_mask
        else:
            rows = [*(s.ids for s in self.sequences), [pad] * width]  # the last one is only for the width
            input_ids, mask = (columns[:-1] for columns in pad_left(rows, pad))
        with self.backbone.use("reward"):
            return self.backbone.scores("reward", input_ids, mask).tolist()


def file_scores(run, tmp_path, batch_size):
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = score_file(ScoreFile(run, str(source), str(tmp_path / f"{batch_size}.jsonl"), batch_size=batch_size))
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    return [row[f"{side}_score"] for row in scored for side in ("chosen", "rejected")]


def apart(ours, theirs):
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def everywhere(run, base, tmp_path):
    """The largest distance of every way to score from PPO's one text at a time, by name; and the scores' own spread."""
    scorer = Scorer(run, base)
    alone = scorer.ppo(run, 1)
    margins = [c - r for c, r in zip(alone[::2], alone[1::2], strict=True)]
    found = {f"PPO, {n} at a time": apart(scorer.ppo(run, n), alone) for n in (2, 3, 10)}
    found |= {f"evaluation, {n} at a time": apart(scorer.margins(n), margins) for n in (1, 4)}
    found |= {f"file, {n} at a time": apart(file_scores(run, tmp_path, n), alone) for n in (1, 2, 16)}
    found |= {
        f"{side}-padded to {w}": apart(scorer.padded(side, w), alone) for side in ("left", "right") for w in (115, 200)
    }
    found["reloaded"] = apart(Scorer(run, base).ppo(run, 1), alone)
    return found, max(alone) - min(alone)


def test_in_float32_a_completion_scores_the_same_everywhere(tmp_path, pooling):
    run = write_run(tmp_path / "run", pooling=pooling, scale=0.05)
    found, spread = everywhere(run, tiny("none"), tmp_path)
    print(found)
    assert spread > 0.05
    assert max(found.values()) <= 1e-6
    assert found["reloaded"] == 0.0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_the_same_layout_it_is_the_same_to_the_bit(tmp_path, pooling, quantization):
    base = tiny(quantization)
    run = write_run(tmp_path / "run", pooling=pooling, base=base)
    scorer = Scorer(run, base)
    for size in (1, 2, 10):
        ppo = scorer.ppo(run, size)
        assert score_sequences(scorer.backbone, "reward", scorer.sequences, size) == ppo
        assert Scorer(run, base).ppo(run, size) == ppo
    # A batch of five rows is ten texts; the evaluation of one pair is a batch of two, told in float64
    assert file_scores(run, tmp_path, 10) == scorer.ppo(run, 10)
    pairs = [scorer.sequences[i : i + 2] for i in range(0, len(scorer.sequences), 2)]
    two = torch.tensor([score_sequences(scorer.backbone, "reward", p, 2) for p in pairs], dtype=torch.float64)
    assert scorer.margins(1) == (two[:, 0] - two[:, 1]).tolist()


def test_in_nf4_the_layout_moves_a_score_by_little(tmp_path, pooling):
    run = write_run(tmp_path / "run", pooling=pooling, base=tiny("nf4"))
    found, spread = everywhere(run, tiny("nf4"), tmp_path)
    largest = max(found, key=lambda name: found[name])
    print(f"NF4, pooling {pooling}: {largest}: {found[largest]:.2e} of a spread of {spread:.2f}")
    assert found[largest] <= 0.02 * spread
    assert found["reloaded"] == 0.0


def test_exported_it_is_the_same_in_fp32_and_ranks_the_same_merged(tmp_path):
    check_export(write_run(tmp_path / "run", base=tiny("nf4")), tmp_path)


@pytest.mark.slow
def test_on_the_embedded_model_too(tmp_path):
    check_export(write_run(tmp_path / "run", base=Base(device="cpu"), scale=0.02), tmp_path)


def check_export(run, tmp_path):
    adapter, merged = (
        json.loads((export(Export(run, str(tmp_path / f"{merge}"), merge=merge)) / "export.json").read_text())["checks"]
        for merge in (None, "trained")
    )
    print(json.dumps({**adapter, **merged}, indent=1))
    assert max(adapter[f"fp32_{side}_padding"]["max_difference"] for side in ("left", "right")) <= 1e-3
    assert min(merged[name]["spearman"] for name in ("merged_and_adapter", "merged_and_run")) >= 0.99
