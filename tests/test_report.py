"""The data report: counted by hand on small files, printed with the learned tokens marked, kept in run.json."""

import io
import json
import os
import random
import time
from pathlib import Path

import pytest
from rich.console import Console
from test_format_rows import bot, jsonl, user

from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.cli import main
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import (
    Renderer,
    Sizes,
    data_report,
    load_demonstrations,
    load_preferences,
    load_prompts,
    print_report,
    tokenize_demonstrations,
)
from lowrank_rlhf.data.duplicates import count_duplicates
from lowrank_rlhf.data.report import report_lines
from lowrank_rlhf.progress import progress


def report(path, **settings):
    data = Data(train=str(path), **settings)
    train, held_out = load_demonstrations(data)
    render = Renderer(tiny_tokenizer(), data)
    return data_report("demonstrations", train, held_out, render, tokenize_demonstrations(train, render)[1])


def row(prompt, completion="Yes, of course it is."):
    return {"prompt": prompt, "completion": completion}


def test_a_report_by_hand(tmp_path):
    """Four rows to learn from, one twice; "<user\\nab>\\n<assistant\\n" is 21 tokens, 3 letters and the end 4."""
    train = jsonl(
        tmp_path / "a.jsonl", [row("ab", "cde"), row("abc", "c"), row(""), row("ab ", "cdef"), row("ab ", "cdef")]
    )
    held_out = jsonl(tmp_path / "b.jsonl", [row("new"), row(" AB"), row("ab"), row("abc")])
    found = report(train, eval=str(held_out), on_bad_row="skip", max_completion_tokens=4)
    assert json.loads(json.dumps(found))["duplicates"] == found["duplicates"] == {"exact": 1, "near": 0}
    assert found["examples"] == {"train": 4, "eval": 4}
    assert found["tokens"]["prompt"] == {"5": 21, "50": 22, "95": 22, "99": 22, "max": 22}
    assert found["tokens"]["completion"] == {"5": 2, "50": 4, "95": 4, "99": 4, "max": 4}
    assert (found["texts"], found["truncated"], found["leaked"]) == (4, 2, 2)
    lines = list(report_lines(found))
    assert lines[0] == f"data: {train}: 5 rows, format: completion, from columns prompt, completion"
    assert lines[1] == "  1 of 5 rows skipped: row 3: column 'prompt' is empty"
    assert lines[2] == f"data: {held_out}: 4 rows, format: completion, from columns prompt, completion"
    assert "  2 of 4 texts cut to data.max_prompt_tokens or data.max_completion_tokens" in lines
    assert lines[-1].startswith("  held-out prompts that are also in train: 2")


def test_a_date_in_the_chat_template_is_told(tmp_path, monkeypatch):
    rows = jsonl(tmp_path / "a.jsonl", [row(f"question {i}") for i in range(20)])
    assert report(rows)["template_date"] is None
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B') }}" + tokenizer.chat_template
    monkeypatch.setitem(globals(), "tiny_tokenizer", lambda: tokenizer)
    found = report(rows)
    assert found["template_date"] == "2024-07-26"
    told = "  the chat template writes the date of the day: 2024-07-26 here, whenever it is"
    assert told in list(report_lines(found))
    assert found["rendered"][0]["text"][0][0].startswith("26 July<|im_start|>")


def test_a_split_by_prompt_leaks_nothing(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [row(f"p{i % 40}") for i in range(80)])
    assert report(path, eval_fraction=0.3)["leaked"] == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_learned_tokens_are_marked(terminal, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [user("Hi"), bot("Ho\x1b[0m"), user("Tea?"), bot("Yes")]}] * 5)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, highlight=False, soft_wrap=True, width=200)
    monkeypatch.setattr("rich.console.Console", lambda **settings: console)
    print_report(report(path, loss_on="all", eval_fraction=0))
    said = screen.getvalue()
    assert said.count("Tea?") == 3
    marked = "\x1b[32mYes<|im_end|>\x1b[0m" if terminal else "⟦Yes<|im_end|>⟧"
    assert marked in said
    assert ("⟦Ho␛[0m<|im_end|>⟧" in said) == (not terminal)
    assert "⟦Tea" not in said
    assert ("\x1b[2m" in said) == terminal


def test_preferences_show_both_answers_and_prompts_no_learned_token(tmp_path):
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "ranking": [1, 2, 3]} for i in range(4)]
    data = Data(train=str(jsonl(tmp_path / "a.jsonl", rows)), eval_fraction=0)
    render = Renderer(tiny_tokenizer(), data)
    train, held_out = load_preferences(data)
    found = data_report("preferences", train, held_out, render, Sizes.of([]))
    assert [shown["row"].rpartition("row ")[2] for shown in found["rendered"][:2]] == ["1, chosen", "1, rejected"]
    assert [shown["text"][1] for shown in found["rendered"][:2]] == [("a<|im_end|>", True), ("b<|im_end|>", True)]
    assert found["duplicates"] == {"exact": 0, "near": 0}, "the pairs of one row are not duplicates of each other"
    train, held_out = load_prompts(data)
    found = data_report("prompts", train, held_out, render, Sizes.of([]))
    assert [learned for shown in found["rendered"] for _, learned in shown["text"]] == [False] * 3


