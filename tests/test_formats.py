"""Every file format into the one shape, every bad row told by file, row and column, and splits by prompt."""

import gzip
import json
import os
from pathlib import Path

import pytest

from lowrank_rlhf.config import Data
from lowrank_rlhf.data import load_demonstrations, load_preferences, load_prompts, read_examples
from lowrank_rlhf.data.formats import FORMATS, detect_format
from lowrank_rlhf.data.loading import data_hash, is_held_out
from lowrank_rlhf.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def write(path, *rows):
    """Rows as the suffix asks: a JSON list or a line each, compressed with .gz; bytes as they are."""
    if isinstance(rows[0], bytes):
        content = rows[0]
    else:
        content = ("\n".join(map(json.dumps, rows)) if ".jsonl" in path.name else json.dumps(rows)).encode()
        content = gzip.compress(content) if path.suffix == ".gz" else content
    path.write_bytes(content)
    return path


def message(action, *arguments, **settings):
    with pytest.raises(UserError) as caught:
        action(*arguments, **settings)
    return str(caught.value)


# Formats

HI, A, B = [user("Hi")], bot("A"), bot("B")
SYSTEM = {"role": "system", "content": "Be terse."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant: Yes, please."
TEA = [bot("Hello"), user("Tea?"), bot("Yes, please.")]
ODD = "Human: what?\n\nI said: no."


def preference(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("format", "row", "prompt", "chosen", "rejected"),
    [
        ("alpaca", {"instruction": "Add.", "output": "3"}, [user("Add.")], [bot("3")], None),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, [user("Add.")], [bot("3")], None),
        ("alpaca", {"instruction": "Add.", "input": None, "output": "3"}, [user("Add.")], [bot("3")], None),
        ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n\n1 2")], [bot("3")], None),
        ("completion", {"prompt": "Hi", "completion": "A"}, HI, [A], None),
        ("completion", {"prompt": [SYSTEM, *HI], "completion": [{**A, "id": 1}]}, [SYSTEM, *HI], [A], None),
        ("preference", preference("Hi", "A", "B"), HI, [A], [B]),
        ("preference", preference("Hi", "", "B"), HI, [bot("")], [B]),
        ("preference", preference(HI, [A], "B"), HI, [A], [B]),
        ("preference", preference("Hi", [*HI, A], [*HI, B]), HI, [A], [B]),
        ("hh", hh("\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Hi\n\nAssistant:"), HI, [A], [bot("")]),
        ("hh", hh(HH, HH.replace("Yes, please.", ODD)), [*HI, *TEA[:2]], TEA[2:], [bot(ODD)]),
        # They differ from the first answer on: all that follows is compared
        ("hh", hh(HH, "\n\nHuman: Hi\n\nAssistant: No."), HI, TEA, [bot("No.")]),
        # They differ at a human turn: the prompt ends at the human turn before
        ("hh", hh(HH, HH.replace("Tea?", "Milk?")), HI, TEA, [TEA[0], user("Milk?"), TEA[2]]),
        # The answers are the same: the last is still what is compared, and no part of the prompt
        ("hh", hh(HH, HH), [*HI, *TEA[:2]], TEA[2:], TEA[2:]),
        ("prompt", {"prompt": "Hi"}, HI, None, None),
        ("prompt", {"prompt": [*HI, *TEA[:2]]}, [*HI, *TEA[:2]], None, None),
    ],
)
def test_a_row_of_each_format_detected_and_by_name(format, row, prompt, chosen, rejected, tmp_path):
    path = write(tmp_path / "data.jsonl", {**row, "answer": 7})
    (example,) = read_examples(path)
    assert (example.prompt, example.chosen, example.rejected) == (prompt, chosen, rejected)
    assert (example.columns, example.where) == ({"answer": 7}, f"{path}, row 1")
    assert read_examples(path, format=format) == [example]


