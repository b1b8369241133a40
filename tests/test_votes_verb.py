"""`lowrank-rlhf votes`: what it says and does, and that docs/votes.md shows what it prints."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from lowrank_rlhf.arena.logins import Logins
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.cli import main
from tests.preference_runs import write
from tests.vote_records import answer, asked, cast, compared, vote

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/votes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n\$ (lowrank-rlhf votes .+?)\n```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two annotators, two models, one reward model; in the working directory, under the default name."""
    monkeypatch.chdir(tmp_path)
    store = Store("votes.db")
    for i in range(20):
        for name in ("ana", "bob"):
            shown = (answer("ppo", "long answer", asked(f"Q{i}")), answer("base", "no", asked(f"Q{i}")))
            cast(store, compared(*shown[:: 1 if i % 2 else -1], annotator=name), "a" if i % 2 else "b", strength=2)
    return store


def test_export_says_what_it_wrote_and_what_not(store, capsys):
    cast(store, compared("yes", "no"), "tie")
    assert main(["votes", "export", "--to", "data"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "40 votes on 20 prompts; data card: data/README.md"
    assert said[-2] == "      1 votes left out: ties: neither is better"
    for line in said[:-2]:
        count, _, name = line.split()
        assert len(Path(name).read_text().splitlines()) == int(count)
    assert main(["votes", "export", "--to", "data"]) == 2
    assert capsys.readouterr().err.startswith("error: data is not empty; choose another, or pass --overwrite")
    assert main(["votes", "export", "--to", "data", "--overwrite", "--names", "--seed=3", "--eval-fraction=0"]) == 0
    rows = [json.loads(line) for line in Path("data/preference_train.jsonl").read_text().splitlines()]
    assert {row["annotator"] for row in rows} == {"ana", "bob"}
    assert len(rows) == 40


def test_stats_in_words_and_as_json(store, capsys):
    repeated = next(store.judged()).comparison
    again = compared(*repeated.answers[::-1], annotator=repeated.annotator, repeat_of=repeated.id)
    cast(store, again, "a", "b")
    assert main(["votes", "stats"]) == 0
    said = capsys.readouterr().out
    first = "votes.db: 41 votes (41 pairs) on 41 comparisons, 1 of them a repeat; 1 more superseded or taken back\n"
    assert said.startswith(first)
    assert "ppo" in said
    assert main(["votes", "stats", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["store"]["votes"] == 41
    assert [row["player"] for row in value["standings"]] == ["ppo", "base"]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_stats_of_an_empty_store(arguments, tmp_path, capsys):
    Store(tmp_path / "votes.db")
    assert main(["votes", "stats", "--store", str(tmp_path / "votes.db"), *arguments]) == 0
    assert capsys.readouterr().out


def test_import_says_how_many_were_new_and_what_was_left_out(store, capsys, tmp_path):
    several = [{"role": r, "content": "x"} for r in ("assistant", "user", "assistant")]
    pairs = [{"prompt": "Q", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": several, "rejected": "b"}]
    write(tmp_path / "pairs.jsonl", pairs)
    assert main(["votes", "import", "pairs.jsonl", "--annotator", "crowd"]) == 0
    assert capsys.readouterr().out == (
        "1 new vote in votes.db\n"
        "1 row left out, the first: pairs.jsonl, row 2: an answer of several turns cannot be shown beside another\n"
    )
    assert main(["votes", "import", "votes.db", "--store", "copy.db"]) == 0
    assert capsys.readouterr().out == "41 new votes in copy.db\n"
    assert Store("copy.db").counts() == store.counts()


@pytest.mark.parametrize("action", ["export --to data", "stats", "stats --json"])
def test_a_store_that_is_not_there_is_told_and_not_made(action, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["votes", *action.split()]) == 2
    assert capsys.readouterr().err.startswith("error: votes.db: there is no such file; give the store the app wrote")
    assert list(tmp_path.iterdir()) == []


def test_annotators_are_added_with_a_password_typed_twice(tmp_path, monkeypatch, capsys):
    file = tmp_path / "logins.jsonl"
    typed = iter(["correct horse", "correct horse", "correct horse", "corect horse"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    assert main(["votes", "add-annotator", "ana", "--logins", str(file), "--owner"]) == 0
    assert main(["votes", "add-annotator", "bob", "--logins", str(file)]) == 2
    assert capsys.readouterr().err == "error: the two passwords differ; nothing was changed\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("battery staple\n"))
    assert main(["votes", "add-annotator", "bob", "--logins", str(file), "--password-stdin"]) == 0
    logins = Logins.read(file)
    assert logins.check("ana", "correct horse")
    assert logins.check("bob", "battery staple")
    assert (logins.is_owner("ana"), logins.is_owner("bob")) == (True, False)
    assert "horse" not in capsys.readouterr().out + file.read_text()


# docs/votes.md


def test_the_page_shows_what_the_commands_print(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert [shlex.split(block)[2] for block in BLOCKS] == ["import", "stats", "export"]
    for block in BLOCKS:
        command, _, shown = block.partition("\n")
        assert main(shlex.split(command)[1:]) == 0
        said = capsys.readouterr().out
        lines = 1 if " stats" in command else None  # the statistics' own tests are about the rest
        assert shown.splitlines()[:lines] == said.rstrip("\n").splitlines()[:lines]


def test_the_page_names_every_file_and_reason(store):
    from lowrank_rlhf.arena.votes import export_rows, records

    cast(store, compared("yes", "no"), text="better")
    thumb = compared("a", "b")
    cast(store, thumb, up=True)
    store.save_vote(vote(thumb, ranking=(1, 2)))
    main(["votes", "export", "--to", "data"])
    assert set(export_rows.KINDS) <= set(re.findall(r"`(\w+)_train\.jsonl`", PAGE))
    columns = {
        key
        for kind in export_rows.KINDS
        for key in json.loads(Path(f"data/{kind}_train.jsonl").read_text().splitlines()[0])
    }
    assert columns <= set(re.findall(r"`(\w+)`", PAGE))
    assert all(word in PAGE for word in records.STRENGTHS.values())
