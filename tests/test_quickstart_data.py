"""The project's own data: prompts on one side each, labels that follow the gold rule, files that follow the samples."""

import gzip
import re
import statistics
from pathlib import Path

import pytest

from lowrank_rlhf.config import Data
from lowrank_rlhf.data import load_demonstrations, load_preferences, load_prompts
from recipes.quickstart import make_data
from recipes.quickstart.gold import gold, score
from recipes.quickstart.make_data import DATA, HELD_OUT, files, gold_scores, read_rows, split_prompts

SPLITS = ("train", *HELD_OUT)


@pytest.fixture(scope="module")
def samples():
    """Those that are committed: of the held-out prompts. Train's would double the size of the folder."""
    return {split: read_rows(DATA / f"samples_{split}.jsonl.gz") for split in HELD_OUT}


def plain(prompt):
    """The words alone: two prompts that differ in case or punctuation are one prompt."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def prompts_of(name):
    return {plain(row["prompt"]) for row in read_rows(DATA / name)}


# Prompts


def test_there_are_at_least_400_different_prompts():
    rows = read_rows(DATA / "prompts.jsonl")
    assert len({plain(row["prompt"]) for row in rows}) == len(rows) >= 400


def test_no_template_was_filled_in():
    """No four opening words, and no three closing ones, are shared by more than 2 % of the prompts."""
    words = [plain(row["prompt"]).split() for row in read_rows(DATA / "prompts.jsonl")]
    for part in ([tuple(w[:4]) for w in words], [tuple(w[-3:]) for w in words]):
        assert max(part.count(p) for p in set(part)) <= 0.02 * len(words)


def test_every_must_mention_is_well_formed():
    for row in read_rows(DATA / "prompts.jsonl"):
        assert set(row) == {"prompt", "must_mention"}
        assert 1 <= len(row["must_mention"]) <= 3, row
        for item in row["must_mention"]:
            alternatives = item.split("|")
            assert len(set(alternatives)) == len(alternatives), row
            assert all(re.fullmatch(r"[a-z0-9](?:.*\S)?", a) and a == a.lower() for a in alternatives), row


def test_every_prompt_is_on_one_side(samples):
    sides = {split: prompts_of(f"prompts_{split}.jsonl") for split in SPLITS}
    assert sum(map(len, sides.values())) == len(set().union(*sides.values()))
    assert set().union(*sides.values()) == prompts_of("prompts.jsonl")
    assert len(sides["test"]) >= 100
    for split in SPLITS:
        assert prompts_of(f"preferences_{split}.jsonl") <= sides[split]
    for split, rows in samples.items():
        assert {plain(row["prompt"]) for row in rows} == sides[split]
    assert prompts_of("demonstrations.jsonl") | prompts_of("rankings_train.jsonl") <= sides["train"]


def test_the_side_of_a_prompt_follows_from_the_text_alone():
    rows = read_rows(DATA / "prompts.jsonl")
    split = split_prompts(rows)
    assert split == {name: read_rows(DATA / f"prompts_{name}.jsonl") for name in SPLITS}
    backwards = split_prompts(rows[::-1])
    assert {name: part[::-1] for name, part in backwards.items()} == split


# Samples and the rule


def test_the_rule_leaves_the_base_room_both_ways(samples):
    for rows in samples.values():
        values = [value for row in rows for value in gold_scores(row)]
        assert 0.3 < statistics.fmean(values) < 0.7
        low, high = statistics.quantiles(values, n=10)[0], statistics.quantiles(values, n=10)[-1]
        assert high - low > 0.3


def test_held_out_labels_are_what_the_samples_and_the_rule_give(samples):
    for name, content in files(samples).items():
        there = (DATA / name).read_bytes()
        # Compressed bytes depend on the zlib in use, their content does not
        assert gzip.decompress(there) == gzip.decompress(content) if name.endswith(".gz") else there == content, name


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2e6


# Labels


@pytest.mark.parametrize("split", SPLITS)
def test_preferences_follow_the_rule_but_for_the_flipped(split):
    rows = read_rows(DATA / f"preferences_{split}.jsonl")
    for side in ("chosen", "rejected"):
        texts, items = [row[side] for row in rows], [row["must_mention"] for row in rows]
        assert gold([""] * len(rows), texts, must_mention=items) == [row[f"gold_{side}"] for row in rows]
    flipped = [row.get("flipped", False) for row in rows]
    assert [row["gold_chosen"] < row["gold_rejected"] for row in rows] == flipped
    assert all(row["gold_chosen"] != row["gold_rejected"] for row in rows)
    assert all(("flipped" in row) is (split == "train") for row in rows)
    assert sum(flipped) == (round(len(rows) / 10) if split == "train" else 0)
    assert len({(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in rows}) == len(rows)
    assert len(rows) >= {"train": 1000, "eval": 100, "test": 200}[split]


def test_rankings_follow_the_rule_but_for_the_flipped():
    rows = read_rows(DATA / "rankings_train.jsonl")
    for row in rows:
        assert row["gold"] == gold_scores(row)
        assert sorted(row["ranking"]) == [1, 2, 3, 4]
        best_first = [value for _, value in sorted(zip(row["ranking"], row["gold"], strict=True))]
        assert (best_first == sorted(best_first, reverse=True)) is not row["flipped"]
    assert sum(row["flipped"] for row in rows) == round(len(rows) / 10)
    assert len(rows) >= 100


def test_demonstrations_are_from_the_upper_half_and_leave_room(samples):
    """The median of train's own samples, which are not committed, is within 0.1 of the held-out ones'."""
    items = {row["prompt"]: row["must_mention"] for row in read_rows(DATA / "prompts_train.jsonl")}
    rows = read_rows(DATA / "demonstrations.jsonl")
    assert [row["gold"] for row in rows] == [score(row["completion"], items[row["prompt"]]) for row in rows]
    held_out = [value for split in samples.values() for row in split for value in gold_scores(row)]
    assert min(row["gold"] for row in rows) >= statistics.median(held_out) - 0.1
    mean = statistics.fmean(row["gold"] for row in rows)
    assert statistics.fmean(held_out) + 0.1 < mean < 0.85
    assert len({row["prompt"] for row in rows}) == len(rows) >= 200


# Use


def test_every_loader_reads_its_file():
    def counts(load, train, held_out):
        return [len(e) for e in load(Data(train=str(DATA / train), eval=str(DATA / held_out)))]

    def rows(*names):
        return [len(read_rows(DATA / name)) for name in names]

    names = ("preferences_train.jsonl", "preferences_test.jsonl")
    assert counts(load_preferences, *names) == rows(*names)
    names = ("prompts_train.jsonl", "prompts_eval.jsonl")
    assert counts(load_prompts, *names) == rows(*names)
    demonstrations, held_out = load_demonstrations(Data(train=str(DATA / "demonstrations.jsonl")))
    assert len(demonstrations) + len(held_out) == rows("demonstrations.jsonl")[0]
    pairs, _ = load_preferences(Data(train=str(DATA / "preferences_train.jsonl")))
    assert set(pairs[0].columns) == {"must_mention", "gold_chosen", "gold_rejected", "flipped"}


def test_the_readme_counts_what_is_there():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    told = {name: int(rows.replace(",", "")) for name, rows in re.findall(r"^\| `(\S+)` \| ([\d,]+) \|", text, re.M)}
    assert told == {path.name: len(read_rows(path)) for path in DATA.glob("*.jsonl*")}


def test_one_command_makes_everything_and_twice_the_same(tmp_path, monkeypatch, capsys):
    """The whole of make_data with the tiny model for the base, on 12 prompts."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "prompts.jsonl").write_bytes(make_data.as_jsonl(read_rows(DATA / "prompts.jsonl")[:12]))
    values = {"DATA": data, "MODEL": "tiny", "MAX_NEW_TOKENS": 40, "HELD_OUT": {"test": 3, "eval": 2}}

    def made(work):
        for name, value in {**values, "WORK": Path(work)}.items():
            monkeypatch.setattr(make_data, name, value)
        assert make_data.main() == 0
        return {path.name: path.read_bytes() for path in data.iterdir()}

    first = made(tmp_path / "work")
    prompts = {"prompts.jsonl", *(f"prompts_{split}.jsonl" for split in SPLITS)}
    labels = {"demonstrations.jsonl", "rankings_train.jsonl", *(f"preferences_{split}.jsonl" for split in SPLITS)}
    assert set(first) == {*prompts, *labels, *(f"samples_{split}.jsonl.gz" for split in HELD_OUT)}
    assert made(tmp_path / "again") == first
    assert "test: 3 prompts, 12 answers" in capsys.readouterr().out