def test_a_format_can_be_forced_and_an_unknown_one_lists_the_known(tmp_path):
    path = write(tmp_path / "data.jsonl", preference("Hi", "A", "B"))
    (example,) = read_examples(path, format="prompt")
    assert (example.chosen, example.columns) == (None, {"chosen": "A", "rejected": "B"})
    told = message(read_examples, path, format="csv")
    assert told.startswith("data.format: 'csv' is not known; there are: sharegpt_preference, preference, ")
    rows = {name: dict.fromkeys(format.columns, {} if name == "oasst" else "") for name, format in FORMATS.items()}
    assert {name: detect_format(row, "") for name, row in rows.items()} == {name: name for name in FORMATS}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz"])
def test_rows_are_numbered_from_1_in_every_kind_of_file(name, tmp_path):
    path = write(tmp_path / name, {"prompt": "é"}, {"prompt": "b"}, {"prompt": "c"})
    examples = read_examples(path)
    assert [e.prompt[0]["content"] for e in examples] == ["é", "b", "c"]
    assert [e.where for e in examples] == [f"{path}, row {i}" for i in (1, 2, 3)]
    assert read_examples(path, max_rows=2) == examples[:2]
    assert read_examples(path, max_rows=9) == examples


def test_empty_lines_are_skipped_and_rows_keep_their_line_number(tmp_path):
    path = write(tmp_path / "data.jsonl", b'{"prompt": "a"}\n\n   \n{"prompt": "b"}\n')
    assert [e.where for e in read_examples(path)] == [f"{path}, row 1", f"{path}, row 4"]


# What does not fit

