"""The app as a person uses it, in a real browser over the tiny base: compare, vote, and what goes wrong."""

import json
import time

import pytest
from app_thread import served
from browser import chromium, needs_browser
from chat_runs import edit, write_run

from lowrank_rlhf.arena.chat.decoding import Batch
from lowrank_rlhf.arena.chat.prompts import Prompts
from lowrank_rlhf.arena.votes.database import Store

pytestmark = needs_browser

HOSTILE = '<script>document.title="owned"</script><img src=x onerror="document.title=1"> ${1+1} {{1+1}} **bold**'
WATCH = """
window.lengths = [];
setInterval(() => {
  const sides = ["a", "b"].map((side) => document.querySelector(`#compare-side-${side} .turn.assistant .answer`));
  if (sides.every(Boolean)) window.lengths.push(sides.map((side) => side.textContent.length));
}, 20);
"""
NAME = "#vote-name textarea, #vote-name input"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    for seed, (name, stage) in enumerate({"sft-1": "sft", "ppo-1": "ppo"}.items()):
        run = write_run(folder / "runs" / name, stage, seed=seed, steps=(20,))
        edit(run, lambda info: info["recipe"]["data"].update(max_completion_tokens=24))
        rows = [{"step": step, "objective/scores": 0.1 * step, "objective/kl": 0.2 * step} for step in range(6)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(folder / "runs" / "reward-1", "reward")
    rows = [{"prompt": f"What is {i} and {i}?"} for i in range(12)] + [{"prompt": HOSTILE}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def app(folder):
    options = {"prompts": str(folder / "prompts.jsonl"), "reward": str(folder / "runs" / "reward-1"), "repeats": 0}
    with served(runs=folder / "runs", store=folder / "votes.db", **options) as app:
        yield app


@pytest.fixture
def slow_answers(monkeypatch):
    """Seconds between two letters, so that a page can be watched; what the tiny base writes cannot be seen."""
    step, seconds = Batch.step, [0.05]
    monkeypatch.setattr(Prompts, "text", lambda self, ids, whole: "".join(chr(97 + i % 26) for i in ids))

    def slow(batch):
        time.sleep(seconds[0])
        return step(batch)

    monkeypatch.setattr(Batch, "step", slow)
    return seconds


def votes_of(folder, annotator):
    return [vote for entry in Store(folder / "votes.db").judged(annotator=annotator) for vote in entry.votes]


def cut(answer):
    """Whether somebody stopped it."""
    return not answer.ended and answer.tokens < answer.decoding.max_new_tokens


def begin_voting(browser, app, name):
    browser.open(app.url + "vote/")
    browser.type(NAME, name)
    browser.click("#vote-begin")
    browser.one("#vote-a")


def test_two_adapters_stream_together_and_a_key_votes(app, folder, slow_answers):
    with chromium() as browser:
        browser.open(app.url)
        browser.type("#compare-prompt textarea", "Say something long.")
        browser.driver.execute_script(WATCH)
        browser.click("#compare-send")
        browser.one("#compare-a", 120)
        lengths = [tuple(pair) for pair in browser.driver.execute_script("return window.lengths")]
        # Neither waits for the other: there are moments at which both are half written
        last = lengths[-1]
        half = {pair for pair in lengths if all(0.2 < now / end < 0.8 for now, end in zip(pair, last, strict=True))}
        assert len(half) >= 3
        browser.keys("2")
        browser.wait_text("Saved")
        assert [vote.choice for vote in votes_of(folder, "me")] == ["b"]
        assert browser.errors() == []


def test_keys_vote_blind_and_names_are_revealed(app, folder):
    with chromium() as browser:
        begin_voting(browser, app, "ann")
        assert "ppo-1" not in browser.text
        browser.click("#vote-why button, #vote-why .label-wrap")
        comment = browser.one("#vote-comment textarea, #vote-comment input")
        comment.send_keys("1 2 3 4 n r")  # typing is not voting
        time.sleep(0.5)
        assert votes_of(folder, "ann") == []
        browser.shift("3")
        browser.wait(lambda: browser.all("#vote-strength label.selected"), about="a strength by key")
        browser.keys("1")
        browser.wait_text("Saved")
        browser.wait(lambda: "reward" in browser.text, about="scores after the vote")
        [vote] = votes_of(folder, "ann")
        assert (vote.choice, vote.strength, vote.comment) == ("a", 3, "1 2 3 4 n r")
        assert vote.milliseconds > 500
        comparison = Store(folder / "votes.db").comparison(vote.comparison)
        for answer in comparison.answers:
            assert answer.speaker.name in browser.text
        browser.keys("n")
        browser.one("#vote-a")
        browser.keys("4")
        browser.wait(lambda: len(votes_of(folder, "ann")) == 2, about="the second vote")
        assert browser.errors() == []


def test_what_one_annotator_stops_another_keeps(app, folder, slow_answers):
    with chromium() as one, chromium() as two:
        begin_voting(one, app, "stops")
        begin_voting(two, app, "waits")
        slow_answers[0] = 0.4
        one.press_button("Regenerate")
        two.press_button("Regenerate")
        one.one(".vote-answer .answer.streaming:not(.waiting)", 60)
        one.press_button("Stop")
        one.one("#vote-a")
        slow_answers[0] = 0
        two.one("#vote-a")
        one.keys("3")
        two.keys("3")
        one.wait_text("Saved")
        two.wait_text("Saved")
    [stopped], [kept] = (
        [entry.comparison for entry in Store(folder / "votes.db").judged(annotator=name)] for name in ("stops", "waits")
    )
    assert any(cut(answer) for answer in stopped.answers)
    assert not any(cut(answer) for answer in kept.answers)


def test_markup_and_a_megabyte_do_nothing_but_show(app):
    with chromium() as browser:
        browser.open(app.url)
        for text in (HOSTILE, HOSTILE * 8000):
            box = browser.one("#compare-prompt textarea")
            browser.driver.execute_script(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
                box,
                text,
            )
            time.sleep(0.3)
            browser.click("#compare-send")
            if text == HOSTILE:
                browser.wait_text("${1+1} {{1+1}} **bold**")
                browser.one("#compare-a")
            else:
                browser.wait_text("tokens", 60)
                note = browser.wait(lambda: browser.all("#compare-note .problem"), 60)
                assert "prompt" in note[0].text
        assert browser.driver.title == "lowrank-rlhf"
        browser.type("#compare-prompt textarea", "And now?")
        browser.click("#compare-send")
        browser.wait(lambda: len(browser.all("#compare-side-a .turn.user")) == 2, 60, "the conversation goes on")
        browser.one("#compare-a")
        assert browser.errors() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_and_asks_nobody_else(app, width, dark):
    with chromium(width, dark=dark) as browser:
        browser.open(app.url)
        for name in ("Compare", "Leaderboard", "Runs", "Export"):
            browser.open_tab(name)
            time.sleep(0.5)
            assert browser.overflow() <= 0, name
        begin_voting(browser, app, f"{width} {dark}")
        assert browser.overflow() <= 0
        background = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(int(c) for c in background[4:-1].split(",")[:3]) < 200) is dark
        foreign = {url for url in browser.requested() if not url.startswith((app.url, "data:", "blob:"))}
        assert foreign == set()
        assert browser.errors() == []
