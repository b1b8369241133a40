"""The arithmetic task: what its script writes is what is committed, its answers are right, and its test is held out."""

import json
import re
from pathlib import Path

from lowrank_rlhf.rewards import VERIFIERS
from recipes.arithmetic import make_data

FOLDER = Path(make_data.__file__).parent


def rows(name, folder=FOLDER):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_script_writes_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    for name in ("train", "test"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()


def test_every_answer_is_right():
    for row in rows("train") + rows("test"):
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        right = {"sum": a + b, "larger": max(a, b), "smaller": min(a, b)}[row["kind"]]
        assert row["answer"] == right
        assert VERIFIERS["exact_number"]([""], [f"{right}."], answer=[row["answer"]]) == [1.0]


def test_no_question_of_the_test_is_trained_on_also_not_the_other_way_round():
    def about(row):
        return row["kind"], frozenset(re.findall(r"\d+", row["prompt"]))

    train, test = rows("train"), rows("test")
    assert len({row["prompt"] for row in train + test}) == len(train) + len(test)
    assert {about(row) for row in train}.isdisjoint(about(row) for row in test)
    kinds = [row["kind"] for row in test]
    assert {kind: kinds.count(kind) for kind in kinds} == {"sum": 32, "larger": 32, "smaller": 32}