GOOD = {"prompt": "Hi", "completion": "A"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "expected an object with named columns, got list"),
        ("text", "expected an object with named columns, got str"),
        (None, "expected an object with named columns, got NoneType"),
        ({"prompt": "Hi"}, "column 'completion': expected text, got nothing"),
        ({**GOOD, "prompt": None}, "column 'prompt': expected text, got nothing"),
        ({**GOOD, "prompt": 5}, "column 'prompt': expected text, got int"),
        ({**GOOD, "prompt": {"a": 1}}, "column 'prompt': expected text, got dict"),
        ({**GOOD, "prompt": " \n"}, "column 'prompt' is empty"),
        ({**GOOD, "completion": ""}, "column 'completion' is empty"),
        ({**GOOD, "prompt": []}, "column 'prompt' is an empty list"),
        ({**GOOD, "prompt": [*HI, {"role": "tool", "content": "x"}]}, "column 'prompt', message 2: expected {'role'"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "column 'prompt', message 1: expected {'role': one of system"),
        ({**GOOD, "completion": ["Hi"]}, "column 'completion', message 1: expected {'role': one of"),
        ({**GOOD, "completion": [bot(5)]}, "column 'completion', message 1: expected {'role': one of"),
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_row_that_does_not_fit_is_told_by_file_row_and_column(name, row, words, tmp_path):
    path = write(tmp_path / name, GOOD, row)
    assert message(read_examples, path).startswith(f"{path}, row 2: {words}")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Hi"}, "columns ['question'] fit no known format (sharegpt_preference: conversations/chosen/"),
        ({"instruction": "", "output": "b"}, "column 'instruction' is empty"),
        ({"instruction": "a", "output": " "}, "column 'output' is empty"),
        ({"instruction": "a", "input": 5, "output": "b"}, "column 'input': expected text, got int"),
        (preference("Hi", "A", None), "column 'rejected': expected text, got nothing"),
        (preference("Hi", [bot(1)], "B"), "column 'chosen', message 1: expected {'role': one of"),
        (hh("plain", HH), "column 'chosen': expected an HH-RLHF dialogue"),
        (hh(HH, "Well.\n\nHuman: a"), "column 'rejected': expected an HH-RLHF dialogue"),
        (hh(HH, ""), "column 'rejected' is empty"),
        (hh(HH, HH.replace("Hi", "Ho")), "the chosen and rejected dialogues do not begin with the"),
        (hh("\n\nAssistant: a", "\n\nAssistant: b"), "the chosen and rejected dialogues do not"),
        (hh("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant: A"), "the chosen and rejected dialogues do not"),
    ],
)
def test_a_first_row_that_does_not_fit_is_told_too(row, words, tmp_path):
    path = write(tmp_path / "data.jsonl", row)
    assert message(read_examples, path).startswith(f"{path}, row 1: {words}")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", b'{"prompt": "a"}\n{"prompt": }\n', ", row 2: not valid JSON: Expecting value at column 12"),
        ("data.json", b'[{"prompt": "a"},\n]', ", line 2: not valid JSON: "),
        ("data.json", b'{"prompt": "a"}', ": a .json file must hold a list of rows; one row a line is .jsonl"),
        ("data.json", b"[]", ": the file has no rows"),
        ("data.jsonl", b"\n", ": the file has no rows"),
        ("data.gz", b"", ": expected a file ending in .json, .jsonl, .csv, "),
        ("data.parquet.gz", b"", ": expected a file ending in .json, .jsonl, .csv, "),
        ("data.jsonl", b'{"prompt": "caf\xe9"}\n', ", row 1: not UTF-8 (invalid continuation byte at byte 16)"),
        ("data.jsonl.gz", b'{"prompt": "a"}\n', ": cannot be read: Not a gzipped file"),
        # These bytes are in the test's name: no time of day, or processes that collect apart disagree about it
        ("data.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9], ": cannot be read: Compressed file ended"),
        ("data.json.gz", gzip.compress(b'[{"prompt": "a"}]', mtime=0)[:-9], ": cannot be read: Compressed file ended"),
        ("data.json", None, ": cannot be read: "),
        ("data.jsonl.gz", None, ": cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_used_is_named(name, content, words, tmp_path):
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    assert message(read_examples, path).startswith(f"{path}{words}")


# Splits


def preferences(path, n=200, repeats=2):
    return write(path, *(preference(f"p{i}", f"good {k}", "bad") for k in range(repeats) for i in range(n)))


def keys(examples):
    return [e.prompt_key for e in examples]


def test_splits_are_by_prompt_and_the_same_in_every_stage(tmp_path):
    path = preferences(tmp_path / "data.jsonl")
    data = Data(train=str(path), eval_fraction=0.3)
    train, held_out = load_preferences(data)
    assert set(keys(train)).isdisjoint(keys(held_out))
    assert sorted(keys(train) + keys(held_out)) == sorted(keys(read_examples(path)))
    assert 35 <= len(set(keys(held_out))) <= 85  # 200 prompts, 30 %: 60 ± 4 standard deviations of 6.5
    for load in (load_demonstrations, load_preferences, load_prompts):
        assert set(keys(load(data)[1])) == set(keys(held_out))
    for part, prompts in zip((train, held_out), load_prompts(data), strict=True):
        assert keys(prompts) == list(dict.fromkeys(keys(part)))  # each once, in its first place


def test_what_is_held_out_depends_on_the_text_alone_and_grows_with_the_fraction():
    """SHA-256 of the empty text begins with e3b0…: e3/256 = 0.887, e4/256 = 0.891."""
    assert (is_held_out("", 0.887), is_held_out("", 0.891)) == (False, True)
    prompts = [str(i) for i in range(300)]
    none, few, half, every = ({p for p in prompts if is_held_out(p, f)} for f in (0.0, 0.1, 0.5, 1.0))
    assert none < few < half < every
    assert (len(none), len(every)) == (0, 300)


def test_an_eval_file_is_the_held_out_part_and_no_fraction_holds_out_nothing(tmp_path):
    train, held_out = preferences(tmp_path / "a.jsonl", n=20), preferences(tmp_path / "b.json", n=5, repeats=1)
    for settings, sizes in (
        ({"eval": str(held_out)}, [40, 5]),
        ({"eval": str(held_out), "max_rows": 3}, [3, 3]),
        ({"eval_fraction": 0}, [40, 0]),
    ):
        assert [len(part) for part in load_preferences(Data(train=str(train), **settings))] == sizes


@pytest.mark.parametrize("n", [1, 5])
def test_one_prompt_cannot_be_split(n, tmp_path):
    path = write(tmp_path / "data.jsonl", *[{"prompt": "a"}] * n)
    told = message(load_prompts, Data(train=str(path)))
    assert told.startswith(
        f"{path}: {n} rows leave {n} for training and 0 for evaluation; give more rows, another data.e"
    )


@pytest.mark.parametrize(
    ("load", "row", "words"),
    [
        (load_demonstrations, {"prompt": "Hi"}, "a demonstration needs an answer that is not empty"),
        (load_demonstrations, preference("Hi", " ", "B"), "a demonstration needs an answer that is not empty"),
        (load_demonstrations, {"prompt": "Hi", "completion": [bot("")]}, "a demonstration needs an answer that is"),
        (load_preferences, {"prompt": "Hi"}, "a preference needs a chosen and a rejected answer"),
        (load_preferences, GOOD, "a preference needs a chosen and a rejected answer"),
        (load_preferences, preference("Hi", "A", [A]), "the chosen and the rejected answer are the same"),
    ],
)
def test_a_row_that_a_stage_cannot_use_is_named_on_both_sides(load, row, words, tmp_path):
    bad, good = write(tmp_path / "bad.jsonl", row), preferences(tmp_path / "good.jsonl", n=3)
    for train, held_out in ((bad, good), (good, bad)):
        assert message(load, Data(train=str(train), eval=str(held_out))).startswith(f"{bad}, row 1: {words}")


def test_the_data_hash_is_of_the_bytes_of_both_files(tmp_path):
    a, b, copy = (str(write(tmp_path / f"{i}.jsonl", {"prompt": text})) for i, text in enumerate(("a", "b", "a")))
    hashes = [data_hash(Data(train=train, eval=held_out)) for train, held_out in ((a, None), (b, None), (a, b))]
    assert len(set(hashes)) == 3
    assert data_hash(Data(train=copy)) == hashes[0]


# Real files


@pytest.fixture
def real():
    if not os.environ.get("LOWRANK_RLHF_DATA"):
        pytest.skip("LOWRANK_RLHF_DATA is not set: no real data here")
    return Path(os.environ["LOWRANK_RLHF_DATA"])


def test_every_dialogue_of_hh_rlhf_parses_and_comes_back_word_for_word(real):
    examples = read_examples(real / "hh_harmless_train.jsonl.gz")
    assert len(examples) == 1800
    names = {"user": "Human", "assistant": "Assistant"}
    with gzip.open(real / "hh_harmless_train.jsonl.gz", "rt", encoding="utf-8") as file:
        for e, line in zip(examples, file, strict=True):
            assert e.prompt[-1]["role"] == "user", e.where
            for side, answer in (("chosen", e.chosen), ("rejected", e.rejected)):
                assert answer[0]["role"] == "assistant", e.where
                text = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in e.prompt + answer)
                assert text.split() == json.loads(line)[side].split(), e.where


def test_every_row_of_alpaca_parses(real):
    rows = json.loads((real / "alpaca_en.json").read_text(encoding="utf-8"))
    examples = read_examples(real / "alpaca_en.json")
    assert len(examples) == 999
    for e, row in zip(examples, rows, strict=True):
        assert e.prompt == [user("\n\n".join(filter(None, (row["instruction"], row["input"]))))], e.where
        assert e.chosen == [bot(row["output"])], e.where


def test_rows_behind_max_rows_are_not_read(tmp_path):
    path = write(tmp_path / "data.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\nnot JSON\n')
    assert len(read_examples(path, max_rows=2)) == 2


def test_a_damaged_gz_is_named(tmp_path):
    packed = bytearray(gzip.compress(b'{"prompt": "a"}\n'))
    packed[10] = 0b111  # the reserved block type
    path = write(tmp_path / "data.jsonl.gz", bytes(packed))
    assert message(read_examples, path).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize(
    ("column", "row"),
    [
        ("prompt", {**GOOD, "prompt": [user(" ")]}),
        ("chosen", preference(HI, HI, "B")),
        ("chosen", preference(HI, [A, user("B")], "B")),
    ],
)
def test_a_prompt_says_something_and_an_answer_ends_with_the_assistant(column, row, tmp_path):
    path = write(tmp_path / "data.jsonl", row)
    assert message(read_examples, path).startswith(f"{path}, row 1: column '{column}'")
