"""Scores for a file: which columns, the same file after a kill, bounded memory, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from reward_run import LIMITS, write_run

from lowrank_rlhf import score_file as module
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.cli import main
from lowrank_rlhf.config import Base, Data, RewardSource
from lowrank_rlhf.data import Example, Renderer
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards import AdapterReward, load_members
from lowrank_rlhf.score_file import ScoreFile, read_answered, score_file

COMMAND = [sys.executable, "-c", "import sys; from lowrank_rlhf.cli import main; sys.exit(main())"]
ANSWERS = ["Yes.", "It is so, I think.", "", "Ça va – très bien."]
COMPLETIONS = [{"prompt": f"What is {i}?", "completion": f"It is {'very ' * i}odd.", "id": i} for i in range(7)]
SAMPLED = [
    {"prompt": f"Why {i}?", "responses": ANSWERS[: 1 + i % 4], "temperatures": [1.0], "seed": 0, "ended": [True]}
    for i in range(5)
]
PAIRS = [{"prompt": f"How {i}?", "chosen": "Like this.", "rejected": "No idea " * i, "margin": 0.5} for i in range(5)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    nf4 = Base(model="tiny", quantization="nf4", device="cpu")
    return {
        "one": write_run(folder / "one"),
        "three": write_run(folder / "three", members=3),
        "nf4": write_run(folder / "nf4", base=nf4),
    }


@pytest.fixture
def settings(tmp_path, runs):
    """The options for some rows: 3 a batch."""

    def make(rows=COMPLETIONS, run="one", **changes):
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        values = {"source": str(source), "out": str(tmp_path / "out.jsonl"), "batch_size": 3}
        return ScoreFile(**{"run": runs[run], **values, **changes})

    return make


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ppo_scores(run, turns, combine="mean"):
    """What PPO's reward says of these (prompt, answer) texts, one at a time."""
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"))
    renderer = Renderer(backbone.tokenizer, Data("unused", **LIMITS))
    reward = AdapterReward(backbone, load_members(backbone, run, "reward", key="RUN"), RewardSource(run, 1, combine), 1)
    prompts = [[{"role": "user", "content": prompt}] for prompt, _ in turns]
    said = [[{"role": "assistant", "content": answer}] for _, answer in turns]
    sequences = [renderer.sequence(p, a) for p, a in zip(prompts, said, strict=True)]
    return reward([Example("", prompt) for prompt in prompts], sequences)


# Columns


def test_a_completion_gets_the_score_that_ppo_gives_it(settings, runs):
    found = rows_of(score_file(settings()))
    assert [{k: v for k, v in row.items() if k != "score"} for row in found] == COMPLETIONS
    expected = ppo_scores(runs["one"], [(row["prompt"], row["completion"]) for row in COMPLETIONS]).scores
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == len(expected)


def test_sampled_answers_get_a_list_however_many_they_are(settings, runs):
    found = rows_of(score_file(settings(SAMPLED)))
    assert [list(row) for row in found] == [[*SAMPLED[0], "scores"]] * len(SAMPLED)
    flat = [(row["prompt"], answer) for row in SAMPLED for answer in row["responses"]]
    expected = iter(ppo_scores(runs["one"], flat).scores)
    for row in found:
        assert row["scores"] == pytest.approx([next(expected) for _ in row["responses"]], abs=1e-6)


