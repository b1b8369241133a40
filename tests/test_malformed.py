"""What is wrong with a file, a row or a recipe is one clear line that names it, and leaves no run behind."""

import copy
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from test_format_rows import ROWS, bot, jsonl, node, said, user

from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.cli import main
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import Renderer, load_demonstrations, load_preferences, load_prompts
from lowrank_rlhf.errors import UserError

MB = "x" * 2**20
GOOD = {"prompt": "Hi", "completion": "A"}
GOOD_PAIR = {"prompt": "Hi", "chosen": "A", "rejected": "B"}


def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def lines(*rows):
    return "\n".join(map(json.dumps, rows)).encode()


# name of the file, its bytes, what the message says behind the file's path
FILES = [
    ("missing.jsonl", None, ": cannot be read: "),
    ("missing", None, ": expected a file ending in .json, .jsonl, "),
    ("notes.txt", b"Hi", ": expected a file ending in .json, .jsonl, "),
    ("table.xlsx", b"PK", ": expected a file ending in .json, .jsonl, "),
    ("empty.jsonl", b"", ": the file has no rows"),
    ("blank.jsonl", b"\n  \n\n", ": the file has no rows"),
    ("empty.json", b"", ", line 1: not valid JSON: Expecting value"),
    ("none.json", b"[]", ": the file has no rows"),
    ("open.json", b'[{"prompt": "a", "completion": "b"},', ", line 1: not valid JSON: "),
    ("lines.json", lines(GOOD, GOOD), ", line 2: not valid JSON: Extra data; one row a line is .jsonl"),
    ("object.json", b'{"data": []}', ": a .json file must hold a list of rows"),
    ("latin.json", '[{"prompt": "é", "completion": "b"}]'.encode("latin-1"), ": not UTF-8 ("),
    ("deep.json", b"[" * 100_000, ": not usable JSON: "),
    ("cut.jsonl", lines(GOOD) + b'\n{"prompt": "a", "compl', ", row 2: not valid JSON: "),
    ("list.jsonl", b"[" + lines(GOOD) + b"]", ", row 1: expected an object with named columns, got list"),
    ("scalar.jsonl", lines(GOOD) + b"\n7", ", row 2: expected an object with named columns, got int"),
    ("latin.jsonl", '{"prompt": "é"}'.encode("latin-1"), ", row 1: not UTF-8 (invalid continuation byte at byte 13)"),
    ("utf16.jsonl", json.dumps(GOOD).encode("utf-16"), ", row 1: not UTF-8 (invalid start byte at byte 1)"),
    ("deep.jsonl", b'{"prompt": ' + b"[" * 100_000, ", row 1: not usable JSON: "),
    ("digits.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", ", row 1: not usable JSON: "),
    ("plain.jsonl.gz", lines(GOOD), ": cannot be read: Not a gzipped file"),
    ("cut.jsonl.gz", gzip.compress(lines(GOOD))[:-9], ": cannot be read: Compressed file ended"),
    ("cut.csv.gz", gzip.compress(b"prompt,completion\na,b\n")[:-9], ": cannot be read: Compressed file ended"),
    ("empty.csv", b"", ": the file has no rows"),
    ("header.csv", b"prompt,completion\n", ": the file has no rows"),
    ("twice.csv", b"prompt,prompt\na,b\n", ", line 1: the header has the column 'prompt' twice"),
    ("ragged.csv", b"prompt,completion\na,b\nc\n", ", row 2: expected 2 cells as in the header, got 1"),
    ("long.csv", b"prompt,completion\na,b,c\n", ", row 1: expected 2 cells as in the header, got 3"),
    ("quote.csv", b'prompt,completion\na,b\nc,"d\n', ", row 2: not valid CSV near line 3: unexpected end of data"),
    ("latin.csv", "prompt,completion\na,é\n".encode("latin-1"), ", row 1: column 'completion': character 1 is"),
    ("semicolon.csv", b"prompt;completion\na;b\n", ", row 1: columns ['prompt;completion'] fit no known format"),
    ("gap.csv", b"prompt,completion\na,\n", ", row 1: column 'completion' is empty"),
    ("junk.parquet", b"not parquet at all", ": cannot be read as Parquet: "),
    ("empty.parquet", b"", ": cannot be read as Parquet: "),
    ("cut.parquet", parquet([GOOD])[:-20], ": cannot be read as Parquet: "),
    ("numbers.parquet", parquet([{"prompt": 1, "completion": 2}]), ", row 1: column 'prompt': expected text, got int"),
    (
        "bytes.parquet",
        parquet([{"prompt": b"a", "completion": "b"}]),
        ", row 1: column 'prompt': expected text, got byt",
    ),
]

