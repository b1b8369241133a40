"""The whole app over HTTP: what it serves to whom, and how it starts and ends."""

import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from app_server import ROOT, running
from browser import chromium, needs_browser
from chat_runs import write_run

from lowrank_rlhf.arena.logins import add
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.cli import main

PASSWORD = "correct horse"
CLOSED = [
    "gradio_api/file=/etc/passwd",
    "gradio_api/file=../../../../etc/passwd",
    "gradio_api/file=votes.db",
    "gradio_api/file=runs/sft/run.json",
    "gradio_api/file/etc/passwd",
    "gradio_api/proxy=https://example.com/",
    "gradio_api/deep_link?session_hash=a",
    "gradio_api/openapi.json",
    "static/..%2f..%2f..%2froutes.py",
    "assets/%2e%2e/%2e%2e/routes.py",
    "downloads/..%2f..%2fvotes.db",
    "downloads/%2e%2e.zip",
    "monitoring",
    "docs",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    write_run(folder / "runs" / "sft")
    write_run(folder / "runs" / "ppo", "ppo", seed=1)
    (folder / "runs" / "torn").mkdir()
    (folder / "runs" / "torn" / "run.json").write_text("{torn")
    (folder / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "When?"}\n')
    add(folder / "logins.jsonl", "olga", PASSWORD, owner=True)
    add(folder / "logins.jsonl", "ana", PASSWORD)
    add(folder / "logins.jsonl", "ben", PASSWORD)
    return folder


@pytest.fixture(scope="module")
def app(work):
    with running("--store", "votes.db", cwd=work) as served:
        yield served


@pytest.fixture(scope="module")
def guarded(work):
    flags = ["--store", "lab.db", "--prompts", "prompts.jsonl", "--logins", "logins.jsonl", "--host", "0.0.0.0"]
    with running(*flags, cwd=work) as served:
        yield served


def signed_in(app, name):
    client = httpx.Client(base_url=app.url, timeout=30)
    assert client.post("/login", data={"username": name, "password": PASSWORD}).json() == {"success": True}
    return client


def test_both_pages_and_nothing_of_gradio_that_is_not_needed(app):
    for page in ("", "config", "vote/", "vote/config"):
        assert httpx.get(app.url + page).status_code == 200, page
    assert httpx.get(app.url + "vote").headers["location"] == "/vote/"
    for path in CLOSED:
        for prefix in ("", "vote/"):
            assert httpx.get(app.url + prefix + path).status_code == 404, prefix + path
    assert httpx.post(app.url + "gradio_api/upload", files={"files": b"x"}).status_code == 404


@pytest.mark.parametrize("page", ["", "vote/"])
def test_analytics_history_and_sharing_are_off(app, page):
    config = httpx.get(app.url + page + "config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("is_space")
    assert config.get("run_history", False) is False
    assert not config.get("share", False)
    assert "runs" not in config["footer_links"]


def test_only_the_voting_page_has_public_events(app):
    config = httpx.get(app.url + "config").json()
    public = {d["api_name"] for d in config["dependencies"] if d.get("api_visibility") != "private" and d["api_name"]}
    assert public == set()


def test_a_name_that_points_here_gets_nothing(app):
    answer = httpx.get(app.url, headers={"host": "evil.example"})
    assert answer.status_code == 421
    assert "gradio" not in answer.text


def test_any_other_host_demands_logins_at_start(work, capsys):
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", 7869), timeout=1):
        pass
    for host in ("0.0.0.0", "::", "192.168.1.2", "lab.example"):
        assert main(["compare", "--host", host, "--port", "7869", "--runs", str(work / "runs")]) == 2
        assert "demands --logins" in capsys.readouterr().err


def test_bad_flags_are_told_in_words(work, capsys, monkeypatch):
    monkeypatch.chdir(work)
    (work / "file").write_text("x")
    wrong = {
        "--runs file": "--runs: file is not a folder",
        "--prompts none.jsonl": "--prompts: there is no file none.jsonl",
        "--logins none.jsonl": "--logins: there is no file none.jsonl",
        "--store nowhere/votes.db": "--store:",
        "--adapter x": "'x' is to be NAME=DIR",
        "--adapter x=runs": "no PEFT folder",
        "--adapter ../x=runs": "is to be NAME=DIR",
        "--samples 10": "--samples: 10 is not within 2 and 9",
        "--repeats 2": "--repeats: 2.0 is not within 0 and 1",
        "--port 99999": "--port: 99999 is not within 0 and 65535",
    }
    for flags, message in wrong.items():
        assert main(["compare", *flags.split()]) == 2
        assert message in capsys.readouterr().err


def test_app_py_and_the_verb_take_the_same_flags(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    script = subprocess.run([sys.executable, ROOT / "app.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert script.stdout == shown
    assert "--runs" in shown


def test_nothing_is_served_before_signing_in(guarded):
    for page in ("config", "vote/config", "gradio_api/info", "theme.css", "static/js/x.js", "downloads/x.zip"):
        assert httpx.get(guarded.url + page).status_code == 401, page
    for page in ("", "vote/"):
        assert httpx.get(guarded.url + page).headers["location"] == "/login"
    assert "gradio" not in httpx.get(guarded.url + "login").text


def test_annotators_cannot_reach_the_workbench(guarded):
    ana, olga = signed_in(guarded, "ana"), signed_in(guarded, "olga")
    assert ana.get("/config").status_code == 403
    assert ana.get("/vote/config").json()["username"] == "ana"
    assert olga.get("/config").json()["username"] == "olga"
    join = {"data": [None], "fn_index": 0, "session_hash": "s-ana"}
    assert ana.post("/gradio_api/queue/join", json=join).status_code == 403
    assert ana.get("/downloads/votes.zip").status_code == 403
    assert olga.get("/downloads/votes.zip").status_code == 404  # nothing exported yet


def test_a_session_of_another_cannot_be_used(guarded):
    ana, ben = signed_in(guarded, "ana"), signed_in(guarded, "ben")
    join = {"data": [], "fn_index": 0, "session_hash": "session-of-ana"}
    assert ana.post("/vote/gradio_api/queue/join", json=join).status_code != 403
    for path in ("queue/join", "run/predict", "cancel"):
        body = {**join, "event_id": "e"}
        assert ben.post(f"/vote/gradio_api/{path}", json=body).status_code == 403
    assert ben.get("/vote/gradio_api/queue/data", params={"session_hash": "session-of-ana"}).status_code == 403


def test_a_vote_cannot_be_forged(guarded, work):
    from gradio_client import Client

    ana, ben = (Client(guarded.url + "vote/", auth=(name, PASSWORD), verbose=False) for name in ("ana", "ben"))
    shown = ana.predict(api_name="/next")
    assert shown["state"] == "shown"
    forged = {"comparison": shown["comparison"], "choice": "a", "strength": 1, "api_name": "/vote"}
    with pytest.raises(Exception, match="signed in as ben"):
        ben.predict(annotator="ana", **forged)
    with pytest.raises(Exception, match="comparison"):
        ben.predict(**forged)
    ben.session_hash = ana.session_hash
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        ben.predict(**forged)
    assert list(Store(work / "lab.db", create=False).judged()) == []
    ana.predict(**{**forged, "choice": "b", "strength": 4})
    [judged] = Store(work / "lab.db", create=False).judged()
    assert [(vote.annotator, vote.choice, vote.strength) for vote in judged.votes] == [("ana", "b", 4)]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_runs_tab_in_a_browser_asks_nobody_else_for_anything(app, width):
    with chromium(width) as browser:
        browser.open(app.url)
        browser.tab("Runs")
        browser.wait_text("torn")
        browser.click("details.note > summary")
        browser.wait_text("cannot be read")
        browser.tab("Recipe")
        assert browser.overflow() <= 0
        foreign = {url for url in browser.requested() if not url.startswith((app.url, "data:", "blob:"))}
        assert foreign == set()
        assert browser.errors() == []


def test_it_ends_when_asked_although_a_page_is_open(work):
    with running("--store", "end.db", cwd=work) as app:
        lines = []

        def stay():
            try:
                with httpx.stream("GET", app.url + "gradio_api/heartbeat/abc", timeout=60) as stream:
                    lines.extend(stream.iter_lines())
            except httpx.HTTPError:
                lines.append("cut")

        page = threading.Thread(target=stay)
        page.start()
        time.sleep(1)
        assert app.stop(signal.SIGTERM) == 0
        page.join(10)
        assert not page.is_alive()
        assert "stopped; every vote is in the store\n" in app.output
        assert not any("Traceback" in line for line in app.output)


def test_a_port_that_is_taken_is_told_in_words(app, work):
    port = app.url.split(":")[2].strip("/")
    second = subprocess.run(
        [sys.executable, ROOT / "app.py", "--port", port], cwd=work, capture_output=True, text=True, timeout=180
    )
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
