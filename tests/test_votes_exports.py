"""Exports: each kind of vote as the rows it means, split by prompt, whole folders; and votes read in."""

import json
from dataclasses import replace

import pytest
from datasets import load_dataset

from lowrank_rlhf.arena.votes import exports
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.exports import export, split
from lowrank_rlhf.arena.votes.imports import import_votes
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import load_demonstrations, load_preferences, load_prompts, load_thumbs
from lowrank_rlhf.errors import UserError
from tests.preference_runs import write
from tests.vote_records import answer, asked, cast, compared, vote

TURNS = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *asked("And then?"))
ALL_TRAIN = {"eval_fraction": 0.0}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "votes.db")


def rows(folder, name):
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def said(text):
    return [{"role": "assistant", "content": text}]


# What each kind of vote gives


def test_a_pair_is_a_preference_with_its_strength_as_margin(store, tmp_path):
    for choice, strength in (("a", 4), ("b", 1), ("b", None)):
        cast(store, compared("yes é☃", "no", prompt=TURNS), choice, strength=strength)
    report = export(store, tmp_path / "out", **ALL_TRAIN)
    first, second, third = rows(tmp_path / "out", "preference_train")
    assert {key: value for key, value in first.items() if key != "prompt_key"} == {
        "prompt": list(TURNS),
        "chosen": said("yes é☃"),
        "rejected": said("no"),
        "margin": 4.0,
        "chosen_model": "m1",
        "rejected_model": "m2",
        "annotator": "a1",
    }
    assert (second["chosen"], second["margin"], second["chosen_model"]) == (said("no"), 1.0, "m2")
    assert (third["chosen"], third["margin"]) == (said("no"), 1.0)
    assert rows(tmp_path / "out", "prompts_train") == [{"prompt": list(TURNS), "prompt_key": first["prompt_key"]}]
    assert report.files == {"preference_train.jsonl": 3, "prompts_train.jsonl": 1}
    assert (report.votes, report.models, report.strengths) == (3, {"m1": 3, "m2": 3}, {1: 1, 4: 1})


def test_a_system_prompt_that_both_had_is_in_the_messages(store, tmp_path):
    for systems in (("Be kind.", "Be kind."), ("Be kind.", "Be brief."), ("", "Be brief.")):
        cast(store, compared(*(answer(f"m{i}", f"t{i}", system=s) for i, s in enumerate(systems))), "a")
    report = export(store, tmp_path / "out", **ALL_TRAIN)
    (row,) = rows(tmp_path / "out", "preference_train")
    assert row["prompt"] == [{"role": "system", "content": "Be kind."}, *asked()]
    assert report.left_out == {"the answers had different system prompts": 2}


def test_a_ranking_is_a_row_with_ranks_without_gaps(store, tmp_path):
    cast(store, compared("a", "b", "c", "d"), ranking=(2, 1, 4, 2))
    cast(store, compared("a", "b", "c"), ranking=(1, 1, 1))
    cast(store, compared("a", "b", "a"), ranking=(1, 2, 3))
    cast(store, compared("a", "b", "a"), ranking=(2, 1, 2))
    report = export(store, tmp_path / "out", **ALL_TRAIN)
    first, second = rows(tmp_path / "out", "ranking_train")
    assert (first["responses"], first["ranking"]) == ([said(t) for t in "abcd"], [2, 1, 3, 2])
    assert (second["ranking"], second["models"]) == ([2, 1, 2], ["m1", "m2", "m3"])
    assert report.left_out == {"ties: neither is better": 1, "the answers are the same text": 1}
    pairs, _ = load_preferences(Data(train=str(tmp_path / "out/ranking_train.jsonl"), eval_fraction=0))
    assert [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs][:3] == [
        ("b", "a"),
        ("b", "d"),
        ("b", "c"),
    ]


def test_thumbs_and_neither_are_single_answers(store, tmp_path):
    comparison = compared("yes", "no")
    cast(store, comparison, up=True)
    store.save_vote(vote(comparison, up=False, answer=comparison.answers[1].id))
    cast(store, compared("bad", "worse"), "both_bad")
    cast(store, compared("same", "same"), "both_bad")
    report = export(store, tmp_path / "out", **ALL_TRAIN)
    found = [(r["completion"], r["label"], r["model"]) for r in rows(tmp_path / "out", "unpaired_train")]
    assert found[:2] == [(said("yes"), True, "m1"), (said("no"), False, "m2")]
    assert found[2:] == [(said("bad"), False, "m1"), (said("worse"), False, "m2"), (said("same"), False, "m2")]
    assert (report.votes, report.left_out) == (4, {})
    assert report.models == {"m1": 3, "m2": 3}