# stage, row, what the message says behind file and row
BAD_ROWS = [
    ("sft", {"question": "a", "reply": "b"}, "columns ['question', 'reply'] fit no known format"),
    ("sft", {}, "columns [] fit no known format"),
    ("sft", {MB: 1}, "columns ['xxx"),
    ("sft", {"prompt": "Hi"}, "a demonstration needs an answer that is not empty"),
    ("sft", {**GOOD, "prompt": None}, "column 'prompt': expected text, got nothing"),
    ("sft", {**GOOD, "prompt": 5}, "column 'prompt': expected text, got int"),
    ("sft", {**GOOD, "prompt": float("nan")}, "column 'prompt': expected text, got float"),
    ("sft", {**GOOD, "prompt": [1]}, "column 'prompt', message 1: expected {'role': one of"),
    ("sft", {**GOOD, "prompt": []}, "column 'prompt' is an empty list"),
    ("sft", {**GOOD, "prompt": ""}, "column 'prompt' is empty"),
    ("sft", {**GOOD, "prompt": "\ud800 Hi"}, "column 'prompt': character 1 is '\\ud800', half of a surrogate pair"),
    ("sft", {**GOOD, "prompt": [bot("Hi")]}, "column 'prompt': expected a user's message before the answer"),
    ("sft", {**GOOD, "completion": " \n"}, "column 'completion' is empty"),
    ("sft", {**GOOD, "completion": [user("A")]}, "column 'completion': expected an answer that begins and ends with"),
    ("sft", {"messages": []}, "column 'messages' is an empty list"),
    ("sft", {"messages": MB}, "column 'messages': expected a list, got str"),
    ("sft", {"messages": [user("Hi"), {"content": "A"}]}, "column 'messages', message 2: expected {'role': one of"),
    ("sft", {"messages": [{"role": MB, "content": "A"}]}, "column 'messages', message 1: expected {'role': one of"),
    (
        "sft",
        {"messages": [user("Hi"), {"role": "tool", "content": "A"}]},
        "column 'messages', message 2: expected {'role'",
    ),
    ("sft", {"messages": [user("Hi"), bot(["A"])]}, "column 'messages', message 2: expected {'role': one of"),
    ("sft", {"messages": [user("Hi"), bot("A\udfff")]}, "column 'messages', message 2: character 2 is '\\udfff'"),
    ("sft", {"messages": [bot("A")]}, "column 'messages': expected a user's message before the answer"),
    ("sft", {"messages": [user("Hi"), bot("")]}, "a demonstration needs an answer that is not empty"),
    ("sft", {"conversations": [said("robot", "Hi")]}, "column 'conversations', message 1: expected {'role': one of"),
    ("sft", {"conversations": [said("human", None)]}, "column 'conversations', message 1: expected {'role': one of"),
    ("sft", {"conversations": {"from": "human"}}, "column 'conversations': expected a list, got dict"),
    ("sft", {"inputs": "a", "targets": None}, "column 'targets': expected text, got nothing"),
    ("sft", {"instruction": "a", "input": 5, "output": "b"}, "column 'input': expected text, got int"),
    ("sft", {"instruction": ["a"], "response": "b"}, "column 'instruction': expected text, got list"),
    ("sft", {"prompt": node("assistant", "Hi")}, "column 'prompt', turn 1: expected {'role': 'prompter', "),
    ("sft", {"prompt": node("prompter", None)}, "column 'prompt', turn 1, 'text': expected text, got nothing"),
    (
        "sft",
        {"prompt": {**node("prompter", "Hi"), "replies": "x"}},
        "column 'prompt', turn 1: expected 'replies' to be a l",
    ),
    (
        "sft",
        {"prompt": node("prompter", "Hi", 7)},
        "column 'prompt', turn 1, one of its replies: expected {'role': 'assi",
    ),
    (
        "sft",
        {"prompt": node("prompter", "Hi", node("assistant", "A", rank="1"))},
        "column 'prompt', turn 1, one of its rep",
    ),
    ("sft", {**GOOD, "label": "maybe"}, "column 'label': expected true or false (or 1 or 0), got 'maybe'; where it"),
    ("sft", {**GOOD, "label": None}, "column 'label': expected true or false (or 1 or 0), got None"),
    ("sft", {**GOOD, "label": 2}, "column 'label': expected true or false (or 1 or 0), got 2"),
    ("sft", {**GOOD, "label": False}, "a demonstration needs an answer that was liked, the label of this one is false"),
    ("reward", {**GOOD, "label": True}, "a preference needs a chosen and a rejected answer"),
    ("reward", GOOD, "a preference needs a chosen and a rejected answer"),
    ("reward", {"prompt": "Hi", "chosen": "A", "rejected": "A"}, "the chosen and the rejected answer are the same"),
    ("reward", {"prompt": "Hi", "chosen": "A", "rejected": 3}, "column 'rejected': expected text, got int"),
    ("reward", {"prompt": "Hi", "winner": "A", "loser": None}, "column 'loser': expected text, got nothing"),
    ("reward", {**GOOD_PAIR, "margin": -1}, "column 'margin': expected how much better the chosen answer is, got -1"),
    ("reward", {**GOOD_PAIR, "margin": "much"}, "column 'margin': expected a finite number, got 'much'"),
    ("reward", {**GOOD_PAIR, "margin": float("inf")}, "column 'margin': expected a finite number, got inf"),
    ("reward", {"chosen": "A", "rejected": "B"}, "column 'chosen': expected an HH-RLHF dialogue"),
    (
        "reward",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "the chosen and rejected dialogues do not begin with the same human turn",
    ),
    *[
        ("reward", {"prompt": "Hi", "response_a": "A!", "response_b": "B!", "preferred_response": label}, words)
        for label, words in (
            ("c", "column 'preferred_response': expected a, b, response_a, response_b or the text of one"),
            (1, "column 'preferred_response': expected text, got int"),
            (MB, "column 'preferred_response': expected a, b, "),
        )
    ],
    *[
        ("reward", {"prompt": "Hi", "responses": responses, "ranking": ranking}, words)
        for responses, ranking, words in (
            (["A"], [1], "column 'responses': expected 2 or more to compare, got 1"),
            ([], [], "column 'responses' is an empty list"),
            ("AB", [1, 2], "column 'responses': expected a list, got str"),
            (["A", "B"], None, "column 'ranking': expected a list, got nothing"),
            (["A", "B"], [1], "column 'ranking': expected 2 ranks, got 1"),
            (["A", "B"], [1, 3], "column 'ranking': expected ranks from 1 (the best) without gaps"),
            (["A", "B", "C"], [1, 2, 4], "column 'ranking': expected ranks from 1 (the best) without gaps"),
            (["A", "B"], [2, 3], "column 'ranking': expected ranks from 1 (the best) without gaps"),
            (["A", "B"], [-1, 0], "column 'ranking': expected ranks from 1 (the best) without gaps"),
            (["A", "B"], [1.5, 2], "column 'ranking': expected whole numbers, got [1.5, 2]"),
            (["A", "B"], [True, False], "column 'ranking': expected whole numbers, got [True, False]"),
            (["A", "B"], [1, 1], "column 'ranking': all ranks are equal"),
            (["A", 7], [1, 2], "column 'responses[2]': expected text, got int"),
            (["A", "A"], [1, 2], "responses 1 and 2 are the same text with different ranks"),
        )
    ],
    (
        "reward",
        {"prompt": node("prompter", "Hi", node("assistant", "A", rank=0))},
        "column 'prompt': no place of the tree",
    ),
    ("ppo", {"completion": "A"}, "columns ['completion'] fit no known format"),
    ("ppo", {"prompt": [user(" ")]}, "column 'prompt' is empty: its last message says nothing"),
]

