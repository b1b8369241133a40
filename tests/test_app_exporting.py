"""Exports from the browser: plain names, one folder, and no way out of it."""

import io
import os
import zipfile
from pathlib import Path

import pytest

from lowrank_rlhf.arena.exporting import Exports
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Speaker, Vote
from lowrank_rlhf.errors import UserError


@pytest.fixture
def exports(tmp_path):
    store = Store(tmp_path / "work" / "votes.db")
    for number in range(6):
        prompt = ({"role": "user", "content": f"Question {number}?"},)
        a, b = (Answer(Speaker(name), Decoding(), prompt, f"{name} says {number}") for name in ("sft", "ppo"))
        comparison = Comparison((a, b), annotator="ana", blind=True)
        store.save_comparison(comparison)
        store.save_vote(Vote(comparison.id, "ana", "pair", choice="a", strength=2))
    return Exports(store)


def test_an_export_with_its_card_and_zip(exports):
    assert exports.names() == []
    report = exports.make("first", eval_fraction=0.5)
    assert exports.names() == ["first"]
    assert sum(rows for name, rows in report.files.items() if name.startswith("preference")) == 6
    with zipfile.ZipFile(io.BytesIO(exports.zipped("first"))) as archive:
        files = sorted(path.name for path in (exports.folder / "first").iterdir())
        assert sorted(archive.namelist()) == [f"first/{name}" for name in files]
        assert archive.read("first/README.md").decode().endswith("\n---\n" + exports.card("first"))
    with pytest.raises(UserError):
        exports.make("first", eval_fraction=0.5)
    exports.make("first", eval_fraction=0.5, overwrite=True)


def test_the_newest_is_first_and_what_is_no_export_is_not_there(exports, monkeypatch):
    for age, name in enumerate(("b", "c", "a")):
        exports.make(name, eval_fraction=0.5)
        for path in (exports.folder / name / "README.md", exports.folder / name):
            os.utime(path, (1e9 - age, 1e9 - age))
    (exports.folder / "empty").mkdir()
    assert exports.names() == ["b", "c", "a"]
    real = Path.stat

    def gone(path, **options):
        if "c" in path.parts:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "is_file", lambda path: os.path.isfile(path))  # it was there when it was asked for
    monkeypatch.setattr(Path, "stat", gone)
    assert exports.names() == ["b", "a"]


def test_the_card_is_shown_without_the_header_for_programs(exports):
    exports.make("first", eval_fraction=0.5)
    whole = (exports.folder / "first/README.md").read_text()
    assert whole.startswith("---\nconfigs:\n")  # which the download keeps
    assert exports.card("first").startswith("# Votes\n")
    assert "config_name" in whole
    assert "config_name" not in exports.card("first")
    (exports.folder / "first/README.md").write_text("# Mine\n\none\n---\ntwo\n---\n")
    assert exports.card("first") == "# Mine\n\none\n---\ntwo\n---\n"
    (exports.folder / "first/README.md").write_text("---\n---\n\n# Mine\n\n---\nend\n")
    assert exports.card("first") == "# Mine\n\n---\nend\n"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/tmp/x",
        "a\\b",
        "-x",
        "_x",
        "a b",
        "a\0b",
        "a\n",
        "x" * 65,
        "ä",
        "%2e%2e",
        ".hidden",
    ],
)
def test_names_that_would_lead_elsewhere(exports, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    for action in (
        lambda: exports.make(name, eval_fraction=0.1),
        lambda: exports.card(name),
        lambda: exports.zipped(name),
    ):
        with pytest.raises(UserError, match="is to be 1 to 64"):
            action()
    assert sorted(tmp_path.rglob("*")) == before


def test_links_are_not_followed(exports, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "README.md").write_text("secret")
    exports.make("first", eval_fraction=0.1)
    (exports.folder / "out").symlink_to(tmp_path / "secret")
    (exports.folder / "first" / "key.txt").symlink_to(tmp_path / "secret" / "README.md")
    with pytest.raises(UserError, match="is a link"):
        exports.zipped("out")
    with pytest.raises(UserError, match="is a link"):
        exports.make("out", eval_fraction=0.1, overwrite=True)
    assert (tmp_path / "secret" / "README.md").read_text() == "secret"
    assert b"key.txt" not in exports.zipped("first")


def test_what_is_not_there(exports):
    with pytest.raises(UserError, match="no export nothing"):
        exports.zipped("nothing")


def test_an_export_that_is_replaced_while_it_is_fetched(exports, monkeypatch):
    exports.make("first", eval_fraction=0.5)
    monkeypatch.setattr(exports, "card", lambda name: (exports.folder / name).rename(exports.folder / ".aside"))
    with pytest.raises(UserError, match="first is being replaced at this moment; try again"):
        exports.zipped("first")