def test_a_better_answer_is_a_demonstration_and_beats_the_one_it_improves(store, tmp_path):
    comparison = compared("yes", "no")
    cast(store, comparison, text="yes, because", answer=comparison.answers[1].id)
    export(store, tmp_path / "out", **ALL_TRAIN)
    (demonstration,) = rows(tmp_path / "out", "demonstrations_train")
    (pair,) = rows(tmp_path / "out", "preference_train")
    assert (demonstration["prompt"], demonstration["completion"]) == (list(asked()), said("yes, because"))
    assert (pair["chosen"], pair["rejected"]) == (said("yes, because"), said("no"))
    assert (pair["chosen_model"], pair["rejected_model"], demonstration["model"]) == ("human", "m2", "human")


def test_what_is_left_out_is_counted(store, tmp_path):
    cast(store, compared("yes", "no"), "tie")
    cast(store, compared("same", "same"), "a")
    cast(store, compared(answer("m1", "x", TURNS), answer("m2", "y", asked("And then?"))), "a")
    cast(store, compared("seen", "names", blind=False), "a")
    first = compared("one", "two")
    cast(store, first, "a")
    repeat = compared(*first.answers[::-1], repeat_of=first.id)
    cast(store, repeat, "a")
    superseded = compared("old", "new")
    cast(store, superseded, "a", "b")
    undone = cast(store, compared("un", "done"), "a")
    store.withdraw(undone.id, "ana")
    report = export(store, tmp_path / "out", blind_only=True, **ALL_TRAIN)
    assert [r["chosen"] for r in rows(tmp_path / "out", "preference_train")] == [said("one"), said("new")]
    assert report.left_out == {
        "ties: neither is better": 1,
        "the answers are the same text": 1,
        "the answers are to different prompts": 1,
        "not blind: names were shown": 1,
        "shown again to measure consistency; the first time is in": 1,
    }
    card = (tmp_path / "out/README.md").read_text()
    assert all(f"| {count} | {why} |" in card for why, count in report.left_out.items())
    again = export(store, tmp_path / "all", **ALL_TRAIN)
    assert again.files["preference_train.jsonl"] == 3


def test_a_repeat_whose_first_time_has_no_vote_is_the_vote(store, tmp_path):
    first = compared("one", "two")
    undone = cast(store, first, "a")
    store.withdraw(undone.id, "ana")
    cast(store, compared(*first.answers[::-1], repeat_of=first.id), "b")
    export(store, tmp_path / "out", **ALL_TRAIN)
    assert [row["chosen"] for row in rows(tmp_path / "out", "preference_train")] == [said("one")]


def test_annotators_have_numbers_unless_names_are_asked_for(store, tmp_path):
    for name in ("Zoë", "ana", "Zoë"):
        cast(store, compared("yes", "no", annotator=name), "a", comment="private remark")
    export(store, tmp_path / "out", **ALL_TRAIN)
    export(store, tmp_path / "named", names=True, **ALL_TRAIN)
    assert [r["annotator"] for r in rows(tmp_path / "out", "preference_train")] == ["a1", "a2", "a1"]
    assert [r["annotator"] for r in rows(tmp_path / "named", "preference_train")] == ["Zoë", "ana", "Zoë"]
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "Zoë" not in written
    assert "private remark" not in written


# The split


@pytest.fixture
def many(store):
    """Every kind of vote on each of 60 questions, and a later turn of each conversation."""
    for i in range(60):
        prompt = asked(f"Question {i}?")
        pair, three = compared("yes", "no", prompt=prompt), compared("a", "b", "c", prompt=prompt)
        cast(store, pair, "ab"[i % 2], strength=1 + i % 4, reasons=("helpful",))
        store.save_vote(vote(pair, up=i % 3 == 0))
        store.save_vote(vote(pair, text="better"))
        cast(store, three, ranking=(1, 2, 3))
        cast(store, compared("later", "turn", prompt=(*prompt, *said("yes"), *asked("Why?"))), "a")
    return store


def questions(folder, side):
    found = {}
    for kind in exports.KINDS:
        found[kind] = {row["prompt"][0]["content"] for row in rows(folder, f"{kind}_{side}")}
    return found