# stage, overrides, how the message begins
SETTINGS = [
    ("sft", ["data.format=exel"], "data.format: 'exel' is not known; there are: "),
    ("sft", ["data.columns=[a]"], "recipes/sft.yaml: data.columns: expected a group of keys, each with text, got list"),
    ("sft", ["data.columns={prompt: 3}"], "recipes/sft.yaml: data.columns.prompt: expected text, got number 3"),
    ("sft", ["data.columns.promt=q"], "data.columns.promt: no format has this column; did you mean prompt?"),
    ("sft", ["data.on_bad_row=maybe"], "recipes/sft.yaml: data.on_bad_row: expected one of error, skip"),
    ("sft", ["data.loss_on=both"], "recipes/sft.yaml: data.loss_on: expected one of last, all"),
    ("sft", ["data.max_prompt_tokens=0"], "recipes/sft.yaml: data.max_prompt_tokens: must be at least 1"),
    ("sft", ["data.max_completion_tokens=-5"], "recipes/sft.yaml: data.max_completion_tokens: must be at least 1"),
    ("sft", ["data.max_rows=1"], "recipes/sft.yaml: data.max_rows: must be at least 2"),
    ("sft", ["data.eval_fraction=2"], "recipes/sft.yaml: data.eval_fraction: must be between 0 and 0.9"),
    ("sft", ["data.train="], "recipes/sft.yaml: data.train: expected text, got null"),
    ("sft", ["data.eval=gone.jsonl"], "gone.jsonl: cannot be read: "),
    ("sft", ["data.train=nobody/at-all"], "nobody/at-all: there is no such file, and no hub dataset of that name"),
    ("sft", ["data.colums={}"], "recipes/sft.yaml: data.colums: unknown key; did you mean data.columns?"),
    ("sft", ["run_dir=recipes/sft.yaml/run"], "run_dir: recipes/sft.yaml/run cannot be made, "),
    ("sft", ["data.max_prompt_tokens=4000"], "data.max_prompt_tokens + data.max_completion_tokens: 4016 tokens, but"),
    ("reward", ["data.max_completion_tokens=99999"], "data.max_prompt_tokens + data.max_completion_tokens: 100047"),
    ("ppo", ["data.max_completion_tokens=9999"], "data.max_prompt_tokens + data.max_completion_tokens: 10047 tokens"),
    ("sft", ["train.batch_size=5"], "train.batch_size: 5 is not a multiple of train.micro_batch_size (2)"),
    ("dpo", ["train.batch_size=5"], "train.batch_size: 5 is not a multiple of train.micro_batch_size (2)"),
    ("dpo", ["dpo.label_smoothing=0.1"], "dpo.label_smoothing: sigmoid would ignore it; use one of "),
    ("dpo", ["dpo.loss_type=dpo"], "recipes/dpo.yaml: dpo.loss_type: expected one of sigmoid, sigmoid_norm, hinge"),
    ("orpo", ["orpo.lambda=1"], "recipes/orpo.yaml: orpo.lambda: unknown key; known keys here: beta"),
    ("kto", ["train.micro_batch_size=1"], "train.micro_batch_size: KTO estimates a KL over each micro-batch"),
    (
        "kto",
        ["data.train=recipes/quickstart/data/demonstrations.jsonl"],
        "recipes/quickstart/data/demonstrations.jsonl:",
    ),
    ("ppo", ["train.batch_size=5"], "train.batch_size: 5 prompts must be ppo.minibatches"),
]


