"""The vote store: what it takes, which votes stand, and that nothing acknowledged is ever lost."""

import json
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.records import Vote, new_id
from lowrank_rlhf.arena.votes.schema import APPLICATION_ID, VERSION
from lowrank_rlhf.errors import UserError
from tests.vote_records import answer, asked, cast, compared, vote

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "votes.db")


# What comes back


def test_a_comparison_comes_back_as_it_was(store):
    long = ({"role": "user", "content": "<b>é\x00 ☃ 🎉"}, {"role": "assistant", "content": ""}, *asked("and?"))
    first = replace(
        answer("ppo", "a\x00\r\nb", long, seed=3, system="Be brief."), score=1.5, scored_by="rm", beside=("x",)
    )
    comparison = compared(first, answer("base", "", long))
    store.save_comparison(comparison)
    store.save_comparison(comparison)
    assert store.comparison(comparison.id) == comparison
    assert store.comparison("nothing") is None
    assert Store(store.path).comparison(comparison.id) == comparison
    assert store.counts()["comparisons"] == 1


def test_a_later_vote_supersedes_and_only_its_own_kind_and_answer(store):
    comparison = compared("yes", "no")
    first = cast(store, comparison, "a", strength=2)
    thumb = store.save_vote(vote(comparison, up=True))
    other_thumb = store.save_vote(vote(comparison, up=False, answer=comparison.answers[1].id))
    second = store.save_vote(vote(comparison, "tie"))
    assert (first.supersedes, thumb.supersedes, other_thumb.supersedes) == (None, None, None)
    assert second.supersedes == first.id
    assert store.standing(comparison.id) == (thumb, other_thumb, second)
    assert store.vote(first.id) == first
    counts = store.counts()
    assert (counts["votes"], counts["pair"], counts["thumb"], counts["superseded"]) == (3, 1, 2, 1)


def test_what_is_taken_back_stands_no_more_and_a_new_vote_supersedes_nothing(store):
    comparison = compared("yes", "no", blind=False)
    first = cast(store, comparison, "a", "b")
    back = store.withdraw(first.id, "ana")
    assert store.withdraw(first.id, "ana") == back
    assert store.standing(comparison.id) == ()
    assert list(store.judged()) == []
    again = store.save_vote(vote(comparison, "both_bad"))
    assert again.supersedes is None
    assert store.standing(comparison.id) == (again,)
    assert store.counts() == {
        "comparisons": 1,
        "repeats": 0,
        "annotators": 1,
        "votes": 1,
        "pair": 1,
        "ranking": 0,
        "thumb": 0,
        "better": 0,
        "superseded": 2,
        "withdrawn": 1,
    }
    with pytest.raises(UserError, match="a later one has taken its place"):
        store.withdraw(first.id, "ana")


@pytest.mark.parametrize("again", [{"choice": "b"}, {"ranking": (2, 1)}])
def test_a_blind_vote_taken_back_is_not_given_again_with_the_names_known(store, again):
    comparison = compared("yes", "no")
    first = cast(store, comparison, "a", id="one")
    store.withdraw(first.id, "ana")
    with pytest.raises(UserError, match=r"the names were shown before .* vote on its copy that is not blind"):
        store.save_vote(vote(comparison, **again))
    with pytest.raises(UserError, match="vote one: it was taken back"):
        store.save_vote(vote(comparison, "a", id="one"))
    thumb = store.save_vote(vote(comparison, up=True))
    assert store.standing(comparison.id) == (thumb,)
    copy = replace(compared(*comparison.answers), blind=False)
    assert cast(store, copy, "b") in store.standing(copy.id)


def test_a_choice_and_a_ranking_never_stand_both(store):
    comparison = compared("yes", "no", blind=False)
    choice = cast(store, comparison, "a")
    with pytest.raises(UserError, match="a pair of these answers stands already; take that one back first"):
        store.save_vote(vote(comparison, ranking=(2, 1)))
    store.withdraw(choice.id, "ana")
    ranking = store.save_vote(vote(comparison, ranking=(2, 1)))
    with pytest.raises(UserError, match="a ranking of these answers stands already"):
        store.save_vote(vote(comparison, "a"))
    assert store.standing(comparison.id) == (ranking,)


