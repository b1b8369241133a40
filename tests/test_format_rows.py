"""Three hand-written rows of every format, through a file and back: nothing is lost, moved or invented."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from lowrank_rlhf.config import Data
from lowrank_rlhf.data import load_demonstrations, load_preferences, load_prompts, read_examples
from lowrank_rlhf.data.files import load_hub
from lowrank_rlhf.data.formats import FORMATS
from lowrank_rlhf.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def said(speaker, text):
    return {"from": speaker, "value": text}


def node(role, text, *replies, **fields):
    return {"role": role, "text": text, "replies": list(replies), **fields}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


HH = "\n\nHuman: {}\n\nAssistant: {}"

# name -> three rows, and what each says: (prompt, chosen, rejected)
ROWS = {
    "messages": [
        ({"messages": [user("Hi"), bot("Hello")]}, [user("Hi")], [bot("Hello")], None),
        (
            {"messages": [system("Be brief."), user("1+1?"), bot("2"), user("2+2?"), bot("4")], "id": 7},
            [system("Be brief."), user("1+1?"), bot("2"), user("2+2?")],
            [bot("4")],
            None,
        ),
        ({"messages": [user("Who asks?")]}, [user("Who asks?")], None, None),
    ],
    "flan": [
        ({"inputs": "Name a colour.", "targets": "Blue"}, [user("Name a colour.")], [bot("Blue")], None),
        ({"inputs": "Größe?", "targets": " 5 m\n"}, [user("Größe?")], [bot(" 5 m\n")], None),
        ({"inputs": "a", "targets": "b", "task": "x"}, [user("a")], [bot("b")], None),
    ],
    "oasst": [
        (
            {"prompt": node("prompter", "Why?", node("assistant", "No.", rank=1), node("assistant", "So.", rank=0))},
            [user("Why?")],
            [bot("So.")],
            None,
        ),
        (
            {
                "prompt": node(
                    "prompter",
                    "Hi",
                    node("assistant", "Spam", rank=0, deleted=True),
                    node("assistant", "Yo", node("prompter", "Tea?", node("assistant", "Please.")), rank=1),
                    node("assistant", "Later"),
                )
            },
            [user("Hi"), bot("Yo"), user("Tea?")],
            [bot("Please.")],
            None,
        ),
        (  # the last question has no reply: the demonstration ends before it
            {"prompt": node("prompter", "A", node("assistant", "B", node("prompter", "C")), message_id="m")},
            [user("A")],
            [bot("B")],
            None,
        ),
    ],
    "completion": [
        ({"prompt": "Hi", "completion": "Hello"}, [user("Hi")], [bot("Hello")], None),
        (
            {"prompt": [system("S"), user("Hi")], "completion": [bot("Ho")]},
            [system("S"), user("Hi")],
            [bot("Ho")],
            None,
        ),
        ({"prompt": "x", "completion": bot("y"), "answer": "z"}, [user("x")], [bot("y")], None),
    ],
    "unpaired": [  # chosen where the label is true, rejected where it is false
        ({"prompt": "Hi", "completion": "Hello", "label": True}, [user("Hi")], [bot("Hello")], None),
        ({"prompt": "Hi", "completion": "Ha", "label": 0, "id": 4}, [user("Hi")], None, [bot("Ha")]),
        ({"prompt": [user("x")], "completion": [bot("")], "label": "FALSE"}, [user("x")], None, [bot("")]),
    ],
    "alpaca": [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n\n1 2")], [bot("3")], None),
        ({"instruction": "Wave.", "input": "", "output": "o/"}, [user("Wave.")], [bot("o/")], None),
        ({"instruction": "Stop.", "output": "Ok"}, [user("Stop.")], [bot("Ok")], None),
    ],
    "instruction": [
        ({"instruction": "Wave.", "response": "o/"}, [user("Wave.")], [bot("o/")], None),
        (
            {"instruction": "Sum up.", "context": "Rain.", "response": "Wet"},
            [user("Sum up.\n\nRain.")],
            [bot("Wet")],
            None,
        ),
        ({"instruction": "Go.", "context": None, "response": "Gone"}, [user("Go.")], [bot("Gone")], None),
    ],
    "sharegpt": [
        ({"conversations": [said("human", "Hi"), said("gpt", "Hey")]}, [user("Hi")], [bot("Hey")], None),
        (
            {
                "conversations": [said("human", "a"), said("gpt", "b"), said("human", "c"), said("gpt", "d")],
                "system": "S",
            },
            [system("S"), user("a"), bot("b"), user("c")],
            [bot("d")],
            None,
        ),
        (
            {"conversations": [said("system", "S"), said("user", "a"), said("assistant", "b")]},
            [system("S"), user("a")],
            [bot("b")],
            None,
        ),
    ],
    "preference": [
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "What"}, [user("Hi")], [bot("Hello!")], [bot("What")]),
        (
            {"prompt": [user("Hi")], "chosen": [user("Hi"), bot("A")], "rejected": [user("Hi"), bot("B")], "margin": 2},
            [user("Hi")],
            [bot("A")],
            [bot("B")],
        ),
        ({"prompt": "Hi", "chosen": "A", "rejected": ""}, [user("Hi")], [bot("A")], [bot("")]),
    ],
    "hh": [
        (
            {"chosen": HH.format("Hi", "Hello"), "rejected": HH.format("Hi", "Go away")},
            [user("Hi")],
            [bot("Hello")],
            [bot("Go away")],
        ),
        (
            {
                "chosen": HH.format("Hi", "Hello") + HH.format("Tea?", "Yes"),
                "rejected": HH.format("Hi", "Hello") + HH.format("Tea?", "No"),
            },
            [user("Hi"), bot("Hello"), user("Tea?")],
            [bot("Yes")],
            [bot("No")],
        ),
        (
            {"chosen": [user("Hi"), bot("A")], "rejected": [user("Hi"), bot("B")]},
            [user("Hi")],
            [bot("A")],
            [bot("B")],
        ),
    ],
    "winner_loser": [
        ({"prompt": "Hi", "winner": "A", "loser": "B"}, [user("Hi")], [bot("A")], [bot("B")]),
        ({"prompt": [user("Hi")], "winner": [bot("A")], "loser": bot("B")}, [user("Hi")], [bot("A")], [bot("B")]),
        ({"prompt": "Hé", "winner": "C", "loser": "D", "by": "x"}, [user("Hé")], [bot("C")], [bot("D")]),
    ],
    "labelled_pair": [
        (
            {
                "prompt": "Hi",
                "response_a": "One",
                "response_b": "Two",
                "preferred_response": "response_b",
                "margin": 0.5,
            },
            [user("Hi")],
            [bot("Two")],
            [bot("One")],
        ),
        (
            {"prompt": "Hi", "response_a": "One", "response_b": "Two", "preferred_response": "A", "margin": None},
            [user("Hi")],
            [bot("One")],
            [bot("Two")],
        ),
        (
            {"prompt": "Hi", "response_a": "One", "response_b": "Two", "preferred_response": "Two"},
            [user("Hi")],
            [bot("Two")],
            [bot("One")],
        ),
    ],
    "sharegpt_preference": [
        (
            {"conversations": [said("human", "Hi")], "chosen": said("gpt", "A"), "rejected": said("gpt", "B")},
            [user("Hi")],
            [bot("A")],
            [bot("B")],
        ),
        (
            {
                "conversations": [said("system", "S"), said("human", "a"), said("gpt", "b"), said("human", "c")],
                "chosen": said("gpt", "d"),
                "rejected": said("gpt", "e"),
            },
            [system("S"), user("a"), bot("b"), user("c")],
            [bot("d")],
            [bot("e")],
        ),
        (
            {"conversations": [said("human", "Hi")], "chosen": "A", "rejected": "B", "system": "S", "margin": "1.5"},
            [system("S"), user("Hi")],
            [bot("A")],
            [bot("B")],
        ),
    ],
    "ranking": [  # as demonstrations: the best-ranked response
        ({"prompt": "Hi", "responses": ["x", "y", "z"], "ranking": [2, 1, 3]}, [user("Hi")], [bot("y")], None),
        ({"prompt": "Ho", "responses": [[bot("x")], "y"], "ranking": [0, 1]}, [user("Ho")], [bot("x")], None),
        ({"prompt": [user("He")], "responses": ["p", "q"], "ranking": [2, 1], "id": 3}, [user("He")], [bot("q")], None),
    ],
    "prompt": [
        ({"prompt": "Hi"}, [user("Hi")], None, None),
        ({"prompt": [user("a"), bot("b"), user("c")]}, [user("a"), bot("b"), user("c")], None, None),
        ({"prompt": "6·7?", "answer": "42"}, [user("6·7?")], None, None),
    ],
}


def test_every_format_has_three_rows():
    assert {name: len(rows) for name, rows in ROWS.items()} == dict.fromkeys(FORMATS, 3)


@pytest.mark.parametrize("name", ROWS)
def test_three_rows_come_back_as_written(name, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [row for row, *_ in ROWS[name]])
    examples = read_examples(path)
    assert [(e.prompt, e.chosen, e.rejected) for e in examples] == [tuple(said) for _, *said in ROWS[name]]
    used = {*FORMATS[name].columns, *FORMATS[name].optional}
    for i, (e, (row, *_)) in enumerate(zip(examples, ROWS[name], strict=True), start=1):
        assert e.where == f"{path}, row {i}"
        assert e.columns == {column: value for column, value in row.items() if column not in used}
        assert (e.weight, e.margin) == (1.0, float(row["margin"]) if row.get("margin") else None)
    assert read_examples(path, format=name) == examples


def csv_cell(value):
    text = json.dumps(value) if isinstance(value, list) else "" if value is None else str(value)
    return '"' + text.replace('"', '""') + '"'


def write_csv(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(csv_cell(row.get(name)) for name in names) for row in rows]
    content = ("\ufeff" + ",".join(names) + "\r\n" + "\r\n".join(lines) + "\r\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# Rows whose columns have one type each, as tables need
TABLES = {
    "flan": slice(0, 3),
    "alpaca": slice(0, 2),
    "instruction": slice(0, 3),
    "winner_loser": slice(2, 3),
    "labelled_pair": slice(0, 3),
    "prompt": slice(2, 3),
    "ranking": slice(0, 1),
    "messages": slice(0, 2),
    "sharegpt": slice(0, 2),
    "hh": slice(0, 2),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "file", ["data.csv", "data.csv.gz", "data.parquet", "data.json", "data.json.gz", "data.jsonl.gz"]
)
def test_the_kind_of_file_changes_nothing(file, name, tmp_path):
    rows = [row for row, *_ in ROWS[name][TABLES[name]]]
    names = dict.fromkeys(column for row in rows for column in row)
    rows = [{column: row.get(column) for column in names} for row in rows]
    path = tmp_path / file
    if ".csv" in file:
        write_csv(path, rows)
    elif file.endswith(".parquet"):
        write_parquet(path, rows)
    else:
        content = (json.dumps(rows) if ".json." in f"{file}." else "\n".join(map(json.dumps, rows))).encode()
        path.write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    expected = read_examples(jsonl(tmp_path / "plain.jsonl", rows))
    for e, other in zip(read_examples(path), expected, strict=True):
        assert (e.prompt, e.chosen, e.rejected, e.margin) == (other.prompt, other.chosen, other.rejected, other.margin)
        assert e.where.endswith(f"{file}, row {other.where[-1]}")


def test_csv_cells_hold_quotes_commas_and_lines(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes('prompt,completion\n"a, ""b""\nc",d\n\né,"\n\n f"\n'.encode())
    examples = read_examples(path)
    assert [(e.prompt, e.chosen) for e in examples] == [
        ([user('a, "b"\nc')], [bot("d")]),
        ([user("é")], [bot("\n\n f")]),
    ]


# Ranked rows as pairs


def ranked(tmp_path, *rows):
    return load_preferences(Data(train=str(jsonl(tmp_path / "data.jsonl", rows)), eval_fraction=0))[0]


def test_a_ranked_row_is_all_its_pairs_and_counts_once(tmp_path):
    """Ranks 2, 1, 3 of x, y, z: y beats x and z, x beats z; three pairs of weight 1/3."""
    pairs = ranked(
        tmp_path,
        {"prompt": "Hi", "responses": ["x", "y", "z"], "ranking": [2, 1, 3], "id": 5},
        {"prompt": "Ho", "responses": ["x", "y"], "ranking": [0, 1], "id": 6},
        {"prompt": "He", "responses": ["p", "q", "r", "s"], "ranking": [1, 2, 2, 3], "id": 7},
    )
    said = [(e.prompt[0]["content"], e.chosen[0]["content"] + e.rejected[0]["content"], e.columns["id"]) for e in pairs]
    assert said == [
        *[("Hi", pair, 5) for pair in ("yx", "yz", "xz")],
        ("Ho", "xy", 6),
        *[("He", pair, 7) for pair in ("pq", "pr", "ps", "qs", "rs")],
    ]
    weights: dict[str, float] = {}
    for e in pairs:
        weights[e.where] = weights.get(e.where, 0) + e.weight
    assert list(weights.values()) == pytest.approx([1, 1, 1])


def test_ranks_of_an_oasst_tree_are_pairs_at_every_place_of_its_best_path(tmp_path):
    """First place: ranks 0, 1, 2 make three pairs; second place: ranks 0, 1 make one; an unranked reply makes none."""
    second = node("prompter", "More", node("assistant", "m1", rank=1), node("assistant", "m0", rank=0))
    tree = node(
        "prompter",
        "Hi",
        node("assistant", "b", rank=1),
        node("assistant", "a", second, rank=0),
        node("assistant", "c", rank=2),
        node("assistant", "unranked"),
    )
    pairs = ranked(tmp_path, {"prompt": tree})
    assert [(e.chosen[0]["content"], e.rejected[0]["content"], e.weight) for e in pairs] == [
        *[("a", "b", 1 / 3), ("a", "c", 1 / 3), ("b", "c", 1 / 3)],
        ("m0", "m1", 1.0),
    ]
    assert pairs[3].prompt == [user("Hi"), bot("a"), user("More")]


# Columns of other names


def test_a_column_map_renames_and_reward_functions_find_both_names(tmp_path):
    path = jsonl(
        tmp_path / "data.jsonl", [{"question": f"{i}+1?", "answer": f"#### {i + 1}", "n": i} for i in range(3)]
    )
    data = Data(train=str(path), eval_fraction=0, columns={"prompt": "question", "completion": "answer"})
    examples, _ = load_demonstrations(data)
    assert examples.reading.format == "completion"
    assert (examples[1].prompt, examples[1].chosen) == ([user("1+1?")], [bot("#### 2")])
    assert examples[1].columns == {"question": "1+1?", "answer": "#### 2", "n": 1}
    prompts, _ = load_prompts(Data(train=str(path), eval_fraction=0, columns={"prompt": "question"}))
    assert (prompts.reading.format, prompts[2].columns["answer"]) == ("prompt", "#### 3")


def test_a_column_map_wins_over_columns_that_look_like_another_format(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"prompt": "old", "instruction": "new", "output": "o"}])
    data = Data(train=str(path), eval_fraction=0, columns={"prompt": "instruction", "completion": "output"})
    examples, _ = load_demonstrations(data)
    assert (examples.reading.format, examples[0].prompt) == ("completion", [user("new")])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"promt": "question"},
            "data.columns.promt: no format has this column; did you mean prompt? (write ours: theirs)",
        ),
        (
            {"prompt": "qestion"},
            "{path}, row 1: there is no column 'qestion', which data.columns.prompt names; its col",
        ),
    ],
)
def test_a_wrong_column_map_is_told(columns, words, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError) as caught:
        load_prompts(Data(train=str(path), columns=columns))
    assert str(caught.value).startswith(words.format(path=path))


# Skipping


def test_skipped_rows_are_counted_and_the_first_reasons_kept(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "" if i % 3 == 0 else "ok"} for i in range(30)]
    path = jsonl(tmp_path / "data.jsonl", rows)
    path.write_text("not JSON\n" + path.read_text() + '{"prompt": "\\ud800", "completion": "x"}\n', encoding="utf-8")
    examples, _ = load_demonstrations(Data(train=str(path), eval_fraction=0, on_bad_row="skip"))
    reading = examples.reading
    assert (len(examples), reading.rows, reading.skipped) == (20, 32, 12)
    assert reading.reasons[0] == "row 1: not valid JSON: Expecting value at column 1"
    assert reading.reasons[1] == "row 2: column 'completion' is empty"
    assert len(reading.reasons) == 5


def test_a_source_of_which_no_row_fits_is_refused_although_rows_are_skipped(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UserError, match=r"none of its 2 rows fits; the first: row 1: a demonstration needs an answer"):
        load_demonstrations(Data(train=str(path), on_bad_row="skip"))


def test_the_hub_is_asked_by_name_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"question": ["a", "b"], "answer": ["c", "d"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name/main", "owner/name:test", "owner/na.me/main:train[:10%]"):
        data = Data(train=source, eval_fraction=0, columns={"prompt": "question"})
        prompts, _ = load_prompts(data)
        assert [e.where for e in prompts] == [f"{source}, row 1", f"{source}, row 2"]
    assert asked[::1] == [
        *[("owner/name", None, "train"), ("owner/name", "main", "train"), ("owner/name", None, "test")],
        ("owner/na.me", "main", "train[:10%]"),
    ]


@pytest.fixture
def in_folders(tmp_path, monkeypatch):
    """A repository of HH-RLHF's layout, read by datasets itself: parts in folders, which its card does not name."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for part in ("harmless-base", "helpful-base"):
        (tmp_path / "owner/name" / part).mkdir(parents=True)
        for split in ("train", "test"):
            with gzip.open(f"owner/name/{part}/{split}.jsonl.gz", "wt") as file:
                file.write(json.dumps({"prompt": f"{part} {split}"}) + "\n")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("owner/name", ["harmless-base train", "helpful-base train"]),
        ("owner/name/helpful-base", ["helpful-base train"]),
        ("owner/name/helpful-base:test[:1]", ["helpful-base test"]),
    ],
)
def test_a_part_of_a_hub_dataset_may_be_a_folder(source, found, in_folders):
    assert [row["prompt"] for row in load_hub(source)] == found


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("owner/name/unhelpful", "BuilderConfig 'unhelpful' not found"),
        ("owner/name/helpful-base:dev", 'Unknown split "dev"'),
    ],
)
def test_a_part_or_split_of_a_hub_dataset_that_is_not_there_is_told(source, reason, in_folders):
    with pytest.raises(UserError, match=f"^{source}: there is no such file, and no hub dataset .*: {reason}"):
        load_hub(source)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import datasets

    def load_dataset(*arguments, **settings):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^owner/name: there is no such file, and no hub dataset .* on the Hub$"):
        read_examples("owner/name")