def unreachable(name, *arguments, **settings):
    raise ConnectionError(f"Couldn't reach {name!r} on the Hub (LocalEntryNotFoundError)")


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, request):
    """Run a stage that must be refused: the one line it says, with no run left behind."""
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr("datasets.load_dataset", unreachable)

    def refused(stage, *overrides, config=None):
        run = tmp_path / "runs" / "run"
        arguments = [stage, "--config", config or f"recipes/{stage}.yaml", "--tiny", f"run_dir={run}", *overrides]
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert len(err) < 1200
        assert not (tmp_path / "runs").exists()
        return err.removeprefix("error: ").rstrip("\n")

    return refused


def test_there_are_more_than_sixty():
    assert len(FILES) + len(BAD_ROWS) + len(SETTINGS) > 60


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[name for name, *_ in FILES])
def test_a_bad_file_is_told(name, content, words, refused, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refused("sft", f"data.train={path}").startswith(f"{path}{words}")


def test_a_folder_is_no_file(refused, tmp_path):
    (tmp_path / "data.jsonl").mkdir()
    assert refused("sft", f"data.train={tmp_path}/data.jsonl").startswith(f"{tmp_path}/data.jsonl: cannot be read: ")


@pytest.mark.parametrize(
    ("stage", "row", "words"), BAD_ROWS, ids=[f"{i} {w[:40]}" for i, (_, _, w) in enumerate(BAD_ROWS)]
)
def test_a_bad_row_is_told_or_skipped(stage, row, words, refused, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [row])
    assert refused(stage, f"data.train={path}").startswith(f"{path}, row 1: {words}")

    load = {"sft": load_demonstrations, "reward": load_preferences, "ppo": load_prompts}[stage]
    with pytest.raises(UserError) as caught:
        load(Data(train=str(jsonl(path, [row, row])), on_bad_row="skip", eval_fraction=0))
    assert str(caught.value).startswith(f"{path}: none of its 2 rows fits; the first: row 1: {words}")
    good = {**GOOD_PAIR, "completion": "A"}
    examples, _ = load(Data(train=str(jsonl(path, [good, row, good])), on_bad_row="skip", eval_fraction=0))
    assert (examples.reading.rows, examples.reading.skipped) == (3, 1)


def test_an_earlier_run_survives_data_that_is_refused(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    run, path = tmp_path / "run", tmp_path / "data.jsonl"
    arguments = ["sft", "--config", "recipes/sft.yaml", "--tiny", f"run_dir={run}"]
    assert main(arguments) == 0
    before = (run / "run.json").read_bytes()
    path.write_text("not JSON")
    assert main([*arguments, f"data.train={path}", "--overwrite"]) == 2
    assert (run / "run.json").read_bytes() == before
    assert (run / "adapters").is_dir()


@pytest.mark.parametrize(("stage", "overrides", "words"), SETTINGS, ids=[settings[0] for _, settings, _ in SETTINGS])
def test_a_bad_setting_is_told_by_its_key(stage, overrides, words, refused):
    assert refused(stage, *overrides).startswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"data: {train: [}\n", ", line 1: not valid YAML"),
        (b"data:\n\ttrain: x\n", ", line 2: not valid YAML"),
        (b"- data\n", ": a recipe is a mapping of keys to values"),
        (b"data: {train: caf\xe9}\n", ": the recipe cannot be read: "),
        (b"data: {train: x, train: y}\n", ", line 1: train: the key stands here twice"),
        (b"seed: 1\n", ": data.train: missing; the recipe must set it"),
        (b"data: {train: x}\neval: x\n", ": eval: expected a group of keys, got text 'x'"),
        (b"data: {train: x}\nlora: {r: " + b"9" * 5000 + b"}\n", ": not valid YAML: Exceeds the limit"),
        (b"data: {train: x}\n" + b"y" * 300 + b": 1\n", ": yyy"),
        (b"data: {train: x}\n? [a, b]\n: 1\n", ", line 2: not valid YAML"),
        (b"data: " + b"[" * 5000, ": not valid YAML: maximum recursion depth"),
        (b"data: {train: *missing}\n", ", line 1: not valid YAML"),
        (b"data: {train: \x00}\n", ": not valid YAML"),
    ],
)
def test_a_bad_recipe_is_told_with_its_line_or_key(text, words, refused, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    assert refused("sft", config=str(path)).startswith(f"{path}{words}")


# Fuzz

JUNK = [None, "", " ", "x", MB[:5000], "\ud800", "\x00", 0, -1, 3, 0.5, 1e308, float("nan"), float("inf"), True, False]
JUNK += [[], {}, [[]], [None], {"role": "user"}, {"role": [], "content": {}}, [user("Hi")], [bot("")], 2**70, "[1, 2]"]


def places(value, found):
    """Every container of a row, with its keys or indices."""
    if isinstance(value, dict | list) and value:
        found.append(value)
        for item in value.values() if isinstance(value, dict) else value:
            places(item, found)
    return found


def mutated(row, source):
    row = copy.deepcopy(row)
    for _ in range(source.randint(1, 2)):
        if not (containers := places(row, [])):
            break
        container = source.choice(containers)
        key = source.choice(list(container) if isinstance(container, dict) else range(len(container)))
        action = source.randint(0, 3)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(source.choice(container)))
        elif action == 2 and isinstance(container, dict):
            container[source.choice(["prompt", "chosen", "rank", "value", "content", "x"])] = container.pop(key)
        else:
            container[key] = copy.deepcopy(source.choice(JUNK))
    return row