def test_only_ones_own_votes_are_taken_back(store):
    mine = cast(store, compared("yes", "no"), "a")
    for vote_id, who in ((mine.id, "bob"), ("nothing", "ana")):
        with pytest.raises(UserError, match=f"{who} has no such vote"):
            store.withdraw(vote_id, who)
    assert store.standing(mine.comparison) == (mine,)


def test_a_clock_set_back_does_not_bring_an_old_vote_back(store):
    comparison = compared("yes", "no")
    cast(store, comparison, "a", created="2030-01-01T00:00:00.000+00:00")
    second = store.save_vote(vote(comparison, "b", created="2020-01-01T00:00:00.000+00:00"))
    assert second.created == "2030-01-01T00:00:00.000+00:00"
    assert store.standing(comparison.id) == (second,)


def test_judged_is_in_order_filtered_and_one_snapshot(store):
    comparisons = [compared("yes", f"no {i}", annotator=("ana", "bob")[i % 2]) for i in range(450)]
    for comparison in comparisons:
        cast(store, comparison, "a")
    store.save_vote(vote(comparisons[0], up=True))
    reading = store.judged()
    seen = [next(reading)]
    cast(store, compared("late", "later"), "a")  # by another connection than the reading one
    seen += reading
    assert [judged.comparison for judged in seen] == comparisons
    assert [judged.comparison.id for judged in store.judged("thumb")] == [comparisons[0].id]
    assert [len(judged.votes) for judged in store.judged("thumb")] == [1]
    assert {j.comparison.annotator for j in store.judged(annotator="bob")} == {"bob"}
    assert store.comparisons_of("bob") == comparisons[1::2]


def test_scores_given_after_the_vote_are_read_with_the_answer(store):
    scored = replace(answer("ppo", "no"), score=0.25, scored_by="first")
    comparison = compared(answer("base", "yes"), scored)
    cast(store, comparison, "a")
    store.save_scores("rm", {a.id: 2.0 for a in comparison.answers})
    store.save_scores("rm", {comparison.answers[0].id: 7.0})
    read = store.comparison(comparison.id).answers
    assert [(a.score, a.scored_by) for a in read] == [(2.0, "rm"), (0.25, "first")]
    assert next(store.judged()).comparison.answers == read
    store.save_comparison(comparison)  # is still the same
    with pytest.raises(UserError, match="its score is inf"):
        store.save_scores("rm", {comparison.answers[0].id: float("inf")})


# Sent again


def test_the_same_vote_again_is_stored_once(store):
    comparison = compared("yes", "no")
    first = cast(store, comparison, "a", id="one", milliseconds=10)
    again = store.save_vote(vote(comparison, "a", id="one", milliseconds=20))
    assert again == first
    store.save_vote(vote(comparison, "b"))
    with pytest.raises(UserError, match=r"vote one: .*it stands no more"):
        store.save_vote(vote(comparison, "a", id="one"))  # and a late retry does not come to stand again
    assert store.standing(comparison.id)[0].choice == "b"
    with pytest.raises(UserError, match="vote one: another vote has this id"):
        store.save_vote(vote(comparison, "tie", id="one"))


def test_another_comparison_under_the_same_id_is_refused(store):
    comparison = compared("yes", "no")
    store.save_comparison(comparison)
    with pytest.raises(UserError, match="another comparison has this id"):
        store.save_comparison(replace(comparison, blind=False))


# What is refused