def test_preferences_get_both_scores(settings, runs):
    found = rows_of(score_file(settings(PAIRS)))
    expected = ppo_scores(runs["one"], [(row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected")])
    both = [row[f"{side}_score"] for row in found for side in ("chosen", "rejected")]
    assert both == pytest.approx(expected.scores, abs=1e-6)
    assert found[0]["margin"] == 0.5


@pytest.mark.parametrize("combine", ["mean", "min", "mean_minus_std"])
def test_an_ensemble_also_says_how_far_its_members_are_apart(settings, runs, combine):
    expected = ppo_scores(runs["three"], [(row["prompt"], row["completion"]) for row in COMPLETIONS], combine)
    found = rows_of(score_file(settings(run="three", combine=combine)))
    assert [row["score"] for row in found] == pytest.approx(expected.scores, abs=1e-6)
    assert [row["disagreement"] for row in found] == pytest.approx(expected.disagreement, abs=1e-6)
    assert min(expected.disagreement) > 1e-3
    if combine == "mean_minus_std":
        twice = rows_of(score_file(settings(run="three", combine=combine, std_coef=2.0, out=settings().out + ".1")))
        less = [row["score"] - row["disagreement"] for row in found]
        assert [row["score"] for row in twice] == pytest.approx(less, abs=1e-6)
    several = rows_of(score_file(settings(SAMPLED, run="three", out=settings().out + ".2")))
    assert all(len(row["disagreement"]) == len(row["scores"]) == len(row["responses"]) for row in several)
    pairs = rows_of(score_file(settings(PAIRS, run="three", out=settings().out + ".3")))
    assert list(pairs[0])[-4:] == ["chosen_score", "rejected_score", "chosen_disagreement", "rejected_disagreement"]


def test_odd_pairs_get_scores_and_cuts_are_counted(settings, capsys):
    """The run takes 64 prompt and 48 answer tokens, a byte each: two texts of the second pair and both of the third."""
    rows = [{"prompt": "Same?", "chosen": "x", "rejected": "x"}, {"prompt": "L" * 5000, "chosen": "x", "rejected": ""}]
    rows += [{"prompt": "Long?", "chosen": "x" * 5000, "rejected": "x" * 5001}]
    found = rows_of(score_file(settings(rows)))
    assert "score: 4 of 6 texts cut to the recipe's token limits" in capsys.readouterr().out
    margins = [row["chosen_score"] - row["rejected_score"] for row in found]
    assert [abs(margin) < 1e-6 for margin in margins] == [True, False, True]


def test_rankings_messages_and_csv_are_scored_too(settings, tmp_path):
    ranked = [{"prompt": "Hm?", "responses": ["a", "b"], "ranking": [2, 1]}]
    assert len(rows_of(score_file(settings(ranked)))[0]["scores"]) == 2
    dialogue = [{"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "a"}]}]
    talk = rows_of(score_file(settings(dialogue, out=str(tmp_path / "talk.jsonl"))))
    assert talk[0]["score"] == pytest.approx(rows_of(tmp_path / "out.jsonl")[0]["scores"][0], abs=1e-6)
    (tmp_path / "rows.csv").write_text('prompt,completion\nHm?,"a, b"\n')
    table = score_file(settings(source=str(tmp_path / "rows.csv"), out=str(tmp_path / "csv.jsonl")))
    assert list(rows_of(table)[0].items())[:2] == [("prompt", "Hm?"), ("completion", "a, b")]


# Interrupted and resumed


@pytest.mark.parametrize(("rows", "run"), [(COMPLETIONS, "nf4"), (SAMPLED, "nf4"), (PAIRS, "three")])
def test_cut_anywhere_and_resumed_the_file_is_the_same_to_the_byte(settings, rows, run):
    """Every prefix that a kill can leave: no rows, half a row, rows of half a batch, all but a byte. In 4 bit the last
    digits of a score depend on the texts beside it, so this holds only because batches begin at fixed rows."""
    wanted = settings(rows, run=run)
    out = score_file(wanted)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in (0, 1, ends[0] - 1, ends[0], ends[2] + 9, ends[3], ends[-2], len(whole) - 1, len(whole)):
        out.write_bytes(whole[:length])
        assert score_file(wanted).read_bytes() == whole


def test_killed_and_resumed_the_file_is_the_same_to_the_byte(settings, runs, tmp_path):
    """A real SIGKILL between the first row and the last."""
    wanted = settings(COMPLETIONS * 60, batch_size=2)
    out = tmp_path / "killed.jsonl"
    flags = ["--in", wanted.source, "--batch-size", "2", "--out", str(out)]
    process = subprocess.Popen([*COMMAND, "score", runs["one"], *flags])
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    size = out.stat().st_size
    whole = score_file(wanted).read_bytes()
    assert 0 < size < len(whole)
    resumed = settings(COMPLETIONS * 60, batch_size=2, out=str(out))
    assert score_file(resumed).read_bytes() == whole


def test_whole_batches_are_kept_and_a_finished_file_needs_no_model(settings, monkeypatch, capsys):
    out = score_file(settings())
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]))
    capsys.readouterr()
    assert score_file(settings()).read_bytes() == b"".join(lines)
    assert "3 of 7 rows are done" in capsys.readouterr().out
    monkeypatch.setattr(module, "Backbone", None)
    assert score_file(settings()).read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "three"}, "holds other scores (adapters_sha256 was "),
        ({"combine": "min"}, "holds other scores (combine was 'mean' and is now 'min')"),
        (
            {"combine": "mean_minus_std", "std_coef": 2.0},
            "holds other scores (combine was 'mean' and is now 'mean_minus_std')",
        ),
        ({"batch_size": 4}, "holds other scores (batch_size was 3 and is now 4)"),
        ({"rows": COMPLETIONS[:5]}, "holds other scores (rows_sha256 was "),
    ],
)
def test_a_file_scored_otherwise_is_not_added_to(settings, changes, words, monkeypatch):
    out = score_file(settings())
    before = out.read_bytes()
    monkeypatch.setattr(module, "Backbone", None)  # told before a model is loaded
    with pytest.raises(UserError) as caught:
        score_file(settings(**changes))
    assert words in str(caught.value)
    assert out.read_bytes() == before