def test_contradictions_and_empty_answers_are_told_where_there_are_any(tmp_path):
    """Rows 1 and 2 contradict each other; the third answer of row 3 says nothing in two pairs, which is one answer."""
    rows = [{"prompt": "Hi", "responses": ["a", "b"], "ranking": ranking} for ranking in ([1, 2], [2, 1])]
    rows += [{"prompt": "Ho", "responses": ["a", "b", " "], "ranking": [1, 2, 3]}]
    said = []
    for some in (rows, rows[:1]):
        data = Data(train=str(jsonl(tmp_path / "a.jsonl", some)), eval_fraction=0)
        train, held_out = load_preferences(data)
        found = data_report("preferences", train, held_out, Renderer(tiny_tokenizer(), data), Sizes.of([]))
        said.append("\n".join(report_lines(found)))
        assert (found["contradicting_pairs"], found["empty_answers"]) == ((2, 1) if some is rows else (0, 0))
    assert "  pairs that contradict another one (the two answers swapped): 2" in said[0]
    assert "  answers that say nothing, learned as they are: 1" in said[0]
    assert "pairs that contradict" not in said[1]
    assert "answers that say nothing" not in said[1]


# Duplicates


def sentence(source, words=60):
    return " ".join(str(source.randrange(10_000)) for _ in range(words))


def changed(text, source, words):
    """`words` words of a text replaced; each takes three of its triples away."""
    parts = text.split()
    for i in source.sample(range(len(parts)), words):
        parts[i] = "changed"
    return " ".join(parts)


def test_near_duplicates_are_found_and_different_texts_are_not():
    """One word of 60 changed: 55 of 61 triples are shared, 0.90. Ten changed: about 0.35."""
    source = random.Random(0)
    originals = [sentence(source) for _ in range(300)]
    assert count_duplicates(originals) == (0, 0)
    exact, near = count_duplicates([*originals, *(changed(text, source, 1) for text in originals)])
    assert exact == 0
    assert near >= 270
    exact, near = count_duplicates([*originals, *(changed(text, source, 10) for text in originals)])
    assert near <= 3
    assert count_duplicates([*originals, *originals]) == (300, 0)


def test_case_and_punctuation_make_a_near_duplicate_and_short_texts_only_exact_ones():
    assert count_duplicates(["One two three four five.", "one two, three four FIVE"]) == (0, 1)
    assert count_duplicates(["one", "One", "one", "", "", "one two"]) == (2, 0)


def test_looking_for_duplicates_takes_time_in_proportion_to_the_texts():
    source = random.Random(0)
    texts = [sentence(source, 150) for _ in range(4000)]
    started = time.process_time()
    count_duplicates(texts[:1000])
    few = time.process_time() - started
    started = time.process_time()
    count_duplicates(texts)
    assert time.process_time() - started < 12 * few


# Progress


def test_progress_is_silent_when_it_is_quick_and_tells_lines_where_there_is_no_terminal(monkeypatch, capsys):
    assert list(progress(range(5), "reading")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("lowrank_rlhf.progress.time.monotonic", lambda: float(next(clock)))
    assert list(progress(range(10), "reading", 10)) == list(range(10))
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("reading [####")
    assert 1 <= len(told) <= 3
    assert "\r" not in "".join(told)


# In a run


@pytest.mark.parametrize(
    ("stage", "format"),
    [
        ("sft", "completion, from columns completion, gold, prompt"),
        (
            "reward",
            "ranking, from columns flipped, gold, must_mention, prompt, ranking, responses",
        ),
        ("ppo", "prompt, from columns must_mention, prompt"),
    ],
)
def test_every_stage_says_the_report_and_keeps_it(stage, format, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert main([stage, "--config", f"recipes/{stage}.yaml", "--tiny", f"run_dir={tmp_path}/run"]) == 0
    found = json.loads((tmp_path / "run/run.json").read_text())["data_report"]
    assert found["sources"][0]["format"] == format.partition(",")[0]
    assert (found["sources"][0]["rows"], found["sources"][0]["skipped"]) == (12, 0)
    assert len(found["rendered"]) == (6 if stage == "reward" else 3)
    out = capsys.readouterr().out
    assert f"12 rows, format: {format}" in out
    assert ("⟦" in out) == (stage != "ppo")


# Real files


@pytest.fixture
def real():
    if not os.environ.get("LOWRANK_RLHF_DATA"):
        pytest.skip("LOWRANK_RLHF_DATA is not set: no real data here")
    return Path(os.environ["LOWRANK_RLHF_DATA"])


@pytest.mark.parametrize(
    ("name", "format", "rows", "columns"),
    [
        ("alpaca_en.json", "alpaca", 999, {}),
        ("dpo_sharegpt.json", "sharegpt_preference", 300, {}),
        ("gsm8k_train.jsonl.gz", "completion", 2000, {"prompt": "question", "completion": "answer"}),
        ("gsm8k_test.jsonl.gz", "completion", 200, {"prompt": "question", "completion": "answer"}),
        ("hh_harmless_train.jsonl.gz", "hh", 1800, {}),
        ("hh_harmless_test.jsonl.gz", "hh", 256, {}),
    ],
)
def test_every_row_of_the_real_files_is_read_and_reported(name, format, rows, columns, real):
    data = Data(train=str(real / name), columns=columns, loss_on="all")
    load = load_preferences if columns == {} and format != "alpaca" else load_demonstrations
    train, held_out = load(data)
    assert (train.reading.format, train.reading.rows, train.reading.skipped) == (format, rows, 0)
    assert len(train) + len(held_out) == rows
    render = Renderer(tiny_tokenizer(), data)
    _, sizes = tokenize_demonstrations(train, render)
    assert min(sizes.completion) >= 1
    found = data_report("demonstrations", train, held_out, render, sizes)
    assert found["leaked"] <= 1
    if columns:
        assert train[0].columns["answer"].splitlines()[-1].startswith("#### ")


def test_prompts_of_verifiable_tasks_keep_their_answer(real):
    train, _ = load_prompts(Data(train=str(real / "gsm8k_test.jsonl.gz"), columns={"prompt": "question"}))
    assert train.reading.format == "prompt"
    assert all("####" in e.columns["answer"] for e in train)