def test_votes_that_do_not_fit_are_refused_and_leave_nothing(store):
    pair, single, three = compared("yes", "no"), compared("yes"), compared("a", "b", "c")
    for comparison in (pair, single, three):
        store.save_comparison(comparison)
    long = "x" * 1_000_001
    for bad, words in [
        (vote(compared("x", "y"), "a"), "there is no comparison"),
        (vote(pair, "a", annotator="eve"), "shown to another annotator"),
        (vote(pair, "c"), "choice: expected a, b, tie, both_bad, got 'c'"),
        (vote(pair), "choice: expected"),
        (vote(pair, "a", strength=5), "strength: expected 1 to 4, got 5"),
        (vote(pair, "a", strength=2.0), "strength: expected 1 to 4, got 2.0"),
        (vote(pair, "a", comment=None), "comment: expected text, got NoneType"),
        (vote(pair, "a", strength=True), "strength: expected 1 to 4, got True"),
        (vote(pair, "tie", strength=1), "strength: only a vote for a or b has one"),
        (vote(pair, "a", ranking=(1, 2)), "a vote of kind ranking has no choice"),
        (vote(pair, "a", id="../x"), "expected an id of 1 to 64 letters"),
        (vote(pair, "a", reasons=("evil",)), "reasons: expected some of helpful"),
        (vote(pair, "a", reasons=("helpful", "helpful")), "reasons"),
        (vote(pair, "a", comment="c" * 10_001), "comment: 10001 characters are more than 10000"),
        (vote(pair, "a", comment="\ud800"), "character 1 is half of a surrogate pair"),
        (vote(pair, "a", milliseconds=-1), "milliseconds: expected a whole number"),
        (vote(single, "a"), "a choice needs 2 answers, this comparison has 1"),
        (vote(three, "a"), "a choice needs 2 answers, this comparison has 3"),
        (vote(single, ranking=(1,)), "a ranking needs 2 answers or more"),
        (vote(three, ranking=(1, 2)), r"a rank of 1 \(the best\) to 3 for each of the 3 answers"),
        (vote(three, ranking=(2, 2, 3)), "equal for ties"),
        (vote(three, ranking=(1, 2, 4)), "equal for ties"),
        (vote(pair, up=1), "up: expected true or false, got 1"),
        (vote(pair, up=True, answer="other"), "this comparison has no answer 'other'"),
        (vote(pair, up=True, text="x"), "a vote of kind thumb has no text"),
        (vote(pair, text=" \n"), "the better answer is empty"),
        (vote(pair, text=" yes "), "the same as the shown one"),
        (vote(pair, text=long), "1000001 bytes are more than is stored"),
        (replace(vote(pair, "a"), withdrawn=True), r"taken back with withdraw\(\)"),
        (Vote(pair.id, "ana", "guess"), "kind: expected pair, ranking, thumb, better"),
    ]:
        with pytest.raises(UserError, match=words):
            store.save_vote(bad)
    assert store.counts()["votes"] == 0
    store.save_vote(vote(pair, "a"))


def test_comparisons_that_are_none_are_refused(store):
    one = answer("base", "yes")
    theirs = compared("yes", "no", annotator="bob")
    store.save_comparison(theirs)
    for bad, words in [
        (compared(), "expected 1 to 9 answers, got 0"),
        (compared(*"abcdefghij"), "expected 1 to 9 answers, got 10"),
        (compared(one, one), "two of its answers have the same id"),
        (compared("a", "b", annotator=" "), "the name is empty"),
        (compared("a", "b", annotator="a\nb"), "printable characters"),
        (compared("a", "b", annotator="a" * 101), "at most 100"),
        (compared("x" * 1_000_001), "1000001 bytes are more"),
        (compared("a", prompt=asked("x" * 1_000_001)), "its prompt: 1000001 bytes"),
        (compared(answer(system="x" * 1_000_001)), "its system prompt: 1000001 bytes"),
        (compared(replace(one, score=float("nan"))), "its score is nan; expected a finite number"),
        (compared("\ud800"), "half of a surrogate pair"),
        (compared("a", prompt=({"role": "assistant", "content": "Hi"},)), "does not end with a user's message"),
        (compared("a", "b", repeat_of=theirs.id), "ana has seen no such one"),
        (compared("a", "b", repeat_of="nothing"), "ana has seen no such one"),
        (replace(compared("a", "b"), id="a b"), "expected an id"),
    ]:
        with pytest.raises(UserError, match=words):
            store.save_comparison(bad)
    assert store.counts()["comparisons"] == 1