def test_a_prompt_and_its_conversation_are_on_one_side_in_every_file(many, tmp_path):
    report = export(many, tmp_path / "out", eval_fraction=0.2, seed=1)
    train, test = questions(tmp_path / "out", "train"), questions(tmp_path / "out", "test")
    assert set().union(*train.values()).isdisjoint(set().union(*test.values()))
    assert all(len(train[kind]) == report.prompts["train"] for kind in exports.KINDS)
    assert all(len(test[kind]) == report.prompts["test"] for kind in exports.KINDS)
    assert 4 <= report.prompts["test"] <= 22  # 12 ± 3 standard deviations of Binomial(60, 0.2)


def test_the_same_seed_is_the_same_split_also_when_votes_come(many, tmp_path):
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        export(many, tmp_path / folder, seed=seed)
    names = sorted(path.name for path in (tmp_path / "first").glob("*.jsonl"))
    assert len(names) == 10
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    before = questions(tmp_path / "first", "test")["prompts"]
    assert before != questions(tmp_path / "other", "test")["prompts"]
    for i in range(60, 120):
        cast(many, compared("yes", "no", prompt=asked(f"Question {i}?")), "a")
    export(many, tmp_path / "later")
    assert before <= questions(tmp_path / "later", "test")["prompts"]
    assert not before & questions(tmp_path / "later", "train")["prompts"]


def test_no_side_is_empty_where_there_are_two_prompts():
    assert split({"x"}, 0.5, 0) in (set(), {"x"})
    for seed in range(20):
        assert len(split({"x", "y"}, 0.001, seed)) == len(split({"x", "y"}, 0.999, seed)) == 1
    assert split({"x", "y"}, 0.0, 0) == set()


# The folder


def test_every_file_loads_with_datasets_alone_and_by_the_card(many, tmp_path):
    report = export(many, tmp_path / "out", eval_fraction=0.2)
    assert len(report.files) == 10
    for kind in exports.KINDS:
        files = {side: str(tmp_path / "out" / f"{kind}_{side}.jsonl") for side in exports.SPLITS}
        alone = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
        by_card = load_dataset(str(tmp_path / "out"), kind, cache_dir=str(tmp_path / "cache"))
        for side in exports.SPLITS:
            assert alone[side].num_rows == by_card[side].num_rows == report.files[f"{kind}_{side}.jsonl"]
            assert alone[side][0]["prompt"] == by_card[side][0]["prompt"]
            assert set(alone[side][0]["prompt"][0]) == {"role", "content"}


def test_our_loaders_read_what_they_want(many, tmp_path):
    export(many, tmp_path / "out", eval_fraction=0.2)

    def data(kind):
        return Data(
            **{s: str(tmp_path / "out" / f"{kind}_{t}.jsonl") for s, t in (("train", "train"), ("eval", "test"))}
        )

    pairs, _ = load_preferences(data("preference"))
    assert {pair.margin for pair in pairs} == {1.0, 2.0, 3.0, 4.0}
    thumbs, _ = load_thumbs(data("unpaired"))
    assert {thumb.chosen is not None for thumb in thumbs} == {True, False}
    demonstrations, _ = load_demonstrations(data("demonstrations"))
    assert demonstrations[0].chosen == said("better")
    train, test = load_prompts(data("prompts"))
    assert len(train) + len(test) == 120


