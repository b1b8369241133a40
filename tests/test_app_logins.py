"""The file of logins: what is in it, what is refused, and how guessing is slowed."""

import json

import pytest

from lowrank_rlhf.arena import logins
from lowrank_rlhf.arena.logins import Logins, add
from lowrank_rlhf.errors import UserError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("logins") / "logins.jsonl"
    add(path, "ana", "correct horse", owner=True)
    add(path, "Zoë B", "sprache-ß")
    return path


def test_names_passwords_and_owners(file):
    known = Logins.read(file)
    assert known.check("ana", "correct horse")
    assert known.check("Zoë B", "sprache-ß")
    assert not known.check("ana", "sprache-ß")
    assert not known.check("ana", "")
    assert not known.check("eve", "correct horse")
    assert not known.check("", "")
    assert not known.check("ana", "x" * 10_000_000)
    assert known.is_owner("ana")
    assert not known.is_owner("Zoë B")
    assert not known.is_owner("eve")


def test_the_file_is_private_and_holds_no_password(file):
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert "correct horse" not in text
    assert "sprache" not in text
    salts = [json.loads(line)["salt"] for line in text.splitlines()]
    assert len(set(salts)) == 2
    assert list(file.parent.iterdir()) == [file]


def test_the_same_password_twice_has_two_hashes_and_a_name_again_replaces(tmp_path):
    path = tmp_path / "logins.jsonl"
    add(path, "ana", "correct horse")
    first = path.read_text()
    add(path, "ana", "correct horse")
    assert path.read_text() != first
    assert len(path.read_text().splitlines()) == 1
    add(path, "ana", "battery staple")
    assert Logins.read(path).check("ana", "battery staple")
    assert not Logins.read(path).check("ana", "correct horse")


@pytest.mark.parametrize("name", ["", " ana", "a/b", "<b>", "a\nb", "x" * 65, "../ana"])
def test_names_that_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="name:"):
        add(tmp_path / "logins.jsonl", name, "correct horse")
    assert list(tmp_path.iterdir()) == []


def test_short_passwords_are_refused(tmp_path):
    with pytest.raises(UserError, match="7 characters, use 8 to 1024"):
        add(tmp_path / "logins.jsonl", "ana", "a" * 7)


def test_files_that_are_refused(tmp_path, file):
    with pytest.raises(UserError, match="cannot be read"):
        Logins.read(tmp_path / "none")
    path = tmp_path / "logins.jsonl"
    for text, message in [
        ("", "has no names"),
        ("ana:secret\n", "line 1: not a login"),
        (file.read_text() + '{"name": "eve", "owner": true}\n', "line 3: not a login"),
        (file.read_text() + file.read_text().splitlines()[0], "ana is there twice"),
        (file.read_text().replace('"n": 32768', '"n": 2'), "line 1: not a login"),
    ]:
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(UserError, match=message):
            Logins.read(path)
    path.write_text(file.read_text())
    path.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        Logins.read(path)


def test_guessing_is_slowed_for_the_guesser_alone(file, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(logins.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(logins, "_scrypt", lambda password, *_: password)
    known = Logins.read(file)
    for _ in range(5):
        assert known.wait_seconds("ana", "10.0.0.9") == 0
        known.check("ana", "guess", "10.0.0.9")
        clock[0] += 1
    # The first of the five failures leaves the minute 60 s after it, that is 55 s from now
    assert known.wait_seconds("ana", "10.0.0.9") == 55
    assert known.wait_seconds("ana", "10.0.0.1") == 0
    assert known.wait_seconds("Zoë B", "10.0.0.9") == 0
    clock[0] += 56
    assert known.wait_seconds("ana", "10.0.0.9") == 0
    for number in range(50):  # many names from one address: 50 in a minute are the limit
        known.check(f"name {number}", "guess", "10.0.0.8")
    assert known.wait_seconds("another", "10.0.0.8") == 60