@pytest.mark.parametrize("table", ["comparisons", "votes", "scores"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET created = 'x'"])
def test_nothing_is_changed_or_deleted(store, table, statement):
    comparison = compared("yes", "no")
    cast(store, comparison, "a")
    store.save_scores("rm", {comparison.answers[0].id: 1.0})
    with closing(sqlite3.connect(store.path)) as other, pytest.raises(sqlite3.IntegrityError, match="only added to"):
        other.execute(statement.format(table))


def test_answers_can_be_looked_at_with_any_sqlite_tool(store):
    comparison = compared("yes", "no")
    store.save_comparison(comparison)
    with closing(sqlite3.connect(store.path)) as other:
        rows = other.execute("SELECT comparison, position, model, text FROM answers").fetchall()
    assert rows == [(comparison.id, 0, "m1", "yes"), (comparison.id, 1, "m2", "no")]


# The file


def test_files_that_are_no_store_are_told_apart(tmp_path):
    (tmp_path / "text.db").write_text("not a database, " * 100)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE votes (x)")
        other.commit()
    Store(tmp_path / "newer.db").close()
    with closing(sqlite3.connect(tmp_path / "newer.db")) as newer:
        newer.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, words in [
        ("text.db", "not a vote store but another kind of file"),
        ("other.db", "another program's database"),
        ("newer.db", rf"a newer lowrank-rlhf wrote this store \(its version is {VERSION + 1}"),
        (".", "this is a folder"),
        ("text.db/votes.db", "its folder cannot be made"),
    ]:
        with pytest.raises(UserError, match=words):
            Store(tmp_path / name)
    with pytest.raises(UserError, match="there is no such file"):
        Store(tmp_path / "none.db", create=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_file_says_so(store):
    for i in range(300):
        cast(store, compared("yes" * 50, f"no {i}"), "a")
    store.close()
    size = store.path.stat().st_size
    with store.path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))
    with pytest.raises(UserError, match="the file is damaged"):
        list(Store(store.path).judged())


def test_an_empty_file_and_a_kill_while_it_was_made_become_a_store(tmp_path):
    (tmp_path / "empty.db").touch()
    cast(Store(tmp_path / "empty.db"), compared("yes", "no"), "a")
    with closing(sqlite3.connect(tmp_path / "empty.db")) as file:
        assert file.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_disk_is_one_clear_message_and_loses_nothing(store):
    kept = cast(store, compared("yes", "no"), "a")
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(UserError, match=f"^{store.path}: the disk is full; nothing of this was stored") as caught:
        store.save_comparison(compared("x" * 100_000, "no"))
    assert "\n" not in str(caught.value)
    assert store.standing(kept.comparison) == (kept,)
    store._connection.execute("PRAGMA max_page_count = 1000000")  # room was made
    cast(store, compared("x" * 100_000, "no"), "a")
    assert store.counts()["votes"] == 2


def test_a_write_the_disk_refuses_is_told(tmp_path):
    """A file size limit refuses the write as a quota does."""
    code = f"""
import resource, signal
from tests.vote_records import cast, compared
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store({str(tmp_path / "votes.db")!r})
cast(store, compared("yes", "no"), "a")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, {resource.RLIM_INFINITY}))
try:
    store.save_comparison(compared("x" * 900_000, "no"))
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, ({resource.RLIM_INFINITY}, {resource.RLIM_INFINITY}))
cast(store, compared("x" * 900_000, "no"), "a")
print(store.counts()["votes"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    message, votes = done.stdout.strip().splitlines()
    assert "the disk is full" in message
    assert votes == "2"


def test_nothing_is_acknowledged_that_went_into_a_deleted_file(store):
    comparison = compared("yes", "no")
    store.save_comparison(comparison)
    moved = store.path.rename(store.path.with_name("moved.db"))
    for _ in range(2):
        with pytest.raises(UserError, match="was moved, deleted or replaced while it was open; nothing was stored"):
            store.save_vote(vote(comparison, "a"))
        with pytest.raises(UserError, match="the file cannot be opened"):
            next(store.judged())
    assert not store.path.exists()
    moved.rename(store.path)
    store.save_vote(vote(comparison, "a"))
    assert store.counts()["votes"] == 1


def test_a_name_with_signs_that_mean_something_in_addresses(tmp_path):
    odd = tmp_path / "a b?mode=ro#%41é.db"
    cast(Store(odd), compared("yes", "no"), "a")
    assert len(list(Store(odd).judged())) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".db"] == [odd.name]


def test_lists_in_place_of_tuples_are_the_same(store):
    """As records come from JSON."""
    three = compared("a", "b", "c")
    three = replace(three, answers=tuple(replace(a, prompt=list(a.prompt)) for a in three.answers))
    ranked = vote(three, ranking=[1, 2, 3], reasons=["helpful"], id="r")
    for _ in range(2):
        store.save_comparison(three)
        store.save_vote(ranked)
    assert store.standing(three.id)[0].ranking == (1, 2, 3)


# Threads, processes, kills

VOTER = """
import sys
from tests.vote_records import cast, compared
from lowrank_rlhf.arena.votes.database import Store
store = Store(sys.argv[1])
for i in range(int(sys.argv[2])):
    vote = cast(store, compared("yes", str(i), annotator=sys.argv[3]), "a")
    print(vote.id, flush=True)
"""


def voter(path, count, annotator):
    arguments = [sys.executable, "-c", VOTER, str(path), str(count), annotator]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_fifty_threads_share_a_store(store):
    barrier = threading.Barrier(50)

    def annotate(number):
        barrier.wait()
        return [cast(store, compared("yes", str(i), annotator=f"ann{number}"), "a", "b").id for i in range(8)]

    with ThreadPoolExecutor(50) as pool:
        acknowledged = [vote_id for ids in pool.map(annotate, range(50)) for vote_id in ids]
    assert sorted(v.id for judged in store.judged() for v in judged.votes) == sorted(acknowledged)
    assert store.counts()["superseded"] == 400


def test_one_vote_sent_by_many_threads_is_stored_once(store):
    comparison = compared("yes", "no")
    store.save_comparison(comparison)
    one = vote(comparison, "a", id=new_id())
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(store.save_vote, [one] * 64))) == 1
    counts = store.counts()
    assert (counts["votes"], counts["superseded"]) == (1, 0)


def test_processes_open_a_new_file_at_once_and_all_their_votes_are_in_it(tmp_path):
    path = tmp_path / "new" / "votes.db"
    voters = [voter(path, 20, f"ann{i}") for i in range(4)]
    acknowledged = [line for process in voters for line in process.communicate()[0].split()]
    assert [process.returncode for process in voters] == [0] * 4
    assert sorted(v.id for judged in Store(path).judged() for v in judged.votes) == sorted(acknowledged)
    assert len(acknowledged) == 80


def test_a_kill_at_any_time_loses_no_acknowledged_vote(tmp_path):
    path = tmp_path / "votes.db"
    acknowledged = []
    for after in (0, 1, 5, 20, 60):
        process = voter(path, 100_000, f"ann{after}")
        acknowledged += [process.stdout.readline().strip() for _ in range(after)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [line for line in process.communicate()[0].split("\n")[:-1] if line]  # written before the kill
    store = Store(path)
    stored = [v.id for judged in store.judged() for v in judged.votes]
    assert len(acknowledged) >= 86
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored))
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_records_of_a_store_are_plain_json(store):
    comparison = compared("yes", "no")
    cast(store, comparison, "a", reasons=("truthful",), comment="☃")
    ((text,),) = store._connection.execute("SELECT record FROM votes").fetchall()
    record = json.loads(text)
    assert (record["comparison"], record["reasons"], record["comment"]) == (comparison.id, ["truthful"], "☃")


def test_the_store_and_its_exports_import_neither_torch_nor_gradio():
    modules = [
        f"lowrank_rlhf.arena.votes.{path.stem}" for path in (ROOT / "lowrank_rlhf/arena/votes").glob("[a-z]*.py")
    ]
    assert len(modules) > 8
    code = f"import sys, {', '.join(modules)}\nprint([m for m in ('torch', 'gradio', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