def test_a_file_that_was_changed_or_is_not_of_scores_is_refused(settings, tmp_path):
    out = score_file(settings())
    whole = out.read_bytes()
    for changed in (whole.replace(b"What is 1?", b"What is 9?"), b"{}\n" + whole, whole + whole, b"\xff\n"):
        out.write_bytes(changed)
        with pytest.raises(UserError, match=r"out.jsonl, row \d+: was changed since it was written"):
            score_file(settings())
        assert out.read_bytes() == changed
    with pytest.raises(UserError, match=r"rows.jsonl: exists, with no readable rows.jsonl.meta.json beside it"):
        score_file(settings(out=str(tmp_path / "rows.jsonl")))
    assert rows_of(tmp_path / "rows.jsonl") == COMPLETIONS


# Memory


def test_neither_reading_nor_scoring_holds_the_file(settings, monkeypatch):
    """Rows alive at once while 56 are scored: those of one batch and the one being read."""
    import gc

    most = 0
    real = AdapterReward.__call__

    def counting(self, examples, sequences):
        nonlocal most
        gc.collect()
        most = max(most, sum(isinstance(o, module.Answered) for o in gc.get_objects()))
        return real(self, examples, sequences)

    monkeypatch.setattr(AdapterReward, "__call__", counting)
    score_file(settings(COMPLETIONS * 8, batch_size=8))
    assert 8 <= most <= 10


# What is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "Hi?"}\n', "p.jsonl, row 1: there is no answer to score"),
        ('{"prompt": "Hi?", "completion": "a"}\n{"prompt": "Hi?"}\n', "p.jsonl, row 2: column 'completion': expected"),
        ('{"prompt": "Hi?", "completion": "a"}\n{"prompt": \n', "p.jsonl, row 2: not valid JSON"),
        ('{"prompt": "Hi?", "responses": ["a", 3]}\n', "p.jsonl, row 1: column 'responses[2]': expected text, got int"),
        ('{"prompt": "Hi?", "responses": []}\n', "p.jsonl, row 1: column 'responses' is an empty list"),
        (
            '{"prompt": "Hi?", "completion": "a", "score": 1}\n',
            "row 1: scoring writes a column 'score' itself; rename or drop this one",
        ),
        ('{"prompt": "Hi?", "completion": "a", "x": "\\ud83d"}\n', "p.jsonl, row 1: cannot be written as JSON"),
        ("", "p.jsonl: the file has no rows"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_and_leaves_nothing(runs, tmp_path, capsys, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    arguments = ["score", runs["one"], "--in", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_what_is_not_a_reward_run_is_named(settings, tmp_path):
    with pytest.raises(UserError, match=r"^RUN: .* is not a run directory"):
        score_file(ScoreFile(str(tmp_path), "x.jsonl", "y.jsonl"))
    policy = write_run(tmp_path / "sft", "sft")
    with pytest.raises(UserError, match=r"adapters/reward has no adapter_model.safetensors; is .* a finished reward"):
        score_file(ScoreFile(policy, settings().source, str(tmp_path / "y.jsonl")))
    with pytest.raises(UserError, match="--batch-size: must be at least 1, got 0"):
        settings(batch_size=0)


def test_a_damaged_head_gives_no_row_of_nan(settings, tmp_path):
    run = write_run(tmp_path / "run")
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"))
    load_members(backbone, run, "reward", key="RUN")
    with torch.no_grad():
        backbone.heads["reward"].linear.weight.fill_(float("nan"))
    reward = AdapterReward(backbone, ["reward"], RewardSource(run), 1)
    options = ScoreFile(run, settings().source, str(tmp_path / "nan.jsonl"))
    with pytest.raises(UserError, match=r"row 1: its score is nan"):
        module._write_rows(options, reward, Renderer(backbone.tokenizer, Data("u", **LIMITS)), 0, 7)


def test_the_verb_names_its_file_after_the_data(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "my.samples.jsonl").write_text('{"prompt": "Hi?", "responses": ["a", "b"]}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["score", runs["three"], "--in", "my.samples.jsonl", "--combine", "min"]) == 0
    assert len(rows_of(tmp_path / "my.scores.jsonl")[0]["scores"]) == 2
    assert "score: 3 members, 0.03 MB of adapter and head each, 0.10 MB in all" in capsys.readouterr().out


def test_rows_come_one_by_one(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi?", "completion": "a"}\nbroken')
    assert next(read_answered(str(tmp_path / "rows.jsonl"))).answers == [[{"role": "assistant", "content": "a"}]]


def test_an_answer_with_a_thumb_is_one_answer(tmp_path):
    rows = [{"prompt": "Hi?", "completion": "a", "label": label} for label in (True, False)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_answered(str(tmp_path / "rows.jsonl")))
    assert [(row.shape, row.answers) for row in found] == [("one", [[{"role": "assistant", "content": "a"}]])] * 2
