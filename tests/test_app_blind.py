"""Blind means blind: until the vote nothing that reaches an annotator's browser or program tells who answered."""

import json

import httpx
import pytest
from app_thread import served
from browser import chromium, needs_browser
from chat_runs import write_run
from gradio_client import Client

from lowrank_rlhf.arena.chat.catalog import find

RUNS = {"zebrafish": "sft", "quokka": "ppo"}
PROMPTS = 8


@pytest.fixture
def folder(tmp_path):
    for seed, (name, stage) in enumerate(RUNS.items()):
        write_run(tmp_path / "secretruns" / name, stage, seed=seed, steps=(31337,))
    write_run(tmp_path / "secretruns" / "walrus", "reward")
    rows = [{"prompt": f"What is {i} and {i}?"} for i in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def app(folder):
    runs = folder / "secretruns"
    with served(
        runs=runs,
        store=folder / "votes.db",
        prompts=str(folder / "prompts.jsonl"),
        reward=str(runs / "walrus"),
        models=("zebrafish", "quokka step 31337"),
    ) as app:
        yield app


def secrets(folder):
    """Every name, step, hash and path that would tell a model."""
    catalog = find(folder / "secretruns")
    weights = {found.weights for found in catalog.speakers.values() if found.weights}
    assert weights
    names = {*catalog.speakers, *catalog.rewards, *RUNS, "secretruns", "31337", str(folder)} - {"base"}
    return {name.encode() for name in names}


def found_in(sent, words):
    return {word for word in words if word.lower() in sent.lower()}


@needs_browser
def test_a_browser_hears_no_name_before_the_vote(app, folder):
    words = secrets(folder)
    with chromium() as browser:
        browser.open(app.url + "vote/")
        browser.type("#vote-name textarea, #vote-name input", "ann")
        browser.click("#vote-begin")
        browser.one("#vote-a")
        browser.press_button("Regenerate")
        browser.one("#vote-a")
        browser.press_button("Skip")
        browser.one("#vote-a")
        for path in ("config", "gradio_api/info", "gradio_api/app_id", "theme.css", "manifest.json"):
            httpx.get(f"{app.url}vote/{path}")
        sent = app.recorder.all()
        assert len(sent) > 100_000  # the page and its scripts: something was recorded
        assert b"What is" in sent
        assert found_in(sent, words) == set()
        assert found_in(browser.driver.page_source.encode(), words) == set()
        assert all(not found_in(url.encode(), words) for url in browser.requested())
        browser.keys("1")
        browser.wait_text("Saved")
    # The same search finds what the vote reveals: it would have found it before
    assert found_in(app.recorder.all(), words) >= {b"zebrafish", b"31337"}


def test_a_program_hears_no_name_before_the_vote(app, folder):
    words = secrets(folder)
    client = Client(app.url + "vote/", verbose=False, analytics_enabled=False)
    client.view_api(print_info=False)
    task = client.predict("ben", api_name="/next")
    comparison = task["comparison"]
    client.predict(comparison, 0, True, None, "ben", api_name="/thumb")
    client.predict(comparison, 1, "Better words.", None, "ben", api_name="/improve")
    with pytest.raises(Exception, match="choice"):
        client.predict(comparison, "c", None, None, "", None, "ben", api_name="/vote")
    assert found_in(app.recorder.all(), words) == set()
    reply = client.predict(comparison, "a", 2, ["helpful"], "clear", None, "ben", api_name="/vote")
    assert sorted(reply["models"]) == ["quokka step 31337", "zebrafish"]
    assert found_in(app.recorder.all(), words) >= {b"zebrafish", b"31337"}


def test_what_goes_wrong_names_nobody(app, folder, capsys):
    words = secrets(folder)
    for name in RUNS:
        for weights in (folder / "secretruns" / name).rglob("*.safetensors"):
            weights.write_bytes(b"torn")
        for state in (folder / "secretruns" / name).rglob("state.pt"):
            state.unlink()
    client = Client(app.url + "vote/", verbose=False, analytics_enabled=False)
    with pytest.raises(Exception, match="could not answer this prompt"):
        client.predict("eve", api_name="/next")
    assert found_in(app.recorder.all(), words) == set()
    assert found_in(capsys.readouterr().err.encode(), words)  # whoever runs the study reads it