def test_an_export_replaces_only_an_export_and_only_when_asked(many, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(many, out)  # empty: free
    (out / "preference_train.jsonl").write_text("old")
    with pytest.raises(UserError, match="is not empty; choose another, or pass --overwrite"):
        export(many, out)
    export(many, out, overwrite=True)
    assert len(rows(out, "preference_train")) > 100
    for name in ("own", "file", "link"):
        path = tmp_path / name
        if name == "own":
            path.mkdir()
            (path / "thesis.txt").write_text("mine")
        elif name == "file":
            path.write_text("mine")
        else:
            path.symlink_to(out)
        with pytest.raises(UserError, match=r"is no export|there is a file of this name"):
            export(many, path, overwrite=True)
    assert (tmp_path / "own/thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_failure_leaves_what_was_there(many, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(many, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports.os, "fsync", fail)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            export(many, folder, overwrite=True)
    with pytest.raises(UserError, match=r"votes.db/out: cannot be written \(Not a directory\)"):
        export(many, many.path / "out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir() if "votes.db" not in path.name) == ["out"]


def fail_to_appear(monkeypatch, meanwhile=lambda target: None):
    """The finished folder cannot take its place, and something happens just before."""
    real = exports.Path.rename

    def rename(path, target):
        if path.name.endswith(".tmp"):
            meanwhile(target)
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(exports.Path, "rename", rename)


def test_an_export_that_cannot_take_its_place_gives_it_back(many, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(many, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fail_to_appear(monkeypatch)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(UserError, match=r"cannot be written \(Input/output error\); what was there is as it was"):
            export(many, folder, seed=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir() if "votes.db" not in path.name) == ["out"]


def test_an_export_whose_place_was_taken_meanwhile_is_kept_and_told_where(many, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(many, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def take(target):
        target.mkdir()
        (target / "theirs.txt").write_text("theirs")

    fail_to_appear(monkeypatch, take)
    with pytest.raises(UserError, match=r"what was there is now .*/\.out\.\w+\.old"):
        export(many, out, overwrite=True)
    (kept,) = tmp_path.glob(".out.*")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert [path.name for path in out.iterdir()] == ["theirs.txt"]


def test_nothing_to_export_and_bad_values_are_told(store, tmp_path):
    with pytest.raises(UserError, match="no vote gives training data"):
        export(store, tmp_path / "out")
    cast(store, compared("yes", "no"), "tie")
    with pytest.raises(UserError, match=r"no vote gives training data .*1: ties"):
        export(store, tmp_path / "out")
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="eval_fraction: expected a share"):
            export(store, tmp_path / "out", eval_fraction=fraction)
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_is_in_it(many, tmp_path):
    cast(many, compared(answer("a|b<script>`", "x"), answer("m2", "y")), "a")
    export(many, tmp_path / "out", eval_fraction=0.2)
    card = (tmp_path / "out/README.md").read_text()
    report = json.loads((tmp_path / "out/export.json").read_text())
    cast_today = many.vote(next(many.judged()).votes[0].id).created[:10]
    assert f"301 votes by 1 person, {cast_today}" in card
    assert "language models; 301 of them\nwere blind" in card
    assert "How much better: barely (1) 15, slightly (2) 15, clearly (3) 15, far (4) 15." in card
    assert "Reasons given: helpful 60." in card
    assert "| a\\|b&lt;script>' | 1 |" in card
    for kind in exports.KINDS:
        counts = [report["files"][f"{kind}_{side}.jsonl"] for side in exports.SPLITS]
        assert f"| {kind} | {counts[0]} | {counts[1]} |" in card


# Votes in


def test_another_store_comes_in_whole_and_once(many, tmp_path):
    comparison = compared("yes", "no", annotator="bob")
    first = cast(many, comparison, "a", "b")
    many.withdraw(first.id, "bob")
    many.save_scores("rm", {comparison.answers[0].id: 0.5})
    mine = Store(tmp_path / "mine.db")
    own = cast(mine, compared("my", "own"), "a")
    total = many._connection.execute("SELECT count(*) FROM votes").fetchone()[0]
    assert import_votes(mine, many.path, "ignored") == total
    assert import_votes(mine, many.path, "ignored") == 0
    theirs = {c.id: (c, v) for c, v in many.history()}
    ours = {c.id: (c, v) for c, v in mine.history()}
    assert own.comparison in ours
    assert {key: value for key, value in ours.items() if key != own.comparison} == theirs
    assert import_votes(many, mine.path, "ignored") == 1
    with pytest.raises(UserError, match="this is the store itself"):
        import_votes(many, many.path, "ana")


def test_of_two_branches_the_later_vote_stands(tmp_path):
    comparison = compared("yes", "no")
    left, right = Store(tmp_path / "left.db"), Store(tmp_path / "right.db")
    later = cast(left, comparison, "a", created="2030-01-02T00:00:00.000+00:00")
    cast(right, comparison, "b", created="2030-01-01T00:00:00.000+00:00")
    assert (import_votes(left, right.path, ""), import_votes(right, left.path, "")) == (1, 1)
    assert left.standing(comparison.id) == right.standing(comparison.id) == (later,)
    assert left.counts() == right.counts()


def test_contradicting_stores_are_refused_whole(tmp_path):
    comparison, other = compared("yes", "no"), compared("x", "y")
    left, right = Store(tmp_path / "left.db"), Store(tmp_path / "right.db")
    cast(left, comparison, "a")
    cast(right, other, "a")
    cast(right, replace(comparison, blind=False), "b")
    with pytest.raises(UserError, match="another comparison has this id"):
        import_votes(left, right.path, "")
    assert left.counts()["comparisons"] == 1


def test_pairs_of_a_file_become_votes_without_a_side_bias(store, tmp_path):
    source = [{"prompt": f"Q{i}", "chosen": "good", "rejected": "bad", "margin": i % 6} for i in range(200)]
    path = write(tmp_path / "pairs.jsonl", source)
    assert import_votes(store, path, "crowd") == 200
    assert import_votes(store, path, "crowd") == 0
    judged = list(store.judged())
    sides = [j.votes[0].choice for j in judged]
    better = [j.comparison.answers["ab".index(side)] for j, side in zip(judged, sides, strict=True)]
    assert {(a.text, a.speaker.name) for a in better} == {("good", "chosen")}
    assert 70 <= sides.count("a") <= 130  # 100 ± 4 standard deviations
    assert [j.votes[0].strength for j in judged[:6]] == [None, 1, 2, 3, 4, None]
    assert {(j.comparison.annotator, j.comparison.blind) for j in judged} == {("crowd", False)}
    assert import_votes(store, path, "others") == 200


def test_every_format_that_says_what_is_better(store, tmp_path):
    hh = "\n\nHuman: Hi\n\nAssistant: {}"
    files = {
        "winner": [{"prompt": "Q", "winner": "w", "loser": "l"}],
        "labelled": [{"prompt": "Q", "response_a": "a", "response_b": "b", "preferred_response": "b"}],
        "hh": [{"chosen": hh.format("yes"), "rejected": hh.format("no")}],
        "ranking": [{"prompt": "Q", "responses": ["x", "y", "z"], "ranking": [1, 0, 1], "models": ["p", "q", "r"]}],
        "thumbs": [
            {"prompt": "Q", "completion": "c", "label": True, "model": "ppo"},
            {"prompt": "Q", "completion": "d", "label": 0},
        ],
    }
    for name, source in files.items():
        assert import_votes(store, write(tmp_path / f"{name}.jsonl", source), "crowd") == len(source)
    ranking = next(store.judged("ranking"))
    assert ranking.votes[0].ranking == (2, 1, 2)
    assert [a.speaker.name for a in ranking.comparison.answers] == ["p", "q", "r"]
    thumbs = [(j.comparison.answers[0].speaker.name, j.votes[0].up) for j in store.judged("thumb")]
    assert thumbs == [("ppo", True), ("disliked", False)]
    assert store.counts()["pair"] == 3


def test_an_export_comes_back_as_the_votes_it_was_made_from(many, tmp_path):
    """Texts, prompts, systems, models and strengths; not who it was, which exports do not say."""
    cast(
        many, compared(answer("m1", "s1", system="Be brief."), answer("m2", "s2", system="Be brief.")), "b", strength=3
    )
    export(many, tmp_path / "out", **ALL_TRAIN)
    back = Store(tmp_path / "back.db")
    for kind in ("preference", "ranking", "unpaired"):
        import_votes(back, tmp_path / f"out/{kind}_train.jsonl", "crowd")
    export(back, tmp_path / "again", **ALL_TRAIN)
    for kind in ("preference", "ranking", "unpaired"):
        before, after = (
            [{k: v for k, v in row.items() if k != "annotator"} for row in rows(tmp_path / folder, f"{kind}_train")]
            for folder in ("out", "again")
        )
        assert after == before


def test_rows_that_are_no_vote_are_told(store, tmp_path):
    left_out = []
    several = [*said("a"), *asked("more"), *said("b")]
    source = [
        {"prompt": "Q", "chosen": several, "rejected": "no"},
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": "Q", "chosen": "x" * 1_000_001, "rejected": "no"},
    ]
    assert import_votes(store, write(tmp_path / "pairs.jsonl", source), "crowd", left_out=left_out) == 1
    assert len(left_out) == 2
    assert left_out[0].endswith("row 1: an answer of several turns cannot be shown beside another")
    assert "row 3: 1000001 bytes" in left_out[1]
    for name, row, words in [
        ("demo", {"prompt": "Q", "completion": "c"}, "rows of format completion do not say which answer is better"),
        ("bad", {"prompt": "Q", "chosen": 3, "rejected": "no"}, "row 1: column 'chosen': expected text, got int"),
    ]:
        with pytest.raises(UserError, match=words):
            import_votes(store, write(tmp_path / f"{name}.jsonl", [row]), "crowd")
    with pytest.raises(UserError, match="there is no such file"):
        import_votes(store, tmp_path / "none.jsonl", "crowd")
    with pytest.raises(UserError, match="the name is empty"):
        import_votes(store, tmp_path / "pairs.jsonl", " ")
    assert store.counts()["votes"] == 1
