"""Sampling candidates: rows and their columns, the same file after a kill, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from lowrank_rlhf import sampling
from lowrank_rlhf.cli import main
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.sampling import Sampling, batch_seed, sample

COMMAND = [sys.executable, "-c", "import sys; from lowrank_rlhf.cli import main; sys.exit(main())"]
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}]
ROWS = [{"prompt": f"What is {i} + {i}?", "must_mention": [str(2 * i)]} for i in range(7)]


@pytest.fixture
def settings(tmp_path):
    """Change some values of a small sampling on the tiny model: 2 prompts a batch, so 4 batches, the last with one."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(**changes):
        values = {"k": 3, "batch_size": 6, "max_new_tokens": 6, "out": str(tmp_path / "out.jsonl")}
        return Sampling(**{"source": "tiny", "prompts": str(prompts), **values, **changes})

    return make


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_holds_the_prompt_its_k_answers_and_how_they_came(settings):
    found = rows(sample(settings(temperatures=(1.0, 0.01), seed=5)))
    assert [(row["prompt"], row["must_mention"]) for row in found] == [(r["prompt"], r["must_mention"]) for r in ROWS]
    for row in found:
        assert list(row) == ["prompt", "responses", "temperatures", "seed", "ended", "must_mention"]
        assert len(row["responses"]) == len(row["ended"]) == 3
        assert (row["temperatures"], row["seed"]) == ([1.0, 0.01, 1.0], 5)


def test_answers_at_a_low_temperature_agree_and_at_a_high_one_differ(settings):
    """At 0.001 every draw is the likeliest token; so answers 1 and 3 agree, and only those need to."""
    found = rows(sample(settings(k=4, temperatures=(5.0, 0.001))))
    assert all(row["responses"][1] == row["responses"][3] for row in found)
    assert all(row["responses"][0] != row["responses"][2] for row in found)


def test_ended_is_false_exactly_where_the_token_limit_cut(settings, monkeypatch):
    """An answer that stopped by itself has fewer tokens than the limit, or ends in the end-of-turn token."""
    real, lengths = sampling.generate, []

    def spy(*arguments, **options):
        sequences = real(*arguments, **options)
        lengths.extend((len(s.completion_ids), s.completion_ids[-1] in options["stop_ids"]) for s in sequences)
        return sequences

    monkeypatch.setattr(sampling, "generate", spy)
    found = rows(sample(settings(k=9, temperatures=(3.0,), max_new_tokens=40)))
    ended = [e for row in found for e in row["ended"]]
    assert ended == [stopped for _, stopped in lengths]
    assert len(Counter(ended)) == 2
    assert all(stopped or length == 40 for length, stopped in lengths)


def test_a_prompt_of_several_messages_stays_messages(settings, tmp_path):
    prompts = tmp_path / "chat.jsonl"
    prompts.write_text(json.dumps({"prompt": MESSAGES}) + "\n" + json.dumps({"prompt": "Ho?"}) + "\n")
    out = sample(settings(prompts=str(prompts)))
    assert [row["prompt"] for row in rows(out)] == [MESSAGES, "Ho?"]
    before = out.read_bytes()
    assert sample(settings(prompts=str(prompts))).read_bytes() == before


def test_the_policy_adapter_of_a_run_answers(settings, tmp_path):
    run = tmp_path / "run"
    tiny = ["--tiny", "train.learning_rate=0.05", f"run_dir={run}"]
    assert main(["sft", "--config", "recipes/sft.yaml", *tiny]) == 0
    own = rows(sample(settings(source=str(run), out=str(tmp_path / "run.jsonl"))))
    base = rows(sample(settings()))
    assert [row["prompt"] for row in own] == [row["prompt"] for row in base]
    assert [row["responses"] for row in own] != [row["responses"] for row in base]
    with pytest.raises(UserError, match="holds other samples \\(adapter_sha256 was '"):
        sample(settings(out=str(tmp_path / "run.jsonl")))
    (run / "adapters/sft").rename(run / "adapters/reward")
    with pytest.raises(UserError, match="adapters/ has no policy or sft"):
        sample(settings(source=str(run), out=str(tmp_path / "other.jsonl")))


# Interrupted and resumed


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 0.5)])
def test_cut_anywhere_and_resumed_the_file_is_the_same_to_the_byte(settings, temperatures):
    """Every prefix of the file that a kill can leave: no rows, half a row, rows of half a batch, all but a byte."""
    wanted = settings(temperatures=temperatures)
    out = sample(wanted)
    whole = out.read_bytes()
    line = whole.index(b"\n") + 1
    for length in (0, 1, line - 1, line, line + 9, whole.rindex(b"\n", 0, -1), len(whole) - 1, len(whole)):
        out.write_bytes(whole[:length])
        assert sample(wanted).read_bytes() == whole


def test_whole_batches_are_kept_and_not_sampled_again(settings, monkeypatch, capsys):
    out = sample(settings())
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]))
    kept = out.stat().st_ino
    capsys.readouterr()
    assert sample(settings()).read_bytes() == b"".join(lines)
    assert out.stat().st_ino == kept
    assert "4 of 7 prompts are done" in capsys.readouterr().out
    monkeypatch.setattr(sampling, "Backbone", None)  # a finished file needs no model
    assert sample(settings()).read_bytes() == b"".join(lines)