def flipped(line, source):
    """A line of JSON with a few bytes changed."""
    data = bytearray(line)
    for _ in range(source.randint(1, 3)):
        data[source.randrange(len(data))] = source.choice([*b'"{}[],:\\u0d', source.randrange(256)])
    return bytes(data)


def check_valid(example, render):
    for turns in (example.prompt, example.chosen, example.rejected):
        for turn in turns or []:
            assert turn["role"] in ("system", "user", "assistant")
            turn["content"].encode("utf-8")
    assert example.prompt
    assert 0 < example.weight <= 1
    assert render.prompt(example.prompt)[0]
    for answer in filter(None, (example.chosen, example.rejected)):
        assert render.sequence(example.prompt, answer).completion_ids
        assert any(render.demonstration(example.prompt, answer).completion_mask)


def test_two_thousand_mutated_rows_are_refused_or_valid(tmp_path):
    source = random.Random(0)
    render = Renderer(tiny_tokenizer(), Data(train="unused", loss_on="all"))
    rows = [row for rows in ROWS.values() for row, *_ in rows]
    told: list[str] = []
    valid = 0
    path = tmp_path / "data.jsonl"
    for i in range(2000):
        row = source.choice(rows)
        line = json.dumps(mutated(row, source)).encode() if i % 4 else flipped(json.dumps(row).encode(), source)
        path.write_bytes(line)
        load = (load_demonstrations, load_preferences, load_prompts)[i % 3]
        try:
            examples, _ = load(Data(train=str(path), eval_fraction=0))
        except UserError as error:
            told.append(str(error))
        else:
            valid += 1
            for example in examples:
                check_valid(example, render)
    assert [words for words in told if not words.startswith(str(path)) or len(words.encode("utf-8")) > 1200] == []
    assert min(len(told), valid) > 150