def test_killed_and_resumed_the_file_is_the_same_to_the_byte(settings, tmp_path):
    """A real SIGKILL between the first row and the last."""
    wanted = settings(max_new_tokens=200)
    whole = sample(wanted).read_bytes()
    out = tmp_path / "killed.jsonl"
    flags = ["--k", "3", "--batch-size", "6", "--max-new-tokens", "200", "--out", str(out)]
    process = subprocess.Popen([*COMMAND, "sample", "tiny", "--prompts", wanted.prompts, *flags])
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < out.stat().st_size < len(whole)
    resumed = settings(max_new_tokens=200, out=str(out))
    assert sample(resumed).read_bytes() == whole


def test_the_seed_of_a_batch_is_its_own():
    seeds = {batch_seed(seed, first) for seed in range(20) for first in range(0, 200, 2)}
    assert len(seeds) == 2000


def test_another_seed_gives_other_answers(settings, tmp_path):
    first = rows(sample(settings()))
    second = rows(sample(settings(seed=1, out=str(tmp_path / "second.jsonl"))))
    assert all(a["responses"] != b["responses"] for a, b in zip(first, second, strict=True))


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "holds other samples (seed was 0 and is now 1)"),
        ({"k": 4}, "holds other samples (temperatures was"),
        ({"temperatures": (0.7,)}, "holds other samples (temperatures was [1.0, 1.0, 1.0] and is now [0.7, 0.7, 0.7])"),
        ({"batch_size": 12}, "batch_size was 6 and is now 12"),
        ({"max_new_tokens": 7}, "max_new_tokens was 6 and is now 7"),
        ({"source": "smollm2-135m-instruct"}, "base_model was 'tiny' and is now 'smollm2-135m-instruct'"),
    ],
)
def test_a_file_sampled_otherwise_is_not_added_to(settings, changes, words, monkeypatch):
    out = sample(settings())
    before = out.read_bytes()
    monkeypatch.setattr(sampling, "Backbone", None)  # told before a model is loaded
    with pytest.raises(UserError) as caught:
        sample(settings(**changes))
    assert words in str(caught.value)
    assert out.read_bytes() == before


def test_another_prompts_file_is_refused(settings):
    wanted = settings()
    sample(wanted)
    with open(wanted.prompts, "a") as file:
        file.write('{"prompt": "One more?"}\n')
    with pytest.raises(UserError, match=r"out.jsonl: holds other samples \(prompts_sha256 was"):
        sample(wanted)


def test_a_file_that_was_not_sampled_or_was_changed_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"prompts.jsonl: exists, with no readable prompts.jsonl.meta.json beside it"):
        sample(settings(out=settings().prompts))
    assert rows(tmp_path / "prompts.jsonl") == ROWS
    out = sample(settings())
    whole = out.read_bytes()
    for changed in (whole.replace(b"1 + 1", b"1 + 2"), b"{}\n" + whole, whole + whole, b"[1]\n", b"\xff\n"):
        out.write_bytes(changed)
        with pytest.raises(UserError, match=r"out.jsonl, row \d+: was changed"):
            sample(settings())
        assert out.read_bytes() == changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 1}, "--k: must be between 2 and 9, got 1"),
        ({"k": 10}, "--k: must be between 2 and 9, got 10"),
        ({"temperatures": (1.0, 0.0)}, "--temperatures: expected 1 to k=3 numbers above 0, got [1.0, 0.0]"),
        ({"temperatures": (float("nan"),)}, "--temperatures: expected"),
        ({"temperatures": (1.0,) * 4}, "--temperatures: expected 1 to k=3 numbers"),
        ({"temperatures": ()}, "--temperatures: expected"),
        ({"batch_size": 0}, "--batch-size: must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens: must be at least 1, got 0"),
    ],
)
def test_values_out_of_bounds_are_refused(settings, changes, words):
    with pytest.raises(UserError) as caught:
        settings(**changes)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "Hi?"}\n{"prompt": ""}\n', "p.jsonl, row 2: column 'prompt' is empty"),
        ('{"prompt": "Hi?"}\n{"prompt": \n', "p.jsonl, row 2: not valid JSON"),
        ('{"prompt": "Hi?", "seed": 3}\n', "p.jsonl, row 1: sampling writes a column 'seed' itself"),
        ("", "p.jsonl: the file has no rows"),
    ],
)
def test_a_prompts_file_that_does_not_fit_is_one_line_and_leaves_nothing(tmp_path, capsys, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    assert main(["sample", "tiny", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_a_folder_that_is_neither_a_run_nor_a_model_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match="neither a run directory"):
        sample(settings(source=str(tmp_path)))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run.json: not a run of this version: KeyError\('recipe'\)"):
        sample(settings(source=str(tmp_path)))


def test_the_verb_names_its_file_after_the_prompts(tmp_path, monkeypatch):
    (tmp_path / "my.prompts.jsonl").write_text('{"prompt": "Hi?"}\n')
    monkeypatch.chdir(tmp_path)
    flags = ["--k", "2", "--temperatures", "1,0.7", "--max-new-tokens", "3"]
    assert main(["sample", "tiny", "--prompts", "my.prompts.jsonl", *flags]) == 0
    assert rows(tmp_path / "my.samples.jsonl")[0]["temperatures"] == [1.0, 0.7]
